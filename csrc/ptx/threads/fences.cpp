// Fences (PTX ISA 9.7.13.4: membar and fence).
#include "ptx/threads/fences.h"

#include "ptx/copies/tensor_maps.h"
#include "ptx/machine/operands.h"
#include "ptx/memory/places.h"

namespace fused_resnet::ptx {
namespace {

enum Spaces : s32 { kEverywhere, kInGlobal, kInShared };
enum Sides : s32 { kAcquires = 1, kReleases = 2 };

// fence.sc, .acq_rel, .acquire, .release; membar. a: Sides.
void fence(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) machine.fence(warp, l, static_cast<Scope>(i.scope), i.a & kAcquires, i.a & kReleases);
}

// What the lane did and has seen through the generic proxy, the async proxy sees from now on, and no more: what other
// lanes did is covered only as far as the lane is ordered after it. b: Spaces
void fence_async(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) {
    const Time time = machine.publish(warp, l);
    Views& views = warp.views[l];
    if (i.b != kInGlobal) {
      views.async.join(views.generic);
      views.async.add(warp.agent(l), time);
    }
    if (i.b != kInShared) {
      views.async_global.join(views.generic);
      views.async_global.add(warp.agent(l), time);
    }
  }
}

// Orders the thread's own mbarrier.init before what other threads of the cluster do with the mbarrier, and nothing
// else.
void fence_mbarrier_init(Machine&, Warp& warp, const Instruction&, Lanes mask) {
  for (auto& [address, barrier] : warp.block->mbarriers) {
    const u32 lane = u32(barrier.made_by) - warp.agent(0);
    if (lane >= u32(kLanes) || !(mask >> lane & 1) || barrier.is_fenced) continue;
    barrier.is_fenced = true;
    barrier.fenced_in = warp.block->cluster->phase;
  }
}

void nothing(Machine&, Warp&, const Instruction&, Lanes) {}

// .release of what is the block's own, .acquire of what is the cluster's, both at .cluster.
void expect_restriction(Modifiers& m, bool acquires, bool releases) {
  const bool is_own = m.take("sync_restrict::shared::cta");
  if (!is_own && !m.take("sync_restrict::shared::cluster")) return;
  if (is_own ? acquires || !releases : releases || !acquires) m.refuse(".sync_restrict");
  if (!m.peek("cluster")) m.refuse(".sync_restrict without .cluster");
}

void decode_proxy(Modifiers& m, Instruction& i) {
  if (m.take("alias")) {  // two virtual addresses of one location do not occur here
    i.handler = nothing;
    return;
  }
  i.handler = fence_async;
  // one direction only (PTX ISA 8.6), between a block's shared memory and its cluster's
  if (m.take("async::generic")) {
    const int side = m.any({"acquire", "release"});
    if (side < 0 || !m.peek(side == 0 ? "sync_restrict::shared::cluster" : "sync_restrict::shared::cta")) m.refuse();
    expect_restriction(m, side == 0, side == 1);
    m.take("cluster");
    i.b = kInShared;
    return;
  }
  if (!m.take("async")) m.refuse("only the proxies async and alias are known");
  i.b = m.take("global") ? kInGlobal : m.any({"shared::cta", "shared::cluster"}) >= 0 ? kInShared : kEverywhere;
}

}  // namespace

void decode_fence(Modifiers& m, Instruction& i) {
  if (m.peek("tensormap::generic")) return decode_tensormap_fence(m, i);
  expect_operands(m, i, "");
  if (m.take("proxy")) {
    decode_proxy(m, i);
  } else if (m.name() == "membar") {
    i.handler = fence;
    const int level = m.any({"cta", "gl", "sys"});
    if (level < 0) m.refuse("no level");
    i.a = kAcquires | kReleases;
    i.scope = static_cast<u8>(level == 0 ? Scope::kCta : Scope::kGpu);
  } else if (m.take("mbarrier_init")) {
    if (!m.take("release") || !m.take("cluster")) m.refuse();
    i.handler = fence_mbarrier_init;
  } else {
    i.handler = fence;
    const int order = m.any({"sc", "acq_rel", "acquire", "release"});
    i.a = order == 2 ? kAcquires : order == 3 ? kReleases : kAcquires | kReleases;
    // what is restricted to shared memory orders all here
    expect_restriction(m, order == 2, order == 3);
    i.scope = static_cast<u8>(take_scope(m));
    if (i.scope == 0) m.refuse("no scope");
  }
}

}  // namespace fused_resnet::ptx
