// setmaxnreg: warps of a block lend registers to each other (PTX ISA 9.7.19.5).
//
// Registers of the PTX are no hardware's, so that what new ones hold cannot be seen here. What can is who waits for
// whom, and who must not ask. Counts are a thread's; those of a warp's threads go together.
#include "ptx/threads/register_pool.h"

#include <algorithm>

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {

struct RegisterPool {
  struct Step {  // a setmaxnreg that a warp has executed
    int pc;
    Time times[kLanes];
  };
  struct Waiting {
    Warp* warp;
    int count;
  };
  int available = 0;
  std::vector<int> owned;                // by warp
  std::vector<std::vector<Step>> steps;  // by warp
  std::vector<Waiting> waiting;
};

namespace {

constexpr s64 kFewest = 24, kMost = 256;
enum Action : s32 { kInc, kDec };

RegisterPool& pool_of(Block& block) {
  if (!block.register_pool) {
    block.register_pool = std::make_shared<RegisterPool>();
    block.register_pool->owned.assign(block.num_warps, static_cast<int>(block.grid->launch->registers));
    block.register_pool->steps.resize(block.num_warps);
  }
  return *block.register_pool;
}

template <class F>
void for_others(Warp& warp, F f) {  // of its warpgroup
  const int first = warp.id / 4 * 4;
  for (int id = first; id < std::min(first + 4, warp.block->num_warps); ++id)
    if (id != warp.id) f(*warp.block->warps[id]);
}

// Whether some lane knows what some lane of the other warp did at that time.
bool has_met(const Warp& warp, const Warp& other, const RegisterPool::Step& step) {
  FOR_LANES for (int k = 0; k < kLanes; ++k) {
    if (warp.views[l].generic.has_seen(other.agent(k), step.times[k])) return true;
  }
  return false;
}

// All warps of the warpgroup execute the same ones, and meet between one and the next.
void check_warpgroup(Machine& machine, Warp& warp, const RegisterPool& pool) {
  const size_t count = pool.steps[warp.id].size();
  int others = 0;
  for_others(warp, [&](const Warp& other) {
    ++others;
    const auto& steps = pool.steps[other.id];
    if (steps.size() > count && steps[count].pc != machine.pc)
      machine.report("setmaxnreg", format("warp %d executed ", other.id) + machine.where(steps[count].pc));
    else if (steps.size() <= count && other.alive == 0)
      machine.report("setmaxnreg", format("warp %d of the warpgroup has exited without it", other.id));
    else if (count > 0 && (steps.size() < count || !has_met(warp, other, steps[count - 1])))
      machine.report("setmaxnreg", format("warp %d was not waited for since the setmaxnreg before", other.id));
  });
  if (others < 3) machine.report("setmaxnreg", "the warp belongs to no whole warpgroup of four warps");
}

bool get(RegisterPool& pool, const Warp& warp, int count) {
  const int wanted = count - pool.owned[warp.id];
  if (wanted > pool.available) return false;
  pool.available -= wanted;
  pool.owned[warp.id] = count;
  return true;
}

void release(RegisterPool& pool, const Warp& warp, int count) {
  pool.available += pool.owned[warp.id] - count;
  pool.owned[warp.id] = count;
  for (size_t k = 0; k < pool.waiting.size();) {
    const RegisterPool::Waiting next = pool.waiting[k];
    if (get(pool, *next.warp, next.count)) {
      next.warp->state = State::kRunning;
      pool.waiting.erase(pool.waiting.begin() + static_cast<long>(k));
    } else {
      ++k;
    }
  }
}

// a: the action
void setmaxnreg(Machine& machine, Warp& warp, const Instruction& i, Lanes) {
  RegisterPool& pool = pool_of(*warp.block);
  check_warpgroup(machine, warp, pool);
  RegisterPool::Step step{machine.pc, {}};
  FOR_LANES step.times[l] = warp.own[l] + 1;
  pool.steps[warp.id].push_back(step);
  if (warp.block->grid->launch->registers == 0) {  // then it may have no effect
    if (machine.options.races > 1)
      machine.report("setmaxnreg", "without .maxnreg, or .maxntid with .minnctapersm, it may have no effect");
    return;
  }
  const int count = static_cast<int>(i.at(0).value), owned = pool.owned[warp.id];
  if (i.a == kDec ? owned < count : owned > count) {
    machine.report("setmaxnreg", format("the warp has %d registers a thread", owned));
  } else if (i.a == kDec) {
    release(pool, warp, count);
  } else if (!get(pool, warp, count)) {
    pool.waiting.push_back({&warp, count});
    warp.state = State::kAtRegisters;
    warp.waiting_at = machine.pc;
  }
}

}  // namespace

void check_register_exit(Machine& machine, Warp& warp) {
  if (!warp.block->register_pool) return;
  const auto& steps = warp.block->register_pool->steps;
  for_others(warp, [&](const Warp& other) {
    if (steps[other.id].size() > steps[warp.id].size())
      machine.report("setmaxnreg", format("warp %d exits without one that warp %d executed", warp.id, other.id));
  });
}

void decode_setmaxnreg(Modifiers& m, Instruction& i) {
  i.a = m.any({"inc", "dec"});
  if (i.a < 0 || !m.take("sync") || !m.take("aligned") || m.type() != kU32) m.refuse();
  expect_operands(m, i, "i");
  const s64 count = i.at(0).value;
  if (count < kFewest || count > kMost || count % 8 != 0) m.refuse("the count is a multiple of 8 from 24 to 256");
  i.convergence = Convergence::kAligned;
  i.handler = setmaxnreg;
}

}  // namespace fused_resnet::ptx
