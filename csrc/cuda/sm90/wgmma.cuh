// Products of a warpgroup: wgmma, and the matrices in shared memory that it reads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/sm80/instructions.cuh"

namespace fused_resnet {
namespace sm90 {

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
template <class S, int kCount>
__device__ __forceinline__ void pin(S (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<S, float>) {
      asm volatile("" : "+f"(d[i])::"memory");
    } else {
      asm volatile("" : "+r"(d[i])::"memory");
    }
  }
}

// d (64 x kN) += a (64 x 32 bytes) * b (32 bytes x kN) of a warpgroup, fp32 sums, of bytes exact; kN = 2 * kCount.
#define FUSED_RESNET_SUMS_8(SUM, i) \
  SUM(d[i]), SUM(d[i + 1]), SUM(d[i + 2]), SUM(d[i + 3]), SUM(d[i + 4]), SUM(d[i + 5]), SUM(d[i + 6]), SUM(d[i + 7])
#define FUSED_RESNET_SUMS_32(SUM, i)                                                              \
  FUSED_RESNET_SUMS_8(SUM, i), FUSED_RESNET_SUMS_8(SUM, i + 8), FUSED_RESNET_SUMS_8(SUM, i + 16), \
      FUSED_RESNET_SUMS_8(SUM, i + 24)

#define FUSED_RESNET_WGMMA_64(SUM, TYPES, SCALES)                                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64" TYPES                                                        \
               " "                                                                                                \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                                         \
               "%32, %33, 1" SCALES ";"                                                                           \
               : FUSED_RESNET_SUMS_32(SUM, 0)                                                                     \
               : "l"(a), "l"(b))

#define FUSED_RESNET_WGMMA_128(SUM, TYPES, SCALES)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128" TYPES                                                       \
               " "                                                                                                \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "  \
               "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "  \
               "%59, %60, %61, %62, %63}, "                                                                       \
               "%64, %65, 1" SCALES ";"                                                                           \
               : FUSED_RESNET_SUMS_32(SUM, 0), FUSED_RESNET_SUMS_32(SUM, 32)                                      \
               : "l"(a), "l"(b))

#define FUSED_RESNET_WGMMA_256(SUM, TYPES, SCALES)                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256" TYPES                                                          \
               " "                                                                                                   \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "    \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "     \
               "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "     \
               "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "     \
               "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "     \
               "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
               "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "               \
               "%128, %129, 1" SCALES ";"                                                                            \
               : FUSED_RESNET_SUMS_32(SUM, 0), FUSED_RESNET_SUMS_32(SUM, 32), FUSED_RESNET_SUMS_32(SUM, 64),         \
                 FUSED_RESNET_SUMS_32(SUM, 96)                                                                       \
               : "l"(a), "l"(b))

#define FUSED_RESNET_MULTIPLY(COLUMNS)                                                \
  if constexpr (std::is_same_v<Element, Half>) {                                      \
    FUSED_RESNET_WGMMA_##COLUMNS("+f", "k16.f32.f16.f16", ", 1, 1, 0, 0");            \
  } else if constexpr (std::is_same_v<Element, BFloat16>) {                           \
    FUSED_RESNET_WGMMA_##COLUMNS("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0");          \
  } else if constexpr (std::is_same_v<Element, uint8_t>) {                            \
    FUSED_RESNET_WGMMA_##COLUMNS("+r", "k32.s32.u8.s8", ""); /* the weights are s8 */ \
  } else {                                                                            \
    static_assert(std::is_same_v<Element, int8_t>);                                   \
    FUSED_RESNET_WGMMA_##COLUMNS("+r", "k32.s32.s8.s8", "");                          \
  }

template <class Element, int kCount>
__device__ __forceinline__ void multiply(Sum<Element> (&d)[kCount], uint64_t a, uint64_t b) {
  if constexpr (kCount == 32) {
    FUSED_RESNET_MULTIPLY(64)
  } else if constexpr (kCount == 64) {
    FUSED_RESNET_MULTIPLY(128)
  } else {
    static_assert(kCount == 128);
    FUSED_RESNET_MULTIPLY(256)
  }
}

#undef FUSED_RESNET_MULTIPLY
#undef FUSED_RESNET_WGMMA_256
#undef FUSED_RESNET_WGMMA_128
#undef FUSED_RESNET_WGMMA_64
#undef FUSED_RESNET_SUMS_32
#undef FUSED_RESNET_SUMS_8

}  // namespace sm90
}  // namespace fused_resnet
