// Instructions of several lanes of a warp (PTX ISA 9.7.9.6, 9.7.13.2, 9.7.13.8 to 9.7.13.14).
//
// The lanes of a handler's mask have named the same members and are all of them that have not exited. Only
// bar.warp.sync orders memory.
#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

int first_lane(Lanes mask) {
  return __builtin_ctz(mask);
}

// 9.7.13.2: what each member did before is seen by all members after.
void bar_warp(Machine& machine, Warp& warp, const Instruction&, Lanes mask) {
  Views views;
  machine.hand_on(warp, mask, views);
  machine.take_over(warp, mask, views);
}

enum Direction : int { kUp, kDown, kButterfly, kIndex };

struct Source {
  int lane;
  bool in_range;
};

// 9.7.9.6: where a lane's value comes from. `limits`: the clamp in bits 0 to 4, the segment's mask in bits 8 to 12.
Source source_of(Direction direction, int lane, u32 offset, u32 limits) {
  const int by = offset & 31, clamp = limits & 31, segment = limits >> 8 & 31;
  const int lowest = lane & segment, limit = lowest | (clamp & ~segment);
  int from = 0;
  switch (direction) {
    case kUp:
      from = lane - by;
      return from >= limit ? Source{from, true} : Source{lane, false};
    case kDown:
      from = lane + by;
      break;
    case kButterfly:
      from = lane ^ by;
      break;
    case kIndex:
      from = lowest | (by & ~segment);
      break;
  }
  return from <= limit ? Source{from, true} : Source{lane, false};
}

// The value of a lane that takes no part is unpredictable: here it is any, and reported.
u64 shuffled(Machine& machine, const u64* values, int lane, int from, Lanes mask) {
  if (mask >> from & 1) return static_cast<u32>(values[from]);
  machine.report("shfl", format("lane %d takes the value of lane %d, which takes no part", lane, from));
  return machine.random();
}

void shuffle(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[3][kLanes], results[kLanes], sink[kLanes];
  const u64* values = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* offsets = read(machine, warp, instruction.at(2), rooms[1]);
  const u64* limits = read(machine, warp, instruction.at(3), rooms[2]);
  const auto direction = static_cast<Direction>(instruction.a);
  Lanes in_range = 0;
  FOR_ACTIVE(mask) {
    const Source source = source_of(direction, l, static_cast<u32>(offsets[l]), static_cast<u32>(limits[l]));
    results[l] = shuffled(machine, values, l, source.lane, mask);
    in_range |= Lanes(source.in_range) << l;
  }
  store(destination(warp, instruction.at(0, 0), sink), mask, [&](int l) { return results[l]; });
  if (instruction.count(0) == 2) write_predicate(warp, instruction.at(0, 1), in_range, mask);
}

enum Vote : int { kAll, kAny, kUniform, kBallot };

void vote(Machine&, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.13.9
  const Lanes votes = read_predicate(warp, instruction.at(1)) & mask;
  if (instruction.a == kBallot) {
    u64 sink[kLanes];
    store(destination(warp, instruction.at(0), sink), mask, [&](int) { return u64(votes); });
    return;
  }
  const bool all = votes == mask, any = votes != 0;
  const bool result = instruction.a == kAll ? all : instruction.a == kAny ? any : all || !any;
  write_predicate(warp, instruction.at(0), result ? kAllLanes : 0, mask);
}

// 9.7.13.10: the lanes whose value is that of the lane; or all, if all values are the same.
void match(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], matching[kLanes], sink[kLanes];
  const u64* values = read(machine, warp, instruction.at(1), room);
  const u64 keep = instruction.type == kB32 ? 0xffffffff : ~u64(0);
  bool all = true;
  FOR_ACTIVE(mask) {
    Lanes same = 0;
    for (int other = 0; other < kLanes; ++other)
      if ((mask >> other & 1) && (values[other] & keep) == (values[l] & keep)) same |= Lanes(1) << other;
    matching[l] = same;
    all = all && same == mask;
  }
  const bool is_any = instruction.a != 0;
  store(destination(warp, instruction.at(0, 0), sink), mask, [&](int l) -> u64 {
    return is_any ? matching[l] : all ? mask : 0;
  });
  if (instruction.count(0) == 2) write_predicate(warp, instruction.at(0, 1), all ? kAllLanes : 0, mask);
}

// 9.7.13.14: any member may be the leader, but the same mask always has the same one. Hardware takes the lowest lane,
// on which CUTLASS counts: its producers expect the bytes in lane 0 and copy in the elected one.
void elect(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const Lanes members = static_cast<Lanes>(read(machine, warp, instruction.at(1), room)[first_lane(mask)]);
  int leader = machine.options.races > 1 ? of_seed(machine.options.seed, members) % kLanes : 0;
  while (!(mask >> leader & 1)) leader = (leader + 1) % kLanes;
  if (instruction.at(0, 0).kind != kSink)
    store(destination(warp, instruction.at(0, 0), sink), mask, [&](int) { return u64(leader); });
  write_predicate(warp, instruction.at(0, 1), Lanes(1) << leader, mask);
}

enum Reduction : int { kAdd, kMin, kMax, kAnd, kOr, kXor };

u32 reduced(Reduction reduction, bool is_signed_type, u32 a, u32 b) {
  const bool less = is_signed_type ? s32(a) < s32(b) : a < b;
  switch (reduction) {
    case kAdd:
      return a + b;
    case kMin:
      return less ? a : b;
    case kMax:
      return less ? b : a;
    case kAnd:
      return a & b;
    case kOr:
      return a | b;
    case kXor:
      return a ^ b;
  }
  return 0;
}
void reduce(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.13.12
  u64 room[kLanes], sink[kLanes];
  const u64* values = read(machine, warp, instruction.at(1), room);
  const auto reduction = static_cast<Reduction>(instruction.a);
  u32 result = static_cast<u32>(values[first_lane(mask)]);
  FOR_ACTIVE(mask & (mask - 1)) {
    result = reduced(reduction, is_signed(instruction.type), result, static_cast<u32>(values[l]));
  }
  store(destination(warp, instruction.at(0), sink), mask, [&](int) { return u64(result); });
}

void active_mask(Machine&, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.13.11
  u64 sink[kLanes];
  store(destination(warp, instruction.at(0), sink), mask, [&](int) { return u64(mask); });
}

void take_type(Modifiers& modifiers, Instruction& instruction, Type wanted) {
  instruction.type = modifiers.type();
  if (instruction.type != wanted) modifiers.refuse(std::string("the type is .") + name_of(wanted));
}

void decode_vote(Modifiers& modifiers, Instruction& instruction) {
  instruction.a = modifiers.any({"all", "any", "uni", "ballot"});
  if (instruction.a < 0) modifiers.refuse("no mode");
  const bool is_ballot = instruction.a == kBallot;
  take_type(modifiers, instruction, is_ballot ? kB32 : kPred);
  expect_operands(modifiers, instruction, is_ballot ? "dps" : "qps");
  instruction.handler = vote;
}

void decode_shuffle(Modifiers& modifiers, Instruction& instruction) {
  instruction.a = modifiers.any({"up", "down", "bfly", "idx"});
  if (instruction.a < 0) modifiers.refuse("no mode");
  take_type(modifiers, instruction, kB32);
  expect_operands(modifiers, instruction, instruction.count(0) == 2 ? "(dq)ssss" : "dssss");
  instruction.handler = shuffle;
}

void decode_match(Modifiers& modifiers, Instruction& instruction) {
  const int mode = modifiers.any({"all", "any"});
  instruction.type = modifiers.type();
  if (mode < 0 || (instruction.type != kB32 && instruction.type != kB64)) modifiers.refuse();
  instruction.a = mode;
  expect_operands(modifiers, instruction, mode == 0 && instruction.count(0) == 2 ? "(dq)ss" : "dss");
  instruction.handler = match;
}

void decode_reduce(Modifiers& modifiers, Instruction& instruction) {
  instruction.a = modifiers.any({"add", "min", "max", "and", "or", "xor"});
  const Type type = instruction.type = modifiers.type();
  const bool is_logic = instruction.a >= kAnd;
  if (instruction.a < 0 || (is_logic ? type != kB32 : type != kU32 && type != kS32)) modifiers.refuse();
  expect_operands(modifiers, instruction, "dss");
  instruction.handler = reduce;
}

}  // namespace

void decode_warp(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  if (name == "activemask") {
    take_type(modifiers, instruction, kB32);
    expect_operands(modifiers, instruction, "d");
    instruction.handler = active_mask;
    return;
  }
  const bool is_barrier = name == "bar" && modifiers.take("warp");
  if (!modifiers.take("sync")) modifiers.refuse("without .sync");
  instruction.convergence = Convergence::kMembers;
  instruction.members = instruction.num_operands() - 1;
  if (is_barrier) {
    expect_operands(modifiers, instruction, "s");
    instruction.handler = bar_warp;
  } else if (name == "shfl") {
    decode_shuffle(modifiers, instruction);
  } else if (name == "vote") {
    decode_vote(modifiers, instruction);
  } else if (name == "match") {
    decode_match(modifiers, instruction);
  } else if (name == "redux") {
    decode_reduce(modifiers, instruction);
  } else if (name == "elect") {
    expect_operands(modifiers, instruction, "(dq)s");
    instruction.handler = elect;
  }
}

}  // namespace fused_resnet::ptx
