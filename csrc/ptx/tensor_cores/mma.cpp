// mma.sync.aligned (PTX ISA 9.7.14.5.14): D = A B + C of one warp, m16n8, and m8n8k16, whose lower half is zeros.
#include "ptx/tensor_cores/mma.h"

#include "ptx/tensor_cores/products.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kColumns = 8;

// Of the instruction: type A, from B, third D; a: k, b: whether .satfinite, c: rows.
Product product_of(const Instruction& instruction) {
  const bool saturates = instruction.b != 0;
  return {instruction.type, instruction.from, instruction.third, kColumns, instruction.a, false, saturates, false};
}

void mma(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  const Product product = product_of(instruction);
  Tile a[kTileRows] = {}, b[kColumns] = {};
  u32 sums[kTileRows * kColumns];
  u64 rooms[4][kLanes] = {};
  const u64* from[4];
  u64* to[4];
  gather_a(machine, warp, instruction, 1, a);
  gather_b(machine, warp, instruction, 2, b);
  for (int j = 0; j < 4; ++j)
    from[j] = j < instruction.count(3) ? read(machine, warp, instruction.at(3, j), rooms[j]) : rooms[j];
  gather_accumulators(from, product.result, kColumns, sums);
  multiply_add(product, machine.options.rounding, a, b, sums);
  for (int j = 0; j < 4; ++j)
    to[j] = j < instruction.count(0) ? destination(warp, instruction.at(0, j), rooms[j]) : rooms[j];
  scatter_accumulators(to, product.result, kColumns, sums);
  machine.counts.tensor_multiply_adds += u64(instruction.c) * kColumns * product.k;
}

bool is_byte_float(Type type) {
  return type == kE4M3 || type == kE5M2;
}
bool is_byte_integer(Type type) {
  return type == kS8 || type == kU8;
}

// The table "Supported matrix types and shapes" of 9.7.14.2, for m16n8.
bool is_legal(Type d, Type a, Type b, Type c, int k) {
  if (d != c) return false;
  const bool is_float_sum = d == kF32 || d == kF16;
  if (a == kF16) return b == a && is_float_sum && (k == 8 || k == 16);
  if (a == kBF16) return b == a && d == kF32 && (k == 8 || k == 16);
  if (a == kTF32) return b == a && d == kF32 && (k == 4 || k == 8);
  if (is_byte_float(a)) return is_byte_float(b) && is_float_sum && (k == 16 || k == 32);
  return is_byte_integer(a) && is_byte_integer(b) && d == kS32 && (k == 16 || k == 32);
}

void expect_registers(const Modifiers& modifiers, const Instruction& instruction) {
  const int depth_bytes = instruction.a * size_of(instruction.type);
  const int parts = kTileRows / instruction.c;
  const int sums = accumulator_registers(instruction.third, kColumns) / parts;
  const int wanted[] = {sums, depth_bytes / 8 / parts, depth_bytes / 16, sums};
  for (int k = 0; k < 4; ++k)
    if (instruction.count(k) != wanted[k]) {
      modifiers.refuse(format("operand %d has %d registers, not %d", k + 1, instruction.count(k), wanted[k]));
    }
}

}  // namespace

void expect_whole_warp(Machine& machine, Lanes mask) {
  if (mask == kAllLanes) return;
  machine.fault("aligned", format("lanes %08x of a warp are absent where all must take part", ~mask));
}

void decode_mma(Modifiers& modifiers, Instruction& instruction) {
  if (!modifiers.take("sync") || !modifiers.take("aligned")) modifiers.refuse("needs .sync.aligned");
  if (decode_small_mma(modifiers, instruction)) return;
  if (!modifiers.take("row") || !modifiers.take("col")) modifiers.refuse("A is .row and B is .col");
  const bool is_small = modifiers.take("m8n8k16");
  const int shape = modifiers.any({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"});
  if (shape < 0 && !is_small) modifiers.refuse("shape");
  const bool saturates = modifiers.take("satfinite");
  const std::vector<Type> types = modifiers.types();
  const int k = is_small ? 16 : 4 << shape;
  if (types.size() != 4 || !is_legal(types[0], types[1], types[2], types[3], k)) modifiers.refuse("types");
  if (is_small && types[0] != kS32) modifiers.refuse("m8n8k16 is of bytes");
  if (saturates && types[0] != kS32) modifiers.refuse(".satfinite is for s32");
  instruction.third = types[0];
  instruction.type = types[1];
  instruction.from = types[2];
  instruction.a = k;
  instruction.b = saturates;
  instruction.c = is_small ? kTileRows / 2 : kTileRows;
  instruction.convergence = Convergence::kAligned;
  instruction.handler = mma;
  expect_operands(modifiers, instruction, "DSSS");
  expect_registers(modifiers, instruction);
}

}  // namespace fused_resnet::ptx
