// Whose turn it is, when asynchronous copies land, and what it means when nobody can go on.
#include <algorithm>

#include "ptx/machine/operands.h"
#include "ptx/tensor_cores/wgmma.h"

namespace fused_resnet::ptx {
namespace {

enum Schedule : s32 { kRandomTurns, kInTurn, kGreedy, kBackwards };
enum Landing : s32 { kLate, kEarly, kRandomly };

constexpr int kSpinning = 16;       // after so many vain polls a warp counts as waiting
constexpr int kHopeless = 1 << 14;  // after so many by every warp, with nothing pending, as waiting forever

std::string lanes_at(const Warp& warp, const std::vector<Instruction>& program) {
  std::string text;
  Lanes left = warp.alive;
  while (left != 0) {
    const u32 pc = warp.pcs[__builtin_ctz(left)];
    Lanes here = 0;
    FOR_ACTIVE(left) if (warp.pcs[l] == pc) here |= 1u << l;
    left &= ~here;
    text += format(" lanes %#x at line %d,", here, pc < program.size() ? program[pc].line : -1);
  }
  return text;
}

std::string state_of(const Warp& warp) {
  const auto& program = warp.block->grid->program->instructions;
  const int line =
      warp.waiting_at >= 0 && warp.waiting_at < static_cast<int>(program.size()) ? program[warp.waiting_at].line : -1;
  std::string text = format("\n    block %u warp %d", warp.block->index, warp.id);
  switch (warp.state) {
    case State::kAtBarrier:
      text += format(" waits at a barrier, line %d", line);
      break;
    case State::kAtCluster:
      text += format(" waits at barrier.cluster, line %d", line);
      break;
    case State::kAtGrid:
      text += format(" waits for the grid before, line %d", line);
      break;
    case State::kAtWarpgroup:
      text +=
          format(" waits at wgmma.wait_group for warps of its warpgroup that have not issued the same, line %d", line);
      break;
    case State::kAtRegisters:
      text += format(" waits at setmaxnreg.inc for registers that no warp releases, line %d", line);
      break;
    case State::kAtMbarrier: {
      text += format(" waits at the mbarrier at shared %u for parity %u, line %d", warp.wait_address, warp.wait_parity,
                     line);
      const auto found = warp.block->mbarriers.find(warp.wait_address);
      if (found != warp.block->mbarriers.end())
        text += format(" (phase %u, %lld arrivals and %lld bytes are missing)", found->second.phase,
                       static_cast<long long>(found->second.pending), static_cast<long long>(found->second.bytes));
      break;
    }
    default:
      text += warp.diverged ? " polls:" + lanes_at(warp, program)
                            : format(" polls, line %d", program[std::min<size_t>(warp.pc, program.size() - 1)].line);
  }
  return text;
}

}  // namespace

void check_exit(Machine& machine, Warp& warp, Lanes exiting) {
  check_copies_at_exit(machine, warp, exiting);
  if (warp.alive != 0) return;
  check_wgmma_exit(machine, warp);
  check_register_exit(machine, warp);
}

void Machine::run() {
  start();
  while (!resident.empty()) {
    Warp* next = choose();
    if (next != nullptr) {
      take_turn(*next);
    } else if (!land_one() && !start_another()) {
      deadlock();
    }
    if (!residents_change_) continue;
    residents_change_ = false;
    retire_finished();
    start();
  }
}

// A warp that has given up waiting for a while is chosen only when no other can go on. If all that can go on poll in
// vain, the time of a copy has come, or it never will.
Warp* Machine::choose() {
  const size_t count = warps_.size();
  const size_t first = options.schedule == kRandomTurns ? random(u32(count)) : turn_ % count;
  const bool backwards = options.schedule == kBackwards;
  Warp* spinning = nullptr;
  int fewest = kHopeless;
  for (size_t k = 0; k < count; ++k) {
    const size_t index = backwards ? (first + count - k) % count : (first + k) % count;
    Warp& one = *warps_[index];
    if (!can_go_on(one)) continue;
    if (one.failed_waits < kSpinning) {
      turn_ = backwards ? index + count - 1 : index + 1;
      return &one;
    }
    fewest = std::min(fewest, one.failed_waits);
    if (spinning == nullptr || one.failed_waits < spinning->failed_waits) spinning = &one;
  }
  if (spinning == nullptr) return nullptr;
  if (!pending.empty()) {
    for (Warp* one : warps_) one->failed_waits = 0;
    return nullptr;
  }
  return fewest >= kHopeless ? nullptr : spinning;
}

bool Machine::can_go_on(Warp& one) {
  switch (one.state) {
    case State::kRunning:
      return true;
    case State::kAtMbarrier: {
      const auto found = one.block->mbarriers.find(one.wait_address);
      if (found != one.block->mbarriers.end() && found->second.alive && (found->second.phase & 1) == one.wait_parity)
        return false;
      one.state = State::kRunning;
      return true;
    }
    case State::kAtGrid:
      return grid_wait_is_over(*this, one);
    default:
      return false;  // whoever completes the barrier sets the warp running
  }
}

void Machine::take_turn(Warp& one) {
  const u32 quantum = options.schedule == kRandomTurns ? 1 + random(64) : options.schedule == kInTurn ? 1 : ~0u;
  yields = false;
  for (u32 k = 0; k < quantum && one.state == State::kRunning; ++k) {
    step(one);
    if (++steps_ > options.max_steps)
      fault("too long", format("more than %llu warp instructions", (unsigned long long)options.max_steps));
    if (!pending.empty()) land_in_time();
    if (!yields) continue;
    ++one.failed_waits;
    yields = false;
    return;
  }
}

void Machine::land_in_time() {
  if (options.landing == kEarly)
    while (land_one()) {
    }
  else if (options.landing == kRandomly && chance(8))
    land_one();
}

bool Machine::land_one() {
  if (pending.empty()) return false;
  const u32 index = random(static_cast<u32>(pending.size()));
  const std::shared_ptr<BulkCopy> copy = pending[index];
  pending.erase(pending.begin() + index);
  land(*this, *copy);
  return true;
}

void Machine::deadlock() {
  std::string all = "nobody can go on";
  const Warp* last = nullptr;
  for (const Warp* one : warps_) {
    if (one->state == State::kDone) continue;
    all += state_of(*one);
    last = one;
  }
  warp = const_cast<Warp*>(last);
  fault("deadlock", all, last == nullptr ? -1 : last->waiting_at);
}

}  // namespace fused_resnet::ptx
