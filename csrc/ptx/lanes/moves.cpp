// Moves, addresses of state spaces and logic of predicates (PTX ISA 9.7.9, 9.7.8).
#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

u64 low_bits(int count) {
  return count >= 64 ? ~u64(0) : (u64(1) << count) - 1;
}

void move(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.9.3
  u64 room[kLanes], sink[kLanes];
  const u64* from = read(machine, warp, instruction.at(1), room);
  const u64 keep = low_bits(8 * size_of(instruction.type));
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) { return from[l] & keep; });
}

void move_predicate(Machine&, Warp& warp, const Instruction& instruction, Lanes mask) {
  write_predicate(warp, instruction.at(0), read_predicate(warp, instruction.at(1)), mask);
}

// 9.7.9.4: several registers into one, the first into the lowest bits.
void pack(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const int parts = instruction.count(1), width = 8 * size_of(instruction.type) / parts;
  u64 packed[kLanes] = {}, room[kLanes], sink[kLanes];
  for (int part = 0; part < parts; ++part) {
    const u64* from = read(machine, warp, instruction.at(1, part), room);
    FOR_LANES packed[l] |= (from[l] & low_bits(width)) << (width * part);
  }
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) { return packed[l]; });
}
void unpack(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const int parts = instruction.count(0), width = 8 * size_of(instruction.type) / parts;
  u64 whole[kLanes], room[kLanes], sink[kLanes];  // a copy: the source may be among the destinations
  std::memcpy(whole, read(machine, warp, instruction.at(1), room), sizeof whole);
  for (int part = 0; part < parts; ++part)
    store(destination(warp, instruction.at(0, part), sink), mask,
          [&](int l) { return whole[l] >> (width * part) & low_bits(width); });
}

// 9.7.8.1 to 9.7.8.4, of predicates. `a`: 0 and, 1 or, 2 xor, 3 not.
void predicate_logic(Machine&, Warp& warp, const Instruction& instruction, Lanes mask) {
  const Lanes a = read_predicate(warp, instruction.at(1));
  const Lanes b = instruction.a == 3 ? 0 : read_predicate(warp, instruction.at(2));
  const Lanes result = instruction.a == 0 ? a & b : instruction.a == 1 ? a | b : instruction.a == 2 ? a ^ b : ~a;
  write_predicate(warp, instruction.at(0), result, mask);
}

// State spaces. Global, constant and local addresses are generic ones already; parameters are by their offset.
enum Space : int { kGlobal, kConst, kLocal, kSharedSpace, kSharedCluster, kParam, kNoSpace = -1 };

Space space_of(Modifiers& modifiers) {
  static const Space kSpaces[] = {kGlobal, kConst, kLocal, kSharedSpace, kSharedSpace, kSharedCluster, kParam, kParam};
  const int space =
      modifiers.any({"global", "const", "local", "shared", "shared::cta", "shared::cluster", "param", "param::entry"});
  return space < 0 ? kNoSpace : kSpaces[space];
}

// 9.7.9.20. `a`: Space, `b`: from the generic address to it.
void convert_address(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const u64* from = read(machine, warp, instruction.at(1), room);
  u64 base = 0;
  if (instruction.a == kSharedSpace || instruction.a == kSharedCluster) base = kSharedWindow;
  if (instruction.a == kParam) base = reinterpret_cast<u64>(warp.block->grid->parameters);
  const u64 offset = instruction.b ? -base : base;
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) { return from[l] + offset; });
}

bool is_in_shared(u64 generic) {
  return generic >= kSharedWindow && generic < kLocalWindow;
}
u32 rank_in(const Warp& warp, u32 address) {  // of the block whose shared memory it is in
  const u32 rank = address >> kRankShift;
  return rank == 0 ? warp.block->rank : rank - 1;
}

void is_in_space(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.9.19
  u64 room[kLanes];
  const u64* from = read(machine, warp, instruction.at(1), room);
  const u64 parameters = reinterpret_cast<u64>(warp.block->grid->parameters);
  Lanes result = 0;
  FOR_LANES {
    const u64 address = from[l];
    const bool is_shared = is_in_shared(address), is_local = address >= kLocalWindow && address < 2 * kLocalWindow;
    bool is_inside = !is_shared && !is_local;
    if (instruction.a == kLocal) is_inside = is_local;
    if (instruction.a == kSharedCluster) is_inside = is_shared;
    if (instruction.a == kSharedSpace)
      is_inside = is_shared && rank_in(warp, u32(address - kSharedWindow)) == warp.block->rank;
    if (instruction.a == kParam)
      is_inside = address >= parameters && address - parameters < warp.block->grid->launch->parameter_bytes;
    result |= Lanes(is_inside) << l;
  }
  write_predicate(warp, instruction.at(0), result, mask);
}

// 9.7.9.23. `a`: 1 of generic addresses.
void map_address(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[2][kLanes], sink[kLanes];
  const u64* from = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* ranks = read(machine, warp, instruction.at(2), rooms[1]);
  const u64 base = instruction.a ? kSharedWindow : 0;
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    if (instruction.a && !is_in_shared(from[l])) machine.fault("mapa", "of an address that is not in shared memory");
    const u32 rank = static_cast<u32>(ranks[l]), offset = u32(from[l] - base) & ((1u << kRankShift) - 1);
    if (machine.block_of_rank(warp, rank) == nullptr)
      machine.fault("mapa", format("no block of rank %u in the cluster", rank));
    return base + (u64(rank + 1) << kRankShift | offset);
  });
}
void rank_of_address(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.9.24
  u64 room[kLanes], sink[kLanes];
  const u64* from = read(machine, warp, instruction.at(1), room);
  const u64 base = instruction.a ? kSharedWindow : 0;
  store(destination(warp, instruction.at(0), sink), mask,
        [&](int l) -> u64 { return rank_in(warp, static_cast<u32>(from[l] - base)); });
}

// 9.7.9.18: a policy is opaque and a hint, hence any value.
void create_policy(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 sink[kLanes];
  const u64 policy = u64(machine.random()) << 32 | machine.random();
  store(destination(warp, instruction.at(0), sink), mask, [&](int) { return policy; });
}

void decode_mov(Modifiers& modifiers, Instruction& instruction) {
  const Type type = instruction.type = modifiers.type();
  if (type == kPred) {
    expect_operands(modifiers, instruction, "qp");
    instruction.handler = move_predicate;
    return;
  }
  const int to = instruction.count(0), from = instruction.count(1), parts = to * from;
  if (to > 1 && from > 1) modifiers.refuse("two vectors");
  expect_operands(modifiers, instruction, to > 1 ? "Ds" : from > 1 ? "dS" : "ds");
  const int size = size_of(type);
  const bool is_bits = type == kB16 || type == kB32 || type == kB64;
  if (parts > 1 && (!is_bits || (parts != 2 && parts != 4) || size / parts < 1)) modifiers.refuse("this vector");
  const bool is_word = is_bits || type == kU16 || type == kS16 || type == kU32 || type == kS32 || type == kU64 ||
                       type == kS64 || type == kF32 || type == kF64;
  if (is_word) instruction.handler = to > 1 ? unpack : from > 1 ? pack : move;
  instruction.is_copy = instruction.handler == move;
}

void decode_policy(Modifiers& modifiers, Instruction& instruction) {
  const int form = modifiers.any({"fractional", "range", "cvt"});
  if (modifiers.type() != kB64 || form < 0) modifiers.refuse();
  if (form == 2) {
    if (!modifiers.take("L2")) modifiers.refuse();
    expect_operands(modifiers, instruction, "ds");
  } else {
    if (modifiers.any({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"}) < 0)
      modifiers.refuse("no priority");
    modifiers.any({"L2::evict_first", "L2::evict_unchanged"});
    if (form == 1) modifiers.take("global");
    expect_operands(modifiers, instruction, form == 1 ? "dmss" : instruction.num_operands() == 1 ? "d" : "ds");
  }
  instruction.handler = create_policy;
}

void decode_address(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  instruction.b = name == "cvta" && modifiers.take("to");
  const Space space = space_of(modifiers);
  instruction.type = name == "isspacep" ? kU64 : modifiers.type();
  if (instruction.type != kU32 && instruction.type != kU64) modifiers.refuse("an address is .u32 or .u64");
  if (name == "cvta") {
    expect_operands(modifiers, instruction, "ds");
    instruction.a = space;
    if (space != kNoSpace) instruction.handler = convert_address;
  } else if (name == "isspacep") {
    expect_operands(modifiers, instruction, "qs");
    instruction.a = space;
    if (space != kNoSpace && space != kConst) instruction.handler = is_in_space;
  } else {
    const bool is_map = name == "mapa";
    expect_operands(modifiers, instruction, is_map ? "dss" : "ds");
    instruction.a = space == kNoSpace;
    if (space == kNoSpace || space == kSharedCluster) instruction.handler = is_map ? map_address : rank_of_address;
  }
}

}  // namespace

void decode_predicate_logic(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  instruction.a = name == "and" ? 0 : name == "or" ? 1 : name == "xor" ? 2 : 3;
  instruction.type = kPred;
  instruction.counted = Class::kCompare;
  expect_operands(modifiers, instruction, instruction.a == 3 ? "qp" : "qpp");
  instruction.handler = predicate_logic;
}

void decode_move(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  if (name == "mov") return decode_mov(modifiers, instruction);
  if (name == "createpolicy") return decode_policy(modifiers, instruction);
  if (name == "cvta" || name == "isspacep" || name == "mapa" || name == "getctarank")
    return decode_address(modifiers, instruction);
  decode_comparison(modifiers, instruction);
}

}  // namespace fused_resnet::ptx
