// Barriers of a block and of a cluster (PTX ISA 9.7.13.1, 9.7.13.4).
#include <algorithm>

#include "ptx/machine/operands.h"
#include "ptx/threads/fences.h"

namespace fused_resnet::ptx {
namespace {

enum Mode : s32 { kSync, kArrive, kReduce };
enum Reduction : s32 { kPopc, kAnd, kOr };

u32 alive_threads(const Block& block) {
  u32 threads = 0;
  for (const auto& warp : block.warps) threads += u32(__builtin_popcount(warp->alive));
  return threads;
}

void check_count(Machine& machine, NamedBarrier& barrier, int id, u32 count) {
  if (count % kLanes != 0)
    machine.report("barrier", format("%u threads at barrier %d: not a multiple of the warp's 32", count, id));
  if (barrier.arrivals > 0 && barrier.expected != count)
    machine.report("barrier", format("%u threads are expected at barrier %d, where others expect %u (0: all)", count,
                                     id, barrier.expected));
}

// Counts are in whole warps: a warp whose remaining lanes have all arrived is one.
u32 arrived_threads(const Block& block, const NamedBarrier& barrier) {
  u32 threads = 0;
  for (const auto& warp : block.warps) {
    const Lanes lanes = barrier.lanes[warp->id];
    const bool is_whole = barrier.expected > 0 && lanes != 0 && (warp->alive & ~lanes) == 0;
    threads += is_whole ? kLanes : u32(__builtin_popcount(lanes));
  }
  return threads;
}

// What each waiting thread of a bar.red gets.
void give(Warp& warp, Lanes lanes, const Instruction& i, u32 num_true, u32 num_asked) {
  u64 sink[kLanes];
  if (i.b == kPopc) {
    store(destination(warp, i.at(0), sink), lanes, [&](int) { return u64(num_true); });
    return;
  }
  const bool result = i.b == kAnd ? num_true == num_asked : num_true > 0;
  write_predicate(warp, i.at(0), result ? kAllLanes : 0, lanes);
}

void wait(Warp& warp, Lanes lanes, State state, int pc) {
  warp.at_barrier |= lanes;
  warp.waiting_at = pc;
  if (warp.at_barrier == warp.alive) warp.state = state;
}

void set_free(Warp& warp, Lanes lanes) {
  warp.at_barrier &= ~lanes;
  if (warp.state == State::kAtBarrier || warp.state == State::kAtCluster) warp.state = State::kRunning;
}

void arrive(Machine& machine, Warp& warp, const Instruction& i, Lanes lanes, u64 id, u32 count) {
  if (id >= kNamedBarriers) machine.fault("barrier", format("barrier %llu of 16", static_cast<unsigned long long>(id)));
  NamedBarrier& barrier = warp.block->barriers[id];
  check_count(machine, barrier, int(id), count);
  if (i.a == kArrive && count == 0) machine.report("barrier", "bar.arrive for a count of 0 threads");
  if (barrier.arrivals++ == 0) {
    barrier.expected = count;
    barrier.pc = machine.pc;
    barrier.reduces = i.a == kReduce;
  } else if (barrier.reduces != (i.a == kReduce)) {
    machine.report("barrier", format("bar.red and another kind of arrival meet at barrier %d", int(id)));
  }
  if (barrier.lanes[warp.id] & lanes)
    machine.report("barrier", format("lanes %#x arrive at barrier %d again, which has not completed",
                                     barrier.lanes[warp.id] & lanes, int(id)));
  barrier.lanes[warp.id] |= lanes;
  machine.hand_on(warp, lanes, barrier.arriving);
  if (i.a == kReduce) {
    barrier.num_true += u32(__builtin_popcount(read_predicate(warp, i.at(i.num_operands() - 1)) & lanes));
    barrier.num_asked += u32(__builtin_popcount(lanes));
  }
  if (i.a != kArrive) {
    barrier.waiting.push_back({&warp, lanes, &i});
    wait(warp, lanes, State::kAtBarrier, machine.pc);
  }
  try_release(machine, *warp.block, int(id));
}

// a: Mode, b: Reduction, c: which operand is the barrier, d: which one is the count, or -1.
void barrier(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes], count_room[kLanes];
  const u64* ids = read(machine, warp, i.at(i.c), room);
  const u64* counts = i.d < 0 ? nullptr : read(machine, warp, i.at(i.d), count_room);
  const bool is_aligned = i.convergence == Convergence::kAligned;
  for (Lanes left = is_aligned ? warp.alive : mask; left != 0;) {
    const int first = __builtin_ctz(left);
    const u64 id = u32(ids[first]);
    const u32 count = counts == nullptr ? 0 : u32(counts[first]);
    Lanes same = 0;
    FOR_ACTIVE(left) if (u32(ids[l]) == id && (counts == nullptr || u32(counts[l]) == count)) same |= 1u << l;
    if (is_aligned && same != left)
      machine.report("barrier", "lanes of a warp name different barriers or counts at an .aligned barrier");
    arrive(machine, warp, i, same, id, count);
    left &= ~same;
  }
}

// ------------------------------------------------------------------------------------------------------ of a cluster

// 9.7.13.4. Each thread arrives once a phase, and waits before it arrives again. a: .relaxed
void cluster_arrive(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  Cluster& cluster = *warp.block->cluster;
  const Lanes lanes = i.convergence == Convergence::kAligned ? warp.alive : mask;
  FOR_ACTIVE(lanes) {
    u32& phase = warp.block->cluster_arrivals[warp.id * kLanes + l];
    if (phase != 0) machine.report("barrier", "barrier.cluster.arrive by a thread that has not waited since its last");
    phase = cluster.phase + 1;
    ++cluster.arrived;
  }
  if (i.a == 0) {
    machine.hand_on(warp, lanes, cluster.arriving);
  } else {  // what fences have made ready, as in the ISA's second example
    FOR_ACTIVE(lanes) cluster.arriving.join(warp.fenced[level_of(Scope::kCluster)][l]);
  }
  try_release_cluster(machine, cluster);
}

void cluster_wait(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  Cluster& cluster = *warp.block->cluster;
  const Lanes lanes = i.convergence == Convergence::kAligned ? warp.alive : mask;
  Lanes passing = 0;
  FOR_ACTIVE(lanes) {
    u32& phase = warp.block->cluster_arrivals[warp.id * kLanes + l];
    if (phase == 0) machine.report("barrier", "barrier.cluster.wait by a thread that has not arrived");
    if (phase <= cluster.phase) passing |= 1u << l;
    if (phase <= cluster.phase) phase = 0;
  }
  machine.take_over(warp, passing, cluster.complete);
  if (passing == lanes) return;
  cluster.waiting.push_back({&warp, lanes & ~passing, &i});
  wait(warp, lanes & ~passing, State::kAtCluster, machine.pc);
}

bool all_arrived(const Cluster& cluster) {
  for (const auto& block : cluster.blocks)
    for (const auto& warp : block->warps) FOR_ACTIVE(warp->alive)
  if (block->cluster_arrivals[warp->id * kLanes + l] != cluster.phase + 1) return false;
  return true;
}

// ---------------------------------------------------------------------------------------------------------- decoding

void decode_cluster(Modifiers& m, Instruction& i) {
  if (m.take("arrive")) {
    i.handler = cluster_arrive;
    i.a = m.take("relaxed");
    if (i.a == 0) m.take("release");
  } else if (m.take("wait")) {
    i.handler = cluster_wait;
    m.take("acquire");
  } else {
    m.refuse();
  }
  if (m.take("aligned")) i.convergence = Convergence::kAligned;
  expect_operands(m, i, "");
}

void decode_named(Modifiers& m, Instruction& i) {
  m.take("cta");
  i.handler = barrier;
  i.a = m.any({"sync", "arrive", "red"});
  if (i.a < 0) m.refuse();
  const bool is_aligned = m.take("aligned");
  if (m.name() == "bar" || is_aligned) i.convergence = Convergence::kAligned;
  const int operands = i.num_operands();
  i.d = -1;
  if (i.a == kReduce) {
    i.b = m.any({"popc", "and", "or"});
    const Type type = m.type();
    if (i.b < 0 || (i.b == kPopc ? type != kU32 : type != kPred)) m.refuse();
    i.c = 1;
    if (operands == 4) i.d = 2;
    const std::string shape = std::string(i.b == kPopc ? "d" : "q") + (operands == 4 ? "ssp" : "sp");
    expect_operands(m, i, shape.c_str());
    return;
  }
  if (operands == 2) i.d = 1;
  if (i.a == kArrive && operands != 2) m.refuse("an arrival needs the number of threads");
  expect_operands(m, i, operands == 2 ? "ss" : "s");
}

}  // namespace

void try_release(Machine& machine, Block& block, int id) {
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.arrivals == 0) return;
  const u32 expected = barrier.expected > 0 ? barrier.expected : alive_threads(block);
  const u32 arrived = arrived_threads(block, barrier);
  if (arrived < expected) return;
  if (arrived > expected)
    machine.report("barrier", format("%u threads at barrier %d, where %u are expected", arrived, id, expected));
  const NamedBarrier done = std::move(barrier);
  barrier = NamedBarrier();
  for (const auto& waiting : done.waiting) {
    const Lanes lanes = waiting.lanes & waiting.warp->alive;
    // all that these lanes had seen they handed on when they arrived
    FOR_ACTIVE(lanes) waiting.warp->views[l] = done.arriving;
    if (waiting.instruction->a == kReduce)
      give(*waiting.warp, lanes, *waiting.instruction, done.num_true, done.num_asked);
    set_free(*waiting.warp, lanes);
  }
}

void try_release_cluster(Machine& machine, Cluster& cluster) {
  if (cluster.arrived == 0 || !all_arrived(cluster)) return;
  ++cluster.phase;
  cluster.arrived = 0;
  cluster.complete.join(cluster.arriving);
  cluster.arriving = Views();
  const auto waiting = std::move(cluster.waiting);
  cluster.waiting.clear();
  for (const auto& one : waiting) {
    FOR_ACTIVE(one.lanes) one.warp->block->cluster_arrivals[one.warp->id * kLanes + l] = 0;
    machine.take_over(*one.warp, one.lanes, cluster.complete);
    set_free(*one.warp, one.lanes);
  }
}

void decode_barrier(Modifiers& m, Instruction& i) {
  if (m.name() == "fence" || m.name() == "membar")
    decode_fence(m, i);
  else if (m.name() == "barrier" && m.take("cluster"))
    decode_cluster(m, i);
  else
    decode_named(m, i);
}

}  // namespace fused_resnet::ptx
