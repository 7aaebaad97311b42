// The instructions of sm_80 the kernels are written in.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"

namespace fused_resnet {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 or 8 bytes from global to shared memory past the registers; zeros, and no read, when !is_valid. Eight leave the
// rest of their line in L1, where the next tap or group finds it; past L1 the instruction takes only sixteen.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_valid) {
  static_assert(kBytes == 16 || kBytes == 8);
  const int num_bytes = is_valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(num_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(num_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are still on their way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// Fragments as the tensor core wants them: fp32 is rounded to TF32 here, since the hardware would truncate it.
template <class Element>
__device__ __forceinline__ void prepare_fragment(uint32_t (&)[4]) {}

template <>
__device__ __forceinline__ void prepare_fragment<float>(uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(__uint_as_float(r[i])));
}

#define FUSED_RESNET_MMA(SHAPE_AND_TYPES, SUM)                   \
  asm volatile("mma.sync.aligned." SHAPE_AND_TYPES               \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
               "{%0, %1, %2, %3};"                               \
               : SUM(d[0]), SUM(d[1]), SUM(d[2]), SUM(d[3])      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d (16 x 8) += a (16 x 32 bytes) * b (32 bytes x 8), fp32 accumulation; of bytes exact.
template <class Element>
__device__ __forceinline__ void multiply_accumulate(Sum<Element> (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                    uint32_t b1);

template <>
__device__ __forceinline__ void multiply_accumulate<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                          uint32_t b1) {
  FUSED_RESNET_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
}

template <>
__device__ __forceinline__ void multiply_accumulate<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                              uint32_t b1) {
  FUSED_RESNET_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
}

template <>
__device__ __forceinline__ void multiply_accumulate<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
  FUSED_RESNET_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", "+f");
}

// The weights are s8.
template <>
__device__ __forceinline__ void multiply_accumulate<uint8_t>(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                             uint32_t b1) {
  FUSED_RESNET_MMA("m16n8k32.row.col.s32.u8.s8.s32", "+r");
}

template <>
__device__ __forceinline__ void multiply_accumulate<int8_t>(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  FUSED_RESNET_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
}

#undef FUSED_RESNET_MMA

}  // namespace fused_resnet
