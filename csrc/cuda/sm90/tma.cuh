// What sm_90 copies by itself: mbarriers, tensor copies; and how a block's warpgroups meet and share registers.
#pragma once

#include <cstdint>

#include "cuda/sm80/instructions.cuh"

namespace fused_resnet {
namespace sm90 {

// A tensor map's 128 bytes, as the driver encodes them.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What this thread wrote to shared memory, barriers too, is there for copies and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier's address in the block of this rank of the cluster.
__device__ __forceinline__ uint32_t address_in_block(uint32_t barrier, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(barrier), "r"(rank));
  return address;
}

// This thread's barriers are there for the cluster, once it has met.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// All threads of all blocks of the cluster meet.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred is_complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 is_complete, [%0], %1;\n"
      "@!is_complete bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// As wait_barrier, for arrivals from other blocks too.
__device__ __forceinline__ void wait_cluster_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred is_complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 is_complete, [%0], %1;\n"
      "@!is_complete bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// address: as address_in_block has it.
__device__ __forceinline__ void arrive_in_block(uint32_t address) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A box at these coordinates, innermost first. Its bytes arrive at the barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// The box goes to the same place in each of these blocks of the cluster, and its bytes arrive at the barrier there.
__device__ __forceinline__ void copy_box_to_blocks(uint32_t to, const TensorMap& map, int x, int y, int z,
                                                   uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(blocks)
      : "memory");
}

// Channels from c on, of the pixels whose windows begin at (n, h, w) and after, at the tap (tap_h, tap_w) of each.
__device__ __forceinline__ void copy_pixels(uint32_t to, const TensorMap& map, int c, int w, int h, int n, int tap_w,
                                            int tap_h, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(to),
      "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(barrier), "h"(static_cast<uint16_t>(tap_w)),
      "h"(static_cast<uint16_t>(tap_h))
      : "memory");
}

// All 128 threads of a warpgroup meet; id: 1 to 15.
__device__ __forceinline__ void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A box of shared memory to these coordinates of a tensor, by this thread. What lies outside is not written.
__device__ __forceinline__ void store_box(const TensorMap& map, int x, int y, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
               "r"(y), "r"(from)
               : "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's stores have read shared memory, which may then be written again.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until they are complete.
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace sm90
}  // namespace fused_resnet
