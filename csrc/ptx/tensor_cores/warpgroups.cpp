// Warpgroups: four warps, the first one's number a multiple of four (PTX ISA 9.7.15.1).
#include "ptx/tensor_cores/warpgroups.h"

#include <algorithm>

namespace fused_resnet::ptx {
namespace {

Warpgroup& group_of(Machine& machine, Warp& warp) {
  std::shared_ptr<Warpgroup>& group = warp.block->warpgroups[warp.id / 4];
  if (group) return *group;
  int warps = 0;
  for_warpgroup(warp, [&warps](Warp&) { ++warps; });
  if (warps < 4) machine.fault("warpgroup", format("warp %d belongs to no whole warpgroup of four warps", warp.id));
  group = std::make_shared<Warpgroup>();
  return *group;
}

// How many instructions all warps have issued that are still there.
u64 issued_by_all(Warp& warp) {
  u64 least = ~u64(0);
  for_warpgroup(warp, [&least](Warp& other) {
    if (other.alive != 0) least = std::min(least, other.wgmma_issued);
  });
  return least;
}

void go_on(Warpgroup& group, Warp& warp) {
  const u64 issued = issued_by_all(warp);
  while (!group.issues.empty() && group.first < issued) {
    group.issues.pop_front();
    ++group.first;
  }
  std::vector<Warpgroup::Waiting> ready;
  auto& waiting = group.waiting;
  for (size_t i = 0; i < waiting.size();) {
    if (waiting[i].issues <= issued) {
      ready.push_back(std::move(waiting[i]));
      waiting.erase(waiting.begin() + i);
    } else {
      ++i;
    }
  }
  for (const Warpgroup::Waiting& one : ready) {
    one.warp->state = State::kRunning;
    one.then();
  }
}

}  // namespace

void issue(Machine& machine, Warp& warp, const Issue& what) {
  Warpgroup& group = group_of(machine, warp);
  const u64 position = warp.wgmma_issued - group.first;
  if (position >= group.issues.size()) {
    for_warpgroup(warp, [&](Warp& other) {
      if (other.alive == 0) machine.report("warpgroup", format("warp %d has exited without it", other.id));
    });
    group.issues.push_back(what);
  } else {
    const Issue& theirs = group.issues[position];
    if (theirs.pc != what.pc) {
      machine.report("warpgroup", "another warp of the warpgroup issued " + machine.where(theirs.pc));
    } else if (theirs.a != what.a || theirs.b != what.b) {
      machine.report("warpgroup", "the warps of the warpgroup have different descriptors");
    } else if (theirs.scale_d != what.scale_d) {
      machine.report("warpgroup", "the warps of the warpgroup have different values of scale-d");
    }
  }
  ++warp.wgmma_issued;
  go_on(group, warp);
}

void when_issued(Machine& machine, Warp& warp, u64 issues, std::function<void()> then) {
  if (issued_by_all(warp) >= issues) return then();
  group_of(machine, warp).waiting.push_back({&warp, issues, std::move(then)});
  warp.state = State::kAtWarpgroup;
  warp.waiting_at = machine.pc;
}

void leave_warpgroup(Machine& machine, Warp& warp) {
  const std::shared_ptr<Warpgroup> group = warp.block->warpgroups[warp.id / 4];
  if (!group) return;
  if (warp.wgmma_issued < group->first + group->issues.size())
    machine.report("warpgroup", format("warp %d exits without a wgmma instruction that others issued", warp.id));
  go_on(*group, warp);
}

}  // namespace fused_resnet::ptx
