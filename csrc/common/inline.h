// How small functions are declared: FUSED_RESNET_HD for the host and for CUDA devices, without CUDA headers, and
// FUSED_RESNET_INLINE for the host where a call would leave the caller's instruction set.
#pragma once

#if defined(__CUDACC__)
#define FUSED_RESNET_HD __host__ __device__ __forceinline__
#else
#define FUSED_RESNET_HD inline
#endif

#define FUSED_RESNET_INLINE inline __attribute__((always_inline))
