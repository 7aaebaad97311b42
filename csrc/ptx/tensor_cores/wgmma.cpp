// wgmma: asynchronous products of a warpgroup (PTX ISA 9.7.15). Each warp computes 16 of the 64 rows.
//
// The product is computed when the instruction is issued, when it is waited for, or in between, as PtxOptions.landing
// says. Until the wait, D is hidden and its registers hold garbage; only "at once" shows D early.
#include "ptx/tensor_cores/wgmma.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "ptx/tensor_cores/descriptors.h"
#include "ptx/tensor_cores/flights.h"
#include "ptx/tensor_cores/mma.h"
#include "ptx/tensor_cores/warpgroups.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kLate = 0, kAtOnce = 1;  // of PtxOptions.landing
constexpr int kWholeWarp = -1;         // instead of a lane

// Of the instruction: type A, from B, third D; a: n; b: these.
enum Flags { kRegistersA = 1, kTransposedA = 2, kTransposedB = 4, kNegated = 8, kSaturates = 16 };

// k of the shape. Bits count as bytes of them: type A is kB8.
int depth_of(Type a) {
  return a == kB8 ? 8 * kDepthBytes : kDepthBytes / size_of(a);
}

Product product_of(const Instruction& i) {
  return {i.type, i.from, i.third, i.a, kDepthBytes / size_of(i.type), (i.b & kNegated) != 0, (i.b & kSaturates) != 0,
          true};
}

Flight flight_of(const Instruction& instruction) {
  const u32 shape = static_cast<u32>(instruction.a) << 9 | static_cast<u32>(depth_of(instruction.type));
  return {&instruction, (instruction.b & kRegistersA) != 0, shape};
}

MatrixPart part_a(const Warp& warp, const Wgmma& wgmma) {
  return {descriptor_of(wgmma.a), (wgmma.instruction->b & kTransposedA) != 0, warp.id % 4 * kTileRows, kTileRows};
}

MatrixPart part_b(const Wgmma& wgmma) {
  return {descriptor_of(wgmma.b), (wgmma.instruction->b & kTransposedB) != 0, 0, wgmma.instruction->a};
}

// ---- the product

void compute(Machine& machine, Warp& warp, Wgmma& wgmma) {
  if (wgmma.done) return;
  wgmma.done = true;
  const Instruction& instruction = *wgmma.instruction;
  const Product product = product_of(instruction);
  Tile a[kTileRows], b[kMaxColumns];
  if (instruction.b & kRegistersA) {
    gather_a(machine, warp, instruction, 1, a);
  } else {
    load(warp, part_a(warp, wgmma), a);
  }
  load(warp, part_b(wgmma), b);
  u64* registers[kMaxColumns / 2];
  alignas(64) Accumulators d = {};
  for (int j = 0; j < instruction.count(0); ++j) registers[j] = accumulator(warp, instruction.at(0, j).index);
  if (wgmma.scale_d) gather_accumulators(registers, product.result, product.n, d);
  multiply_add(product, machine.options.rounding, a, b, d);
  scatter_accumulators(registers, product.result, product.n, d);
}

template <class F>
void for_pending(Warp& warp, F f) {  // in the order of issue
  for (std::vector<Wgmma>& group : warp.wgmma_committed)
    for (Wgmma& wgmma : group) f(wgmma);
  for (Wgmma& wgmma : warp.wgmma_open) f(wgmma);
}

// The oldest product that has not been computed, if any.
void compute_one(Machine& machine, Warp& warp) {
  Wgmma* oldest = nullptr;
  for_pending(warp, [&oldest](Wgmma& wgmma) {
    if (!wgmma.done && oldest == nullptr) oldest = &wgmma;
  });
  if (oldest != nullptr) compute(machine, warp, *oldest);
}

// What one warp has waited for is over in all four: it may release the memory that they all read.
void complete(Machine& machine, Warp& waiting, u64 number) {
  for_warpgroup(waiting, [&](Warp& warp) {
    for_pending(warp, [&](Wgmma& wgmma) {
      if (wgmma.number > number) return;
      compute(machine, warp, wgmma);
      for (const Wgmma::Range& range : wgmma.reads)
        warp.block->shared.end_read(waiting, kWholeWarp, range.address, range.bytes);
      wgmma.reads.clear();
    });
  });
}

void land_all(Warp& warp, const std::vector<Wgmma>& group) {
  for (const Wgmma& wgmma : group) {
    land_registers(warp, flight_of(*wgmma.instruction));
    --warp.wgmma_pending;
  }
}

// ---- wgmma.mma_async (9.7.15.5.2)

u64 descriptor(Machine& machine, Warp& warp, const PtxOperand& operand) {
  u64 room[kLanes];
  const u64* values = read(machine, warp, operand, room);
  FOR_LANES if (values[l] != values[0]) machine.fault("warpgroup", "the lanes of a warp have different descriptors");
  check_descriptor(machine, values[0]);
  return values[0];
}

bool scale_of_d(Machine& machine, Warp& warp, const PtxOperand& operand) {
  if (operand.kind == kImmediate) return operand.value != 0;
  const Lanes scale = read_predicate(warp, operand);
  if (scale != 0 && scale != kAllLanes) machine.fault("warpgroup", "the lanes of a warp have different scale-d");
  return scale != 0;
}

// All four warps read all of B. Each checks a quarter of it, now this one and now that, unless the mode is strict.
MatrixPart checked_part_of_b(Machine& machine, const Warp& warp, const Wgmma& wgmma) {
  MatrixPart part = part_b(wgmma);
  const u32 drawn = static_cast<u32>(wgmma.number) * 2654435761u >> 16;  // a loop has the same number of instructions
  const int blocks = part.rows / 8, quarter = static_cast<int>((warp.id + drawn) % 4);
  if (machine.options.races > 1 || blocks < 4) return part;
  part.first = quarter * blocks / 4 * 8;
  part.rows = (quarter + 1) * blocks / 4 * 8 - part.first;
  return part;
}

void begin_reads(Machine& machine, Warp& warp, Wgmma* wgmma) {
  const int element_bytes = size_of(wgmma->instruction->type);
  const auto begin = [&](const MatrixPart& whole, const MatrixPart& part) {
    check_start(machine, whole, element_bytes);
    const std::vector<Wgmma::Range> ranges = ranges_of(part);
    wgmma->reads.insert(wgmma->reads.end(), ranges.begin(), ranges.end());
  };
  if (!(wgmma->instruction->b & kRegistersA)) begin(part_a(warp, *wgmma), part_a(warp, *wgmma));
  begin(part_b(*wgmma), checked_part_of_b(machine, warp, *wgmma));
  SharedMemory& shared = warp.block->shared;
  for (const Wgmma::Range& range : wgmma->reads) {
    shared.at(range.address, range.bytes, 16);
    shared.begin_read(warp, kWholeWarp, range.address, range.bytes, Proxy::kAsync);
  }
}

void mma_async(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  Wgmma wgmma{};
  wgmma.instruction = &instruction;
  wgmma.pc = machine.pc;
  if (!(instruction.b & kRegistersA)) wgmma.a = descriptor(machine, warp, instruction.at(1));
  wgmma.b = descriptor(machine, warp, instruction.at(2));
  wgmma.scale_d = scale_of_d(machine, warp, instruction.at(3));
  wgmma.number = warp.wgmma_issued;

  const Flight flight = flight_of(instruction);
  const int landing = machine.options.landing;
  check_flight(machine, warp, flight);
  take_off(warp, flight, landing == kLate || (landing != kAtOnce && machine.chance(2)));
  begin_reads(machine, warp, &wgmma);
  const Issue issued{machine.pc, wgmma.a, wgmma.b, wgmma.scale_d};
  ++warp.wgmma_pending;
  warp.wgmma_open.push_back(std::move(wgmma));
  if (landing == kAtOnce) compute_one(machine, warp);
  if (landing != kAtOnce && landing != kLate)
    while (machine.chance(2)) compute_one(machine, warp);
  machine.counts.tensor_multiply_adds += u64(kTileRows) * instruction.a * depth_of(instruction.type);
  issue(machine, warp, issued);
}

// ---- wgmma.fence, .commit_group, .wait_group (9.7.15.7)

void fence(Machine& machine, Warp& warp, const Instruction&, Lanes mask) {
  expect_whole_warp(machine, mask);
  warp.fenced_at = warp.executed;
  issue(machine, warp, {machine.pc});
}

void commit_group(Machine& machine, Warp& warp, const Instruction&, Lanes mask) {
  expect_whole_warp(machine, mask);
  warp.wgmma_committed.push_back(std::move(warp.wgmma_open));
  warp.wgmma_open.clear();
  issue(machine, warp, {machine.pc});
}

// The first `count` groups are over for the warp, and what they read is over for the warpgroup.
void land_groups(Machine& machine, Warp& warp, size_t count, int pc) {
  const int current = machine.pc;
  machine.pc = pc;
  for (; count > 0; --count) {
    std::vector<Wgmma>& group = warp.wgmma_committed.front();
    if (!group.empty()) complete(machine, warp, group.back().number);
    land_all(warp, group);
    warp.wgmma_committed.pop_front();
  }
  machine.see_warpgroup(warp);
  machine.pc = current;
}

void wait_group(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  const size_t allowed = static_cast<size_t>(instruction.at(0).value);
  const size_t committed = warp.wgmma_committed.size();
  const size_t count = committed > allowed ? committed - allowed : 0;
  u64 issues = 0;
  for (size_t i = 0; i < count; ++i)
    for (const Wgmma& wgmma : warp.wgmma_committed[i]) issues = wgmma.number + 1;
  issue(machine, warp, {machine.pc});
  if (count == 0) return;
  const int pc = machine.pc;
  when_issued(machine, warp, issues, [&machine, &warp, count, pc] { land_groups(machine, warp, count, pc); });
}

// ---- decoding

bool is_byte_float(Type type) {
  return type == kE4M3 || type == kE5M2;
}
bool is_byte_integer(Type type) {
  return type == kS8 || type == kU8;
}

// The table of 9.7.15.2. Of integers and bits, n beyond 32 is a multiple of 16.
bool is_legal(Type d, Type a, Type b, int n, int k) {
  if (n < 8 || n > kMaxColumns || n % 8 != 0 || size_of(a) == 0 || k != depth_of(a)) return false;
  if (a == kB8) return b == a && d == kS32 && (n <= 32 || n % 16 == 0);
  if (a == kF16) return b == a && (d == kF32 || d == kF16);
  if (a == kBF16 || a == kTF32) return b == a && d == kF32;
  if (is_byte_float(a)) return is_byte_float(b) && (d == kF32 || d == kF16);
  return is_byte_integer(a) && is_byte_integer(b) && d == kS32 && (n <= 32 || n % 16 == 0);
}

int choice(const Modifiers& modifiers, const Instruction& instruction, int operand, int usual, int other) {
  const s64 value = instruction.at(operand).value;
  if (value != usual && value != other)
    modifiers.refuse(format("operand %d is %lld, not %d or %d", operand + 1, (long long)value, usual, other));
  return value == other;
}

// Scales and transpositions: d, a, b, scale-d, then imm-scale-a, imm-scale-b, imm-trans-a (of a descriptor),
// imm-trans-b.
void decode_immediates(const Modifiers& modifiers, Instruction* instruction) {
  if (instruction->third == kS32) return;
  if (choice(modifiers, *instruction, 4, 1, -1) != choice(modifiers, *instruction, 5, 1, -1)) {
    instruction->b |= kNegated;
  }
  if (size_of(instruction->type) != 2) return;
  int operand = 6;
  if (!(instruction->b & kRegistersA) && choice(modifiers, *instruction, operand++, 0, 1))
    instruction->b |= kTransposedA;
  if (choice(modifiers, *instruction, operand, 0, 1)) instruction->b |= kTransposedB;
}

// Each register of D is written once, and A is read while D is written.
void expect_distinct_registers(const Modifiers& modifiers, const Instruction& instruction, bool has_a) {
  std::set<int> of_d;
  for (int operand = 0; operand < 1 + has_a; ++operand)
    for (int j = 0; j < instruction.count(operand); ++j) {
      const PtxOperand& part = instruction.at(operand, j);
      if (part.kind != kRegister) modifiers.refuse("D and A must be registers");
      const bool is_new = operand == 0 ? of_d.insert(part.index).second : of_d.count(part.index) == 0;
      if (!is_new) modifiers.refuse("a register twice in D, or in D and in A");
    }
}

void expect_form(const Modifiers& modifiers, const Instruction& instruction) {
  const bool has_a = instruction.b & kRegistersA;
  std::string shape = has_a ? "DSsp" : "Dssp";
  if (instruction.third != kS32) shape += "ii";
  if (instruction.third != kS32 && size_of(instruction.type) == 2) shape += has_a ? "i" : "ii";
  expect_operands(modifiers, instruction, shape.c_str());
  const int wanted = accumulator_registers(instruction.third, instruction.a);
  if (instruction.count(0) != wanted)
    modifiers.refuse(format("D has %d registers, not %d", instruction.count(0), wanted));
  if (has_a && instruction.count(1) != 4) modifiers.refuse("A has other than 4 registers");
  expect_distinct_registers(modifiers, instruction, has_a);
  const PtxOperand& scale_d = instruction.at(3);
  if (scale_d.kind == kImmediate && scale_d.value != 0 && scale_d.value != 1) modifiers.refuse("scale-d is 0 or 1");
}

// Of .s32.b1.b1.and.popc too, where bits count as bytes of them.
std::vector<Type> take_types(Modifiers& modifiers) {
  const bool has_bits = modifiers.take("b1");
  const bool is_whole = has_bits && modifiers.take("b1") && modifiers.take("and") && modifiers.take("popc");
  std::vector<Type> types = modifiers.types();
  if (has_bits != is_whole || std::count(types.begin(), types.end(), kB8)) modifiers.refuse("types");
  if (has_bits) types.insert(types.end(), {kB8, kB8});
  return types;
}

void decode_mma_async(Modifiers& modifiers, Instruction& instruction) {
  if (modifiers.peek("sp")) modifiers.refuse("a sparse A is not modelled");
  const bool saturates = modifiers.take("satfinite");
  const std::vector<Type> types = take_types(modifiers);
  const std::string shape = modifiers.rest();
  int n = 0, k = 0, end = 0;
  const bool is_shape = std::sscanf(shape.c_str(), "m64n%dk%d%n", &n, &k, &end) == 2 && shape.size() == size_t(end);
  if (!is_shape || types.size() != 3 || !is_legal(types[0], types[1], types[2], n, k))
    modifiers.refuse("shape and types");
  if (saturates && (types[0] != kS32 || types[1] == kB8)) modifiers.refuse(".satfinite is for sums of .s8 and .u8");
  if (instruction.num_operands() < 4) modifiers.refuse("too few operands");
  instruction.third = types[0];
  instruction.type = types[1];
  instruction.from = types[2];
  instruction.a = n;
  instruction.b = (instruction.count(1) > 1 ? kRegistersA : 0) | (saturates ? kSaturates : 0);
  instruction.handler = mma_async;
  expect_form(modifiers, instruction);
  decode_immediates(modifiers, &instruction);
}

}  // namespace

void check_wgmma_exit(Machine& machine, Warp& warp) {
  if (warp.wgmma_pending > 0) {
    machine.report("exit", "a warp ends with a wgmma that it has not waited for");
    for_pending(warp, [&](Wgmma& wgmma) {
      compute(machine, warp, wgmma);
      for (const Wgmma::Range& range : wgmma.reads)
        warp.block->shared.end_read(warp, kWholeWarp, range.address, range.bytes);
    });
    warp.wgmma_open.clear();
    warp.wgmma_committed.clear();
    warp.wgmma_pending = 0;
  }
  leave_warpgroup(machine, warp);
}

void decode_wgmma(Modifiers& modifiers, Instruction& instruction) {
  instruction.convergence = Convergence::kAligned;
  const int what = modifiers.any({"mma_async", "fence", "commit_group", "wait_group"});
  if (!modifiers.take("sync") || !modifiers.take("aligned")) modifiers.refuse("needs .sync.aligned");
  if (what == 0) return decode_mma_async(modifiers, instruction);
  static const Handler handlers[] = {nullptr, fence, commit_group, wait_group};
  if (what < 0) modifiers.refuse("form");
  instruction.handler = handlers[what];
  instruction.counted = what == 1 ? Class::kFence : Class::kWait;
  expect_operands(modifiers, instruction, what == 3 ? "i" : "");
  if (what == 3 && instruction.at(0).value < 0) modifiers.refuse("a negative number of groups");
}

}  // namespace fused_resnet::ptx
