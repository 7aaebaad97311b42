// Reading and writing operands of a warp, and checking them at load.
#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

u64 coordinate(u32 index, const u32* sizes, int axis) {
  return axis == 0 ? index % sizes[0] : axis == 1 ? index / sizes[0] % sizes[1] : index / sizes[0] / sizes[1];
}

// PTX ISA 10, what differs between the threads of a block.
u64 of_thread(const Warp& warp, int special, int lane) {
  const u32 thread = warp.id * kLanes + lane;
  switch (special) {
    case kTidX:
    case kTidY:
    case kTidZ:
      return coordinate(thread, warp.block->grid->launch->block, special - kTidX);
    case kLaneid:
      return lane;
    case kLanemaskEq:
      return 1u << lane;
    case kLanemaskLt:
      return (1u << lane) - 1;
    case kLanemaskLe:
      return u32((u64(2) << lane) - 1);
    case kLanemaskGe:
      return ~u32((1u << lane) - 1);
    case kLanemaskGt:
      return ~u32((u64(2) << lane) - 1);
    default:
      return 0;
  }
}

// PTX ISA 10, the place of a block in its grid and cluster.
u64 of_block(const Block& block, int special) {
  const PtxLaunch& launch = *block.grid->launch;
  const u32* cluster = launch.cluster;
  const auto axis_of = [special](int first) { return special - first; };
  if (special >= kNtidX && special <= kNtidZ) return launch.block[axis_of(kNtidX)];
  if (special >= kCtaidX && special <= kCtaidZ) return block.id[axis_of(kCtaidX)];
  if (special >= kNctaidX && special <= kNctaidZ) return launch.grid[axis_of(kNctaidX)];
  if (special >= kClusterCtaidX && special <= kClusterCtaidZ)
    return block.id[axis_of(kClusterCtaidX)] % cluster[axis_of(kClusterCtaidX)];
  if (special >= kClusterNctaidX && special <= kClusterNctaidZ) return cluster[axis_of(kClusterNctaidX)];
  if (special >= kClusteridX && special <= kClusteridZ)
    return block.id[axis_of(kClusteridX)] / cluster[axis_of(kClusteridX)];
  if (special >= kNclusteridX && special <= kNclusteridZ)
    return launch.grid[axis_of(kNclusteridX)] / cluster[axis_of(kNclusteridX)];
  return special == kClusterCtarank ? block.rank : cluster[0] * cluster[1] * cluster[2];
}

// The same for all lanes. %warpid and %smid may be anything that PTX ISA 10.4 and 10.8 allow, hence by seed.
u64 of_warp(Machine& machine, const Warp& warp, const PtxOperand& operand) {
  const Block& block = *warp.block;
  switch (operand.index) {
    case kWarpid:
      return (warp.id + of_seed(machine.options.seed, block.index)) % block.num_warps;
    case kNwarpid:
      return kMaxWarps * 2;
    case kSmid:
      return of_seed(machine.options.seed, block.index) % 132;
    case kClock:
      return machine.counts.warp_instructions;
    case kDynamicSmemSize:  // the parser puts the static part into the operand
      return block.grid->launch->shared_bytes - operand.value;
    case kTotalSmemSize:
      return block.grid->launch->shared_bytes;
    case kZero:
      return 0;
    default:
      return of_block(block, operand.index);
  }
}

const u64* read_special(Machine& machine, Warp& warp, const PtxOperand& operand, u64* room) {
  const int special = operand.index;
  const bool differs = special <= kTidZ || special == kLaneid || (special >= kLanemaskLt && special <= kLanemaskEq);
  if (differs) {
    FOR_LANES room[l] = of_thread(warp, special, l);
  } else {
    const u64 value = of_warp(machine, warp, operand);
    FOR_LANES room[l] = value;
  }
  return room;
}

bool fits(char letter, const PtxOperand& operand) {
  const int kind = operand.kind;
  switch (letter) {
    case 'd':
    case 'D':
      return kind == kRegister || kind == kSink;
    case 's':
    case 'S':
      return kind == kRegister || kind == kImmediate || kind == kSpecial;
    case 'q':
      return (kind == kPredicate && operand.value == 0) || kind == kSink;
    case 'p':
      return kind == kPredicate || kind == kImmediate;
    case 'i':
      return kind == kImmediate;
    case 'm':
      return kind == kMemory;
    default:
      return false;
  }
}

}  // namespace

u32 of_seed(u64 seed, u64 salt) {  // splitmix64
  u64 z = seed + (salt + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<u32>(z ^ (z >> 31));
}

const u64* read(Machine& machine, Warp& warp, const PtxOperand& operand, u64* room) {
  switch (operand.kind) {
    case kRegister:
      return warp.of(operand.index);
    case kImmediate:
      FOR_LANES room[l] = static_cast<u64>(operand.value);
      return room;
    case kSpecial:
      return read_special(machine, warp, operand, room);
    case kPredicate: {
      const Lanes value = read_predicate(warp, operand);
      FOR_LANES room[l] = value >> l & 1;
      return room;
    }
    default:
      throw Fault(format("an operand of kind %d is no source", operand.kind));
  }
}

u64* destination(Warp& warp, const PtxOperand& operand, u64* sink) {
  if (operand.kind == kSink) return sink;
  if (operand.kind != kRegister) throw Fault(format("an operand of kind %d is no destination", operand.kind));
  return warp.of(operand.index);
}

Lanes read_predicate(Warp& warp, const PtxOperand& operand) {
  if (operand.kind == kImmediate) return operand.value ? kAllLanes : 0;
  if (operand.kind != kPredicate) throw Fault(format("an operand of kind %d is no predicate", operand.kind));
  const Lanes value = warp.predicates[operand.index];
  return operand.value ? ~value : value;
}

void write_predicate(Warp& warp, const PtxOperand& operand, Lanes value, Lanes mask) {
  if (operand.kind == kSink) return;
  if (operand.kind != kPredicate) throw Fault(format("an operand of kind %d is no predicate", operand.kind));
  Lanes& predicate = warp.predicates[operand.index];
  predicate = (predicate & ~mask) | (value & mask);
}

u64 address(Warp& warp, const PtxOperand& operand, int lane) {
  const u64 base = operand.index < 0 ? 0 : warp.of(operand.index)[lane];
  return base + static_cast<u64>(operand.value);
}

void expect_operands(const Modifiers& modifiers, const Instruction& instruction, const char* shape) {
  int k = 0;
  for (; *shape; ++shape, ++k) {
    if (k >= instruction.num_operands()) modifiers.refuse("too few operands");
    const int count = instruction.count(k);
    if (*shape == '(') {
      int part = 0;
      for (++shape; *shape != ')'; ++shape, ++part)
        if (part >= count || !fits(*shape, instruction.at(k, part))) modifiers.refuse(format("operand %d", k + 1));
      if (part != count) modifiers.refuse(format("operand %d has %d parts", k + 1, count));
      continue;
    }
    const bool vector = *shape == 'D' || *shape == 'S';
    if (count < 1 || (count > 1 && !vector)) modifiers.refuse(format("operand %d has %d parts", k + 1, count));
    for (int part = 0; part < count; ++part)
      if (!fits(*shape, instruction.at(k, part))) modifiers.refuse(format("operand %d", k + 1));
  }
  if (k != instruction.num_operands()) modifiers.refuse("too many operands");
}

}  // namespace fused_resnet::ptx
