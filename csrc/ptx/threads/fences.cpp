// Fences (PTX ISA 9.7.13.4: membar and fence).
#include "ptx/threads/fences.h"

#include "ptx/copies/tensor_maps.h"
#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

enum Spaces : s32 { kAll, kGlobal, kShared };

// fence.sc, .acq_rel, .acquire, .release; membar. a: whether it reaches other blocks.
void fence(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) machine.fence(warp, l, i.a != 0);
}

// What the lane did and has seen through the generic proxy, the async proxy sees from now on, and no more: what other
// lanes did is covered only as far as the lane is ordered after it. b: Spaces
void fence_async(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) {
    const Time time = machine.publish(warp, l);
    Views& views = warp.views[l];
    if (i.b != kGlobal) {
      views.async.join(views.generic);
      views.async.add(warp.agent(l), time);
    }
    if (i.b != kShared) {
      views.async_global.join(views.generic);
      views.async_global.add(warp.agent(l), time);
    }
  }
}

// Orders the thread's own mbarrier.init before what other threads of the cluster do with the mbarrier, and nothing
// else.
void fence_mbarrier_init(Machine&, Warp& warp, const Instruction&, Lanes mask) {
  for (auto& [address, barrier] : warp.block->mbarriers) {
    FOR_ACTIVE(mask) if (barrier.made_by == warp.agent(l)) barrier.is_fenced = true;
    barrier.fenced_in = warp.block->cluster->phase;
  }
}

void nothing(Machine&, Warp&, const Instruction&, Lanes) {}

void take_scope(Modifiers& m, Instruction& i) {
  const int scope = m.any({"cta", "cluster", "gpu", "sys"});
  if (scope < 0) m.refuse("no scope");
  i.a = scope >= 2;
}

void decode_proxy(Modifiers& m, Instruction& i) {
  if (m.take("alias")) {  // two virtual addresses of one location do not occur here
    i.handler = nothing;
    return;
  }
  i.handler = fence_async;
  // one direction only (PTX ISA 8.6), between a block's shared memory and its cluster's
  if (m.take("async::generic")) {
    if (m.any({"acquire", "release"}) < 0) m.refuse();
    if (m.any({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"}) < 0 || !m.take("cluster")) m.refuse();
    i.b = kShared;
    return;
  }
  if (!m.take("async")) m.refuse("only the proxies async and alias are known");
  i.b = m.take("global") ? kGlobal : m.any({"shared::cta", "shared::cluster"}) >= 0 ? kShared : kAll;
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
    i.a = level > 0;
  } else if (m.take("mbarrier_init")) {
    if (!m.take("release") || !m.take("cluster")) m.refuse();
    i.handler = fence_mbarrier_init;
  } else {
    i.handler = fence;
    m.any({"sc", "acq_rel", "acquire", "release"});
    m.any({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
    take_scope(m, i);
  }
}

}  // namespace fused_resnet::ptx
