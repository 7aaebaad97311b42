// The dtypes of activations, and the one of them that C++17 and CUDA's language lack without headers: bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace fused_resnet {

// How an element is stored. The numbers are ours; the operators translate torch's.
enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// fp32 as its bits, rounded to the upper half: to the nearest, ties to even. NaN is treated by itself, since rounding
// could carry it to infinity. Works on one value and on vectors of values, which go by reference: passed by value they
// would be part of an ABI that depends on the instruction set.
template <class Float, class Bits>
FUSED_RESNET_INLINE void round_to_bfloat16(const Float& value, const Bits& bits, Bits* rounded) {
  const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet = Bits{} + 0x7fc0;
  *rounded = value != value ? quiet : nearest;
}

// bfloat16 as its bits, so that compilers vectorise the conversions. On GPUs with the instructions that CUDA's own type
// has, whose header is not for the host.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;

  FUSED_RESNET_HD explicit BFloat16(float value) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    uint32_t wide, rounded;
    std::memcpy(&wide, &value, 4);
    round_to_bfloat16(value, wide, &rounded);
    bits = static_cast<uint16_t>(rounded);
#endif
  }

  FUSED_RESNET_HD explicit operator float() const {
    float value;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("cvt.f32.bf16 %0, %1;" : "=f"(value) : "h"(bits));
#elif defined(__CUDA_ARCH__)
    asm("mov.b32 %0, {0, %1};" : "=f"(value) : "h"(bits));
#else
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    std::memcpy(&value, &wide, 4);
#endif
    return value;
  }
};

}  // namespace fused_resnet
