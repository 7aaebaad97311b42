// What asynchronous copies need of mbarriers (PTX ISA 9.7.13.15), and the addresses that both take.
#pragma once

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {

constexpr s64 kMaxMbarrierCount = (1 << 20) - 1;  // of arrivals and of bytes, PTX ISA 9.7.13.15.2

enum Space : s32 { kGenericSpace, kSharedCta, kSharedCluster };

// Takes .shared, .shared::cta or .shared::cluster.
Space take_shared_space(Modifiers& modifiers);
// Whose shared memory an address means. Faults if none, or if another block's where only the own one is allowed.
SharedPlace place_of(Machine& machine, Warp& warp, Space space, u64 address);
// The mbarrier there. Faults if there is none, reports if the lane has not synchronised with its initialisation.
Mbarrier& live_mbarrier(Machine& machine, Warp& warp, int lane, const SharedPlace& place);

// complete-tx by the system: the bytes of a copy have arrived. Orders nothing of whoever issued the copy.
void complete_bytes(Machine& machine, Mbarrier& barrier, s64 bytes);
// arrive-on by the system, when a thread's cp.async copies are over. Releases nothing of the thread.
void arrive_alone(Machine& machine, Mbarrier& barrier);
// When what completes on the mbarrier now was written, in the name of its agent.
inline Time time_of(const Mbarrier& barrier) {
  return barrier.phase + 1;
}

}  // namespace fused_resnet::ptx
