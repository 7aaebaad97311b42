// What the four warps of a warpgroup do together in wgmma.
#pragma once

#include <functional>

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

// One wgmma instruction as the first warp of the warpgroup issued it.
struct Issue {
  int pc;
  u64 a = 0, b = 0;  // descriptors of wgmma.mma_async
  bool scale_d = false;
};

struct Warpgroup {
  u64 first = 0;  // the number of issues[0]; those before it all warps have issued
  std::deque<Issue> issues;
  struct Waiting {
    Warp* warp;
    u64 issues;  // that all warps must have issued
    std::function<void()> then;
  };
  std::vector<Waiting> waiting;
};

template <class F>
void for_warpgroup(Warp& warp, F f) {
  const int first = warp.id / 4 * 4;
  for (int id = first; id < first + 4 && id < warp.block->num_warps; ++id) f(*warp.block->warps[id]);
}

// Notes an instruction of wgmma: all four warps must issue the same ones, with the same descriptors (PTX
// ISA 9.7.15.5.2).
void issue(Machine& machine, Warp& warp, const Issue& what);
// Does `then` once all four warps have issued that many instructions of wgmma, and lets the warp wait till then.
void when_issued(Machine& machine, Warp& warp, u64 issues, std::function<void()> then);
// All lanes of a warp have exited: the others need not wait for it.
void leave_warpgroup(Machine& machine, Warp& warp);

}  // namespace fused_resnet::ptx
