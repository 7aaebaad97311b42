// mbarrier.* (PTX ISA 9.7.13.15).
//
// An mbarrier's phase hands on what those have seen who arrived with .release, and, in the name of its own agent, what
// copies wrote whose bytes it counted. Only a wait with .acquire that comes true takes this over.
#include "ptx/copies/mbarriers.h"

#include <cstdlib>

namespace fused_resnet::ptx {
namespace {

enum Flags : s32 { kExpects = 1, kNoComplete = 2, kDrop = 4, kRelaxed = 8, kCluster = 16, kParity = 32, kTry = 64 };

// The state that an arrival returns: the pending count and the phase before it (PTX ISA 9.7.13.15.13), whose it is, and
// whether the arrival was .noComplete.
constexpr u64 kStateMark = 0xb;

u64 name_of(const Mbarrier& barrier) {
  return barrier.address / 8 & 0x7f;
}
u64 state_of(const Mbarrier& barrier, bool is_no_complete) {
  return (u64(barrier.pending) & kMaxMbarrierCount) | u64(barrier.phase) << 20 | name_of(barrier) << 52 |
         u64(is_no_complete) << 59 | kStateMark << 60;
}
bool is_state(u64 state) {
  return state >> 60 == kStateMark;
}
u32 phase_of(u64 state) {
  return u32(state >> 20);
}

Mbarrier* find(Block& block, u32 address) {
  const auto found = block.mbarriers.find(address);
  return found == block.mbarriers.end() || !found->second.alive ? nullptr : &found->second;
}

SharedPlace operand_place(Machine& machine, Warp& warp, const Instruction& i, int operand, int lane) {
  return place_of(machine, warp, Space(i.b), address(warp, i.at(operand), lane));
}

void check_count(Machine& machine, const char* what, s64 count, s64 least) {
  if (count < least || count > kMaxMbarrierCount)
    machine.fault("mbarrier count", format("%s of %lld, not of %lld to %lld", what, static_cast<long long>(count),
                                           static_cast<long long>(least), static_cast<long long>(kMaxMbarrierCount)));
}

// The bytes that are still to come, or came before they were expected (PTX ISA 9.7.13.15.2).
void add_bytes(Machine& machine, Mbarrier& barrier, s64 bytes) {
  barrier.bytes += bytes;
  if (std::abs(barrier.bytes) > kMaxMbarrierCount)
    machine.fault("mbarrier count", format("%lld bytes are pending at the mbarrier at shared %u",
                                           static_cast<long long>(barrier.bytes), barrier.address));
}

// 9.7.13.15.9. The object is the block's own.
void init(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes];
  const u64* counts = read(machine, warp, i.at(1), room);
  FOR_ACTIVE(mask) {
    const SharedPlace place = operand_place(machine, warp, i, 0, l);
    SharedMemory& shared = place.block->shared;
    u8* bytes = shared.at(place.address, 8);
    check_count(machine, "mbarrier.init with a count", u32(counts[l]), 1);
    Mbarrier& barrier = place.block->mbarriers[place.address];
    if (barrier.alive) {
      machine.report("mbarrier",
                     format("an mbarrier lives at shared %u already: mbarrier.inval comes first", place.address));
      shared.guard(place.address, 8, false);
    }
    shared.write(warp, l, place.address, 8);
    shared.guard(place.address, 8, true);
    std::memset(bytes, 0xb5, 8);  // its contents are nobody's business
    // a second life of the address begins behind the phases of the first, so that their times cannot be mistaken
    Mbarrier fresh;
    fresh.phase = barrier.agent == kNobody ? 0 : (barrier.phase + 2) & ~1u;
    fresh.agent = barrier.agent == kNobody ? machine.new_agent() : barrier.agent;
    fresh.address = place.address;
    fresh.count = u32(counts[l]);
    fresh.pending = fresh.count;
    fresh.alive = true;
    fresh.made_by = warp.agent(l);
    fresh.made_at = warp.own[l] + 1;
    barrier = fresh;
  }
}

// 9.7.13.15.10
void inval(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) {
    const SharedPlace place = operand_place(machine, warp, i, 0, l);
    Mbarrier& barrier = live_mbarrier(machine, warp, l, place);
    for (const auto& other : place.block->warps)
      if (other->state == State::kAtMbarrier && other->wait_address == place.address)
        machine.report("mbarrier", format("invalidated while warp %d waits on it", other->id));
    if (barrier.bytes != 0) machine.report("mbarrier", "invalidated while bytes of copies are still to come");
    barrier.alive = false;
    SharedMemory& shared = place.block->shared;
    shared.guard(place.address, 8, false);
    shared.write(warp, l, place.address, 8);
    std::memset(shared.at(place.address, 8), 0xff, 8);
  }
}

// 9.7.13.15.4: "at least one test_wait or try_wait that returns true" between the completion of a phase and the
// arrivals of the next.
void check_waited(Machine& machine, Mbarrier& barrier) {
  if (barrier.waited) return;
  machine.report("mbarrier phase", format("an arrival in phase %u of the mbarrier at shared %u, though no wait for the "
                                          "phase before it has come true",
                                          barrier.phase, barrier.address));
  barrier.waited = true;
}

// The active lanes at the mbarrier that the first of them means. Takes them out of `left`.
Lanes at_the_same(Mbarrier* const* barriers, Lanes& left) {
  const Mbarrier* first = barriers[__builtin_ctz(left)];
  Lanes same = 0;
  FOR_ACTIVE(left) if (barriers[l] == first) same |= 1u << l;
  left &= ~same;
  return same;
}

void note_scope(Machine& machine, Warp& warp, const Instruction& i, const SharedPlace& place, Mbarrier& barrier) {
  if (place.block == warp.block) return;
  barrier.has_remote = true;
  if (machine.options.races > 1 && !(i.a & (kCluster | kRelaxed)))
    machine.report("mbarrier scope", "an arrival at another block's mbarrier needs .cluster to release to that block");
}

void count_arrival(Machine& machine, const Instruction& i, Mbarrier& barrier, s64 arrivals) {
  if (arrivals > barrier.pending)
    machine.fault("mbarrier count",
                  format("%lld arrivals at the mbarrier at shared %u, of which %lld are pending",
                         static_cast<long long>(arrivals), barrier.address, static_cast<long long>(barrier.pending)));
  if (i.a & kNoComplete && barrier.pending == arrivals && barrier.bytes == 0)
    machine.report("mbarrier", "an arrival with .noComplete completes the phase");
  if (i.a & kDrop) barrier.count -= u32(arrivals);
  barrier.pending -= arrivals;
}

// 9.7.13.15.13, 9.7.13.15.14. a: flags, b: the space.
void arrive(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes], sink[kLanes], states[kLanes];
  const u64* values = i.num_operands() > 2 ? read(machine, warp, i.at(2), room) : nullptr;
  Mbarrier* barriers[kLanes];
  FOR_ACTIVE(mask) {
    const SharedPlace place = operand_place(machine, warp, i, 1, l);
    if (place.block != warp.block && i.at(0).kind != kSink)
      machine.fault("mbarrier", "an arrival at another block's mbarrier returns no state");
    barriers[l] = &live_mbarrier(machine, warp, l, place);
    note_scope(machine, warp, i, place, *barriers[l]);
  }
  if (!(i.a & kRelaxed)) {  // what a lane has seen goes to whoever waits
    for (Lanes left = mask; left != 0;) {
      Mbarrier& barrier = *barriers[__builtin_ctz(left)];
      machine.hand_on(warp, at_the_same(barriers, left), barrier.arriving);
    }
  } else {  // what a fence has made ready
    const Scope scope = i.a & kCluster ? Scope::kCluster : Scope::kCta;
    FOR_ACTIVE(mask) barriers[l]->arriving.join(warp.fenced[level_of(scope)][l]);
  }
  FOR_ACTIVE(mask) {
    Mbarrier& barrier = *barriers[l];
    check_waited(machine, barrier);
    states[l] = state_of(barrier, i.a & kNoComplete);
    if (i.a & kExpects) {
      check_count(machine, "expect-tx", u32(values[l]), 0);
      add_bytes(machine, barrier, u32(values[l]));
    }
    const s64 arrivals = values == nullptr || i.a & kExpects ? 1 : s64(u32(values[l]));
    check_count(machine, "an arrival with a count", arrivals, 1);
    count_arrival(machine, i, barrier, arrivals);
    complete_if_due(machine, barrier);
  }
  store(destination(warp, i.at(0), sink), mask, [&](int l) { return states[l]; });
}

// 9.7.13.15.11, 9.7.13.15.12. d: +1 expects bytes, -1 completes them.
void transact(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes];
  const u64* bytes = read(machine, warp, i.at(1), room);
  FOR_ACTIVE(mask) {
    Mbarrier& barrier = live_mbarrier(machine, warp, l, operand_place(machine, warp, i, 0, l));
    check_count(machine, i.d > 0 ? "expect-tx" : "complete-tx", u32(bytes[l]), 0);
    add_bytes(machine, barrier, i.d * s64(u32(bytes[l])));
    complete_if_due(machine, barrier);
  }
}

// Whether the phase that the lane asks about is complete.
bool is_complete(Machine& machine, const Instruction& i, const Mbarrier& barrier, u64 asked) {
  if (i.a & kParity) {
    if (u32(asked) > 1) machine.report("mbarrier", format("a phase's parity is 0 or 1, not %u", u32(asked)));
    return (barrier.phase & 1) != (asked & 1);
  }
  if (!is_state(asked) || (asked >> 52 & 0x7f) != name_of(barrier))
    machine.fault("mbarrier", "a wait for a state that no arrival at this mbarrier returned");
  if (phase_of(asked) > barrier.phase || phase_of(asked) + 1 < barrier.phase)
    machine.report("mbarrier", "a wait for a phase that is neither the current one nor the one before");
  return phase_of(asked) < barrier.phase;
}

// The waits of these lanes at one mbarrier came true.
void acquire(Machine& machine, Warp& warp, Lanes lanes, const Instruction& i, Mbarrier& barrier) {
  barrier.waited = true;
  if (i.a & kRelaxed) {  // for the lane's next fence to take over
    FOR_ACTIVE(lanes) warp.observed[0][l].join(barrier.complete);
    return;
  }
  if (machine.options.races > 1 && barrier.had_remote && !(i.a & kCluster))
    machine.report("mbarrier scope", "a wait for arrivals from other blocks needs .cluster to acquire");
  machine.take_over(warp, lanes, barrier.complete);
}

// Somebody asks in vain. The warp blocks if no lane of it could do anything else, and only then: a lane that is
// predicated off may be the one that arrives.
void wait_in_vain(Machine& machine, Warp& warp, const Instruction& i, Lanes failed, const u32* addresses,
                  const u32* parities) {
  const int first = __builtin_ctz(failed);
  bool is_same = true;
  FOR_ACTIVE(failed) is_same = is_same && addresses[l] == addresses[first] && parities[l] == parities[first];
  const Lanes others = warp.alive & ~failed & ~(warp.diverged ? warp.blocked : 0);
  if (i.a & kTry && is_same && others == 0 && !machine.chance(4)) {
    warp.state = State::kAtMbarrier;
    warp.waiting_at = machine.pc;
    warp.wait_address = addresses[first];
    warp.wait_parity = parities[first];
    return;
  }
  machine.yields = true;
}

// 9.7.13.15.16: test_wait, and try_wait, which may block, and may give up before the phase is complete.
void wait(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes];
  const u64* asked = read(machine, warp, i.at(2), room);
  Mbarrier* barriers[kLanes];
  u32 addresses[kLanes], parities[kLanes];
  Lanes passed = 0;
  FOR_ACTIVE(mask) {
    const SharedPlace place = operand_place(machine, warp, i, 1, l);
    if (place.block != warp.block) machine.fault("mbarrier", "a wait on another block's mbarrier");
    barriers[l] = &live_mbarrier(machine, warp, l, place);
    addresses[l] = place.address;
    parities[l] = barriers[l]->phase & 1;
    if (is_complete(machine, i, *barriers[l], asked[l])) passed |= 1u << l;
  }
  const Lanes failed = mask & ~passed;
  if (failed != 0)
    wait_in_vain(machine, warp, i, failed, addresses, parities);
  else if (i.a & kTry && machine.chance(8))
    passed = 0;
  for (Lanes left = passed; left != 0;) {
    Mbarrier& barrier = *barriers[__builtin_ctz(left)];
    acquire(machine, warp, at_the_same(barriers, left), i, barrier);
  }
  write_predicate(warp, i.at(0), passed, mask);
}

// 9.7.13.15.17
void pending_count(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const u64* states = read(machine, warp, i.at(1), room);
  FOR_ACTIVE(mask) {
    if (!is_state(states[l])) machine.fault("mbarrier", "a state that no arrival returned");
    if (!(states[l] >> 59 & 1)) machine.report("mbarrier", "the count of a state that no .noComplete arrival returned");
  }
  u64* to = destination(warp, i.at(0), sink);
  store(to, mask, [&](int l) { return states[l] & u64(kMaxMbarrierCount); });
}

// .sem and .scope, both or none. Of waits: .acquire; of arrivals: .release; both may be .relaxed (PTX ISA 8.0).
s32 take_order(Modifiers& m, const char* strong) {
  const int order = strong == nullptr ? m.any({"relaxed"}) : m.any({"relaxed", strong});
  const int scope = m.any({"cta", "cluster"});
  if ((order < 0) != (scope < 0)) m.refuse("an order without a scope, or a scope without an order");
  return (order == 0 ? kRelaxed : 0) | (scope == 1 ? kCluster : 0);
}

void decode_arrive(Modifiers& m, Instruction& i, bool is_drop) {
  i.handler = arrive;
  i.a = is_drop ? kDrop : 0;
  if (m.take("expect_tx")) i.a |= kExpects;
  if (m.take("noComplete")) i.a |= kNoComplete;
  if (i.a & kExpects && i.a & kNoComplete) m.refuse("expect_tx with noComplete");
  i.a |= take_order(m, "release");
  if (i.a & kNoComplete && i.a & (kRelaxed | kCluster)) m.refuse(".noComplete is .release.cta");
  i.b = take_shared_space(m);
  const bool needs_value = i.a & (kExpects | kNoComplete);
  const bool has_value = i.num_operands() > 2;
  if (needs_value && !has_value) m.refuse("no count");
  expect_operands(m, i, has_value ? "dms" : "dm");
  if (i.b == kSharedCluster && i.at(0).kind != kSink) m.refuse(".shared::cluster returns no state");
  if (i.b == kSharedCluster && i.a & kNoComplete) m.refuse(".noComplete at another block's mbarrier");
}

void decode_wait(Modifiers& m, Instruction& i, bool is_try) {
  i.handler = wait;
  i.a = is_try ? kTry : 0;
  if (m.take("parity")) i.a |= kParity;
  i.a |= take_order(m, "acquire");
  i.b = take_shared_space(m);
  if (i.b == kSharedCluster) m.refuse("a wait is for the block's own mbarriers");
  expect_operands(m, i, is_try && i.num_operands() == 4 ? "qmss" : "qms");  // the fourth is a hint of time
}

void decode_transaction(Modifiers& m, Instruction& i, int sign) {
  i.handler = transact;
  i.d = sign;
  take_order(m, nullptr);
  i.b = take_shared_space(m);
  expect_operands(m, i, "ms");
}

// Whether the lane's use of the mbarrier comes after its making. fence.mbarrier_init and any barrier.cluster behind it
// do, even a relaxed one. So does, on hardware, the order of instructions of a warp that has not diverged: Triton lets
// one lane make it and another use it.
bool knows_of(const Machine& machine, const Warp& warp, int lane, const Mbarrier& barrier) {
  const Agent first = warp.agent(0);
  if (barrier.made_by == warp.agent(lane)) return true;
  if (warp.views[lane].generic.has_seen(barrier.made_by, barrier.made_at)) return true;
  if (barrier.is_fenced && warp.block->cluster->phase > barrier.fenced_in) return true;
  const bool is_same_warp = barrier.made_by >= first && barrier.made_by < first + kLanes;
  return is_same_warp && !warp.diverged && machine.options.races < 2;
}

}  // namespace

Space take_shared_space(Modifiers& modifiers) {
  if (modifiers.take("shared::cluster")) return kSharedCluster;
  return modifiers.take("shared::cta") || modifiers.take("shared") ? kSharedCta : kGenericSpace;
}

SharedPlace place_of(Machine& machine, Warp& warp, Space space, u64 address) {
  if (space == kGenericSpace) {
    if (address < kSharedWindow || address - kSharedWindow > ~0u)
      machine.fault("out of bounds",
                    format("generic address %#llx is not in shared memory", (unsigned long long)address));
    address -= kSharedWindow;
  }
  const SharedPlace place = shared_place(machine, warp, u32(address));
  if (space == kSharedCta && place.block != warp.block)
    machine.fault("out of bounds", "an address of another block where only .shared::cta is allowed");
  return place;
}

Mbarrier& live_mbarrier(Machine& machine, Warp& warp, int lane, const SharedPlace& place) {
  place.block->shared.at(place.address, 8);
  Mbarrier* barrier = find(*place.block, place.address);
  if (barrier == nullptr) machine.fault("mbarrier", format("there is no mbarrier at shared %u", place.address));
  if (machine.options.races > 0 && !knows_of(machine, warp, lane, *barrier))
    machine.report("race", format("the mbarrier at shared %u is used without synchronisation with its mbarrier.init",
                                  place.address));
  place.block->shared.mark_use(warp, lane, place.address);
  return *barrier;
}

void complete_if_due(Machine& machine, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  if (barrier.phase + 2 == 0) machine.fault("mbarrier", "too many phases");
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.complete.join(barrier.arriving);
  barrier.complete.generic.add(barrier.agent, barrier.phase);
  barrier.complete.async.add(barrier.agent, barrier.phase);
  barrier.complete.async_global.add(barrier.agent, barrier.phase);
  barrier.arriving = Views();
  barrier.waited = false;
  barrier.had_remote |= barrier.has_remote;
  barrier.has_remote = false;
}

void complete_bytes(Machine& machine, Mbarrier& barrier, s64 bytes) {
  add_bytes(machine, barrier, -bytes);
  complete_if_due(machine, barrier);
}

void arrive_alone(Machine& machine, Mbarrier& barrier) {
  check_waited(machine, barrier);
  if (barrier.pending == 0)
    machine.fault("mbarrier count",
                  format("more arrivals at the mbarrier at shared %u than expected", barrier.address));
  --barrier.pending;
  complete_if_due(machine, barrier);
}

void decode_mbarrier(Modifiers& m, Instruction& i) {
  const int kind = m.any({"init", "inval", "arrive_drop", "arrive", "test_wait", "try_wait", "pending_count"});
  m.take("b64");
  switch (kind) {
    case 0:
    case 1:
      i.handler = kind == 0 ? init : inval;
      i.b = take_shared_space(m);
      if (i.b == kSharedCluster) m.refuse("an mbarrier is made in the block's own shared memory");
      return expect_operands(m, i, kind == 0 ? "ms" : "m");
    case 2:
    case 3:
      return decode_arrive(m, i, kind == 2);
    case 4:
    case 5:
      return decode_wait(m, i, kind == 5);
    case 6:
      i.handler = pending_count;
      return expect_operands(m, i, "ds");
    default:
      break;
  }
  if (m.take("expect_tx")) return decode_transaction(m, i, 1);
  if (m.take("complete_tx")) return decode_transaction(m, i, -1);
  m.refuse("no such operation on an mbarrier is known");
}

}  // namespace fused_resnet::ptx
