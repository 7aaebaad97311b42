// SiLU, x / (1 + exp(-x)), of fp32 values: one, or a vector of them. No torch here.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace fused_resnet {

// *value = *value / (1 + exp(-*value)), within a few units in the last place, and -0 below -88.4, where the exponential
// leaves fp32. NaN stays, and of -infinity it is NaN, as torch's. Bits: unsigned integers, as many as there are values.
//
// exp(y) = 2^n * exp(r) with |r| <= log(2) / 2 (Cody and Waite), and exp(r) by the polynomial of Cephes' expf.
template <class Bits, class Float>
FUSED_RESNET_INLINE void silu(Float* value) {
  constexpr float kLog2E = 1.44269504f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // the first has 9 bits
  constexpr float kLeast = -88.02969f, kMost = 88.72283f;  // log(2) times -127 and 128: exponents of zero and infinity
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: sums are integers, and n lies in their lowest bits
  const Float x = *value;
  Float y = -x;
  y = y < kLeast ? Float{} + kLeast : y;
  y = y > kMost ? Float{} + kMost : y;
  const Float shifted = y * kLog2E + kShift, n = shifted - kShift;
  Float r = y - n * kLog2High;
  r -= n * kLog2Low;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  *value = x / (1.f + p * scale);
}

}  // namespace fused_resnet
