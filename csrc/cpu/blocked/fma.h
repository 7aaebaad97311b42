// The micro-kernels of fused multiply-adds: a tile of up to kMaxRows pixels x kHalves halves of a panel at a time, in
// fp32. No torch here.
#pragma once

#include <cstdint>

#include "cpu/blocked/convolution.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

template <int kVectorLanes, int kHalves, int kMaxRows>
class FmaKernel {
 public:
  static constexpr int kTiles = 1, kLanes = kVectorLanes;

  explicit FmaKernel(int rows) : rows_(rows) {}

  FUSED_RESNET_INLINE void multiply(const Convolution& c, const Operands<kTiles>& operands, float* sums) {
    for (int half = 0; half < 2; half += kHalves) {
      multiply_rows<kMaxRows>(c, operands, half * kHalfBytes, sums + half * (kSumsOfTile / 2));
    }
  }

 private:
  static constexpr int64_t kChannels = kPixelBytes / sizeof(float);  // of a k step
  static constexpr int kPerHalf = kHalf / kLanes, kWide = kHalves * kPerHalf;
  using V = typename Lanes<kLanes>::Vector;

  // All rows of a tile are summed in registers, so that their number is a constant.
  template <int kRows>
  FUSED_RESNET_INLINE void multiply_rows(const Convolution& c, const Operands<kTiles>& operands, int64_t half_bytes,
                                         float* sums) {
    if constexpr (kRows > 0) {
      if (rows_ == kRows) return multiply_exactly<kRows>(c, operands, half_bytes, sums);
      multiply_rows<kRows - 1>(c, operands, half_bytes, sums);
    }
  }

  template <int kRows>
  static FUSED_RESNET_INLINE void multiply_exactly(const Convolution& c, const Operands<kTiles>& operands,
                                                   int64_t half_bytes, float* sums) {
    V total[kRows][kWide];
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWide; ++j) total[r][j] = V{};
    }
    const char* weights = operands.weights + half_bytes;
    for (int s = 0; s < c.num_segments; ++s) {
      const Segment& segment = c.segments[s];
      const int64_t stride = segment.stride_w * kChannels;
      for (int64_t step = 0; step < segment.steps; ++step, weights += kStepBytes) {
        const auto* a = reinterpret_cast<const float*>(operands.a[s][0] + segment.offsets[step]);
        add_step<kRows>(a, stride, reinterpret_cast<const float*>(weights), total);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWide; ++j) {
        store<kLanes>(total[r][j], sums + (j / kPerHalf) * (kSumsOfTile / 2) + r * kHalf + j % kPerHalf * kLanes);
      }
    }
  }

  template <int kRows>
  static FUSED_RESNET_INLINE void add_step(const float* a, int64_t stride, const float* weights,
                                           V (&total)[kRows][kWide]) {
    for (int64_t channel = 0; channel < kChannels; ++channel, weights += kHalf) {
      V b[kWide];
      for (int j = 0; j < kWide; ++j) {
        load<kLanes>(weights + (j / kPerHalf) * (kHalfBytes / 4) + j % kPerHalf * kLanes, &b[j]);
      }
      for (int r = 0; r < kRows; ++r) {
        const float value = a[r * stride + channel];
        for (int j = 0; j < kWide; ++j) total[r][j] += value * b[j];
      }
    }
  }

  int rows_;
};

}  // namespace blocked
}  // namespace fused_resnet
