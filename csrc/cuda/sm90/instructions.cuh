// The instructions of sm_90a the convolution is written in: mbarriers, tensor copies, wgmma.
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

__device__ __forceinline__ void store_matrices(void* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// A matrix in shared memory whose rows are 128 bytes of the reduction, swizzled by 128 bytes: eight rows are 1024 bytes
// (PTX ISA 9.7.15.5.1, matrix descriptor). The leading offset is not used by this layout.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Before the first wgmma that reads registers or shared memory which this thread wrote.
__device__ __forceinline__ void fence_wgmma() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_wgmma() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of this warpgroup's groups are not complete.
template <int kPending>
__device__ __forceinline__ void wait_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler may not read these registers earlier, or write them later.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64 x kN) += a (64 x 16) * b (16 x kN) of a warpgroup, fp32 sums; kN = 2 * kCount.
template <class Element, int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], uint64_t a, uint64_t b);

#define FUSED_RESNET_SUMS_8(i)                                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FUSED_RESNET_SUMS_32(i) \
  FUSED_RESNET_SUMS_8(i), FUSED_RESNET_SUMS_8(i + 8), FUSED_RESNET_SUMS_8(i + 16), FUSED_RESNET_SUMS_8(i + 24)

#define FUSED_RESNET_WGMMA_64(TYPES)                                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                                     \
               " "                                                                                                     \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                                                   \
               "%32, %33, 1, 1, 1, 0, 0;"                                                                              \
               : FUSED_RESNET_SUMS_32(0)                                                                               \
               : "l"(a), "l"(b))

#define FUSED_RESNET_WGMMA_128(TYPES)                                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES                                                    \
               " "                                                                                                     \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
               "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
               "%62, %63}, "                                                                                           \
               "%64, %65, 1, 1, 1, 0, 0;"                                                                              \
               : FUSED_RESNET_SUMS_32(0), FUSED_RESNET_SUMS_32(32)                                                     \
               : "l"(a), "l"(b))

#define FUSED_RESNET_WGMMA_256(TYPES)                                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES                                                    \
               " "                                                                                                     \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
               "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
               "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "  \
               "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "      \
               "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "      \
               "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "                                   \
               "%128, %129, 1, 1, 1, 0, 0;"                                                                            \
               : FUSED_RESNET_SUMS_32(0), FUSED_RESNET_SUMS_32(32), FUSED_RESNET_SUMS_32(64), FUSED_RESNET_SUMS_32(96) \
               : "l"(a), "l"(b))

template <>
__device__ __forceinline__ void multiply<Half>(float (&d)[32], uint64_t a, uint64_t b) {
  FUSED_RESNET_WGMMA_64("f16.f16");
}

template <>
__device__ __forceinline__ void multiply<Half>(float (&d)[64], uint64_t a, uint64_t b) {
  FUSED_RESNET_WGMMA_128("f16.f16");
}

template <>
__device__ __forceinline__ void multiply<Half>(float (&d)[128], uint64_t a, uint64_t b) {
  FUSED_RESNET_WGMMA_256("f16.f16");
}

template <>
__device__ __forceinline__ void multiply<BFloat16>(float (&d)[32], uint64_t a, uint64_t b) {
  FUSED_RESNET_WGMMA_64("bf16.bf16");
}

template <>
__device__ __forceinline__ void multiply<BFloat16>(float (&d)[64], uint64_t a, uint64_t b) {
  FUSED_RESNET_WGMMA_128("bf16.bf16");
}

template <>
__device__ __forceinline__ void multiply<BFloat16>(float (&d)[128], uint64_t a, uint64_t b) {
  FUSED_RESNET_WGMMA_256("bf16.bf16");
}

#undef FUSED_RESNET_WGMMA_256
#undef FUSED_RESNET_WGMMA_128
#undef FUSED_RESNET_WGMMA_64
#undef FUSED_RESNET_SUMS_32
#undef FUSED_RESNET_SUMS_8

}  // namespace sm90
}  // namespace fused_resnet
