// Division by a number that is known before the kernel runs.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace fused_resnet {

// Division by a run-time constant as one high multiplication (Granlund and Montgomery 1994), for 0 <= n < 2^31.
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  FUSED_RESNET_HD uint32_t divide(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
#endif
    return (high + n) >> shift;  // high <= n < 2^31: the sum does not overflow
  }
};

}  // namespace fused_resnet
