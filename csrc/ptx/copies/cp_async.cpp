// cp.async and what waits for it (PTX ISA 9.7.9.25.3).
//
// A copy writes through the generic proxy. Its data come as late as the thread's waits allow, or earlier; whenever they
// come, they are in flight until the thread has waited, or until an mbarrier has that the copies arrive at. After
// wait_group the thread itself sees what was written, and others only what a barrier or the like hands on.
#include <algorithm>

#include "ptx/copies/copies.h"

namespace fused_resnet::ptx {
namespace {

enum Landing : s32 { kLate, kEarly, kAtRandom };

void put(Warp& warp, Copy& copy) {
  u8* to = warp.block->shared.at(copy.to, copy.bytes);
  std::memset(to, 0, copy.bytes);
  if (copy.valid != 0) std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.valid);
  copy.landed = true;
}

// The copy is over, in the name of `agent` at `time`.
void end(Machine& machine, Warp& warp, Copy& copy, Agent agent, Time time) {
  if (!copy.landed) put(warp, copy);
  warp.block->shared.end_write(copy.to, copy.bytes, agent, time, Proxy::kGeneric, copy.pc);
  if (copy.valid != 0) mark_in_global(machine, copy.from, copy.valid, false, -1);
  copy.agent = agent;
  copy.time = time;
}

// How many bytes each lane takes from global memory; the others become zeros. Operand 3 is src-size or ignore-src.
void valid_bytes(Machine& machine, Warp& warp, const Instruction& i, Lanes mask, u32* valid) {
  const u32 bytes = u32(i.a);
  FOR_ACTIVE(mask) valid[l] = bytes;
  if (!i.b) return;
  if (i.at(3).kind == kPredicate) {
    const Lanes ignored = read_predicate(warp, i.at(3));
    FOR_ACTIVE(mask & ignored) valid[l] = 0;
    return;
  }
  u64 room[kLanes];
  const u64* sizes = read(machine, warp, i.at(3), room);
  FOR_ACTIVE(mask) {
    valid[l] = u32(sizes[l]);
    if (valid[l] > bytes) machine.fault("cp.async", format("a source of %u bytes for a copy of %u", valid[l], bytes));
  }
}

// Where the bytes come from, after all checks of a global read; nothing is read where none is valid.
u64 source(Machine& machine, Warp& warp, int lane, const Instruction& i, u32 valid) {
  const u64 from = address(warp, i.at(1), lane);
  const u32 bytes = u32(i.a);
  if (from % bytes != 0)
    machine.fault("misaligned", format("cp.async of %u bytes from global %#llx", bytes, (unsigned long long)from));
  if (valid == 0) return from;
  machine.global(warp, lane, from, valid, false, nullptr, 1);
  mark_in_global(machine, from, valid, false, 1);
  return from;
}

// 9.7.9.25.3.1. a: bytes, b: whether operand 3 is src-size or ignore-src.
void copy(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  const u32 bytes = u32(i.a);
  SharedMemory& shared = warp.block->shared;
  u32 valid[kLanes], targets[kLanes];
  u64 sources[kLanes];
  Lanes reading = 0;
  valid_bytes(machine, warp, i, mask, valid);
  FOR_ACTIVE(mask) {
    Copy made{};
    made.to = targets[l] = place_of(machine, warp, kSharedCta, address(warp, i.at(0), l)).address;
    u8* to = shared.at(made.to, bytes);
    made.from = sources[l] = source(machine, warp, l, i, valid[l]);
    made.bytes = u8(bytes);
    made.valid = u8(valid[l]);
    made.pc = machine.pc;
    made.number = warp.copies[l].issued++;
    if (valid[l] != 0) reading |= 1u << l;
    shared.begin_write(warp, l, made.to, bytes, Proxy::kGeneric);
    std::memset(to, 0xff, bytes);  // poisoned until it lands
    const int landing = machine.options.landing;
    if (landing == kEarly || (landing == kAtRandom && machine.chance(2))) put(warp, made);
    warp.copies[l].open.push_back(made);
  }
  if (reading != 0) machine.count_global(sources, reading, bytes, false);
  machine.count_shared(targets, mask, bytes, true);
}

// 9.7.9.25.3.2
void commit(Machine&, Warp& warp, const Instruction&, Lanes mask) {
  FOR_ACTIVE(mask) {
    warp.copies[l].committed.push_back(std::move(warp.copies[l].open));
    warp.copies[l].open.clear();
  }
}

// Arrivals of the thread that stand behind a copy which the thread now waits for. They may happen now.
void land_arrivals(Machine& machine, Warp& warp, int lane, u32 first_number) {
  for (size_t k = 0; k < machine.pending.size();) {
    const std::shared_ptr<BulkCopy> pending = machine.pending[k];
    if (pending->route == Route::kArrival && pending->warp == &warp && pending->lane == lane &&
        pending->num_copies > first_number) {
      machine.pending.erase(machine.pending.begin() + k);
      land(machine, *pending);
    } else {
      ++k;
    }
  }
}

void finish(Machine& machine, Warp& warp, int lane, std::vector<Copy>& group) {
  if (!group.empty()) land_arrivals(machine, warp, lane, group.front().number);
  for (Copy& copy : group) {
    if (copy.agent == kNobody)
      end(machine, warp, copy, warp.agent(lane), warp.own[lane] + 1);
    else  // an mbarrier ended it: the thread sees it too now, and, leniently, the phase's copies by other threads
      warp.views[lane].generic.add(copy.agent, copy.time);
  }
  group.clear();
}

// 9.7.9.25.3.3. a: how many groups may stay pending, -1: wait_all, which takes copies of no group too.
void wait(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  const size_t may_stay = i.a < 0 ? 0 : size_t(i.a);
  FOR_ACTIVE(mask) {
    CopyGroups& copies = warp.copies[l];
    while (copies.committed.size() > may_stay) {
      finish(machine, warp, l, copies.committed.front());
      copies.committed.pop_front();
    }
    if (i.a < 0) finish(machine, warp, l, copies.open);
  }
}

// 9.7.13.15.15, cp.async.mbarrier.arrive. a: .noinc, b: the space.
void arrive(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) {
    const SharedPlace place = place_of(machine, warp, Space(i.b), address(warp, i.at(0), l));
    Mbarrier& barrier = live_mbarrier(machine, warp, l, place);
    if (!i.a && ++barrier.pending > kMaxMbarrierCount) machine.fault("mbarrier count", "too many pending arrivals");
    auto made = std::make_shared<BulkCopy>();
    made->route = Route::kArrival;
    made->warp = &warp;
    made->lane = l;
    made->pc = machine.pc;
    made->bytes = 0;
    made->num_copies = warp.copies[l].issued;
    made->targets.push_back({place.block, 0, place.address});
    machine.pending.push_back(std::move(made));
  }
}

// Copies that an mbarrier ended are kept for the thread's own wait: of those with one agent the last says it all.
void forget(std::vector<Copy>& group) {
  std::vector<Copy> kept;
  for (const Copy& copy : group) {
    if (copy.agent != kNobody && !kept.empty() && kept.back().agent == copy.agent)
      kept.back() = copy;
    else
      kept.push_back(copy);
  }
  group = std::move(kept);
}

bool is_covered(const Machine& machine, const Warp& warp, int lane, const Copy& copy) {
  for (const auto& pending : machine.pending)
    if (pending->route == Route::kArrival && pending->warp == &warp && pending->lane == lane &&
        pending->num_copies > copy.number)
      return true;
  return false;
}

void decode_copy_of_bytes(Modifiers& m, Instruction& i) {
  const int level = m.any({"ca", "cg"});
  if (level < 0 || !m.take("global")) m.refuse("neither .ca nor .cg, or not from .global");
  if (m.any({"shared", "shared::cta"}) < 0) m.refuse("not to .shared");
  m.any({"L2::64B", "L2::128B", "L2::256B"});              // how much to prefetch: a hint
  const int num_hints = m.take("L2::cache_hint") ? 1 : 0;  // likewise, with a policy as last operand
  i.handler = copy;
  if (i.num_operands() < 3 || i.at(2).kind != kImmediate) m.refuse("cp-size is no constant");
  i.a = s32(i.at(2).value);
  if (i.a != 16 && (level == 1 || (i.a != 4 && i.a != 8))) m.refuse("cp-size");
  i.b = i.num_operands() > 3 + num_hints;
  const bool is_predicate = i.b && i.at(3).kind == kPredicate;
  std::string shape = !i.b ? "mmi" : is_predicate ? "mmip" : "mmis";
  if (num_hints != 0) shape += 's';
  expect_operands(m, i, shape.c_str());
}

}  // namespace

void land_arrival(Machine& machine, BulkCopy& arrival) {
  Warp& warp = *arrival.warp;
  const Target& target = arrival.targets[0];
  const auto found = target.block->mbarriers.find(target.mbarrier);
  if (found == target.block->mbarriers.end() || !found->second.alive)
    machine.fault("mbarrier", "cp.async copies arrive at an mbarrier that is gone", arrival.pc);
  CopyGroups& copies = warp.copies[arrival.lane];
  const auto finish = [&](std::vector<Copy>& group) {
    for (Copy& copy : group)
      if (copy.agent == kNobody && copy.number < arrival.num_copies)
        end(machine, warp, copy, found->second.agent, time_of(found->second));
    forget(group);
  };
  for (auto& group : copies.committed) finish(group);
  finish(copies.open);
  arrive_alone(machine, found->second);
}

bool has_copies_in_flight(const BulkCopy& arrival) {
  const CopyGroups& copies = arrival.warp->copies[arrival.lane];
  const auto is_left = [&](const Copy& copy) { return copy.agent == kNobody && copy.number < arrival.num_copies; };
  bool left = std::any_of(copies.open.begin(), copies.open.end(), is_left);
  for (const auto& group : copies.committed) left = left || std::any_of(group.begin(), group.end(), is_left);
  return left;
}

void check_cp_async_at_exit(Machine& machine, Warp& warp, Lanes exiting) {
  const auto is_left = [&](int lane, const std::vector<Copy>& group) {
    for (const Copy& copy : group)
      if (copy.agent == kNobody && !is_covered(machine, warp, lane, copy)) return true;
    return false;
  };
  FOR_ACTIVE(exiting) {
    bool left = is_left(l, warp.copies[l].open);
    for (const auto& group : warp.copies[l].committed) left = left || is_left(l, group);
    if (left) return machine.report("exit", "a thread ends with cp.async copies that it has not waited for");
  }
}

void decode_cp_async(Modifiers& m, Instruction& i) {
  if (m.take("commit_group")) {
    i.handler = commit;
    i.counted = Class::kWait;
    return expect_operands(m, i, "");
  }
  const bool waits_for_all = m.take("wait_all");
  if (waits_for_all || m.take("wait_group")) {
    i.handler = wait;
    i.counted = Class::kWait;
    expect_operands(m, i, waits_for_all ? "" : "i");
    i.a = waits_for_all ? -1 : s32(i.at(0).value);
    if (!waits_for_all && i.a < 0) m.refuse("a negative number of groups");
    return;
  }
  if (m.take("mbarrier")) {
    if (!m.take("arrive") || !m.take("b64")) m.refuse();
    i.handler = arrive;
    i.counted = Class::kMbarrier;
    i.a = m.take("noinc");
    i.b = take_shared_space(m);
    if (i.b == kSharedCluster) m.refuse("the mbarrier is the block's own");
    return expect_operands(m, i, "m");
  }
  decode_copy_of_bytes(m, i);
}

}  // namespace fused_resnet::ptx
