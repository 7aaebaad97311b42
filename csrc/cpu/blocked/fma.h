// The micro-kernels of fused multiply-adds: a tile of up to kMaxRows pixels x kHalves halves of a panel at a time, in
// fp32. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blocked/convolution.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

// kSteps: the k steps of weights that stay in the first-level cache while all tiles of a block pass.
template <int kVectorLanes, int kHalves, int kMaxRows, int kSteps, int kTilesOfBlock>
class FmaKernel {
 public:
  static constexpr int kTiles = 1, kBlock = kTilesOfBlock, kSumsOfHalf = kMaxRows * kHalf, kLanes = kVectorLanes;

  explicit FmaKernel(int rows) : rows_(rows) {}

  FUSED_RESNET_INLINE void multiply(const Convolution& c, const Block<kBlock>& block, const char* weights,
                                    float* sums) {
    for (int s = 0; s < c.num_segments; ++s) {
      const Segment& segment = c.segments[s];
      for (int64_t step = 0; step < segment.steps; step += kSteps) {
        const int64_t steps = std::min<int64_t>(kSteps, segment.steps - step);
        Part part{segment.offsets + step, steps, segment.stride_w * kChannels, s == 0 && step == 0};
        for (int half = 0; half < 2; half += kHalves) {
          part.to_next_weights = half + kHalves < 2 ? kHalfBytes : steps * kStepBytes - half * kHalfBytes;
          for (int64_t t = 0; t < block.num_tiles; ++t) {
            const char* a = block.a[s][t];
            part.to_next_tile = block.a[s][std::min(t + 1, block.num_tiles - 1)] - a;
            part.line_begin = t * kLinesOfStep / block.num_tiles;
            part.line_end = (t + 1) * kLinesOfStep / block.num_tiles;
            add_rows<kMaxRows>(part, a, weights + half * kHalfBytes, sums + (2 * t + half) * kSumsOfHalf);
          }
        }
        weights += steps * kStepBytes;
      }
    }
  }

 private:
  static constexpr int64_t kChannels = kPixelBytes / sizeof(float);  // of a k step
  static constexpr int kPerHalf = kHalf / kLanes, kWide = kHalves * kPerHalf;
  using V = typename Lanes<kLanes>::Vector;

  static constexpr int64_t kLine = 64, kLinesOfStep = kHalves * kHalfBytes / kLine;

  // Some k steps of a tile, and what it fetches meanwhile: the next tile's pixels, which lie in as many places as there
  // are steps, and its part of the next weights. A 3x3 of 512 channels on 7x7 pixels went from 28 to 47 GFLOP/s by the
  // latter (EPYC Zen 3 under other load, CPU time, 2026-11).
  struct Part {
    const int64_t* offsets;
    int64_t steps, stride;                          // stride: floats between the pixels of a tile
    bool is_first;                                  // the sums begin here
    int64_t to_next_tile = 0, to_next_weights = 0;  // bytes
    int64_t line_begin = 0, line_end = 0;           // of the next weights of each step
  };

  // All rows of a tile are summed in registers, so that their number is a constant.
  template <int kRows>
  FUSED_RESNET_INLINE void add_rows(const Part& part, const char* a, const char* weights, float* sums) {
    if constexpr (kRows > 0) {
      if (rows_ == kRows) return add_part<kRows>(part, a, weights, sums);
      add_rows<kRows - 1>(part, a, weights, sums);
    }
  }

  template <int kRows>
  static FUSED_RESNET_INLINE void add_part(const Part& part, const char* a, const char* weights, float* sums) {
    V total[kRows][kWide];
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWide; ++j) {
        total[r][j] = V{};
        if (!part.is_first) load<kLanes>(sums + place_of(r, j), &total[r][j]);
      }
    }
    for (int64_t step = 0; step < part.steps; ++step, weights += kStepBytes) {
      const char* pixels = a + part.offsets[step];
      fetch<kRows>(part, pixels, weights);
      add_step<kRows>(reinterpret_cast<const float*>(pixels), part.stride, reinterpret_cast<const float*>(weights),
                      total);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWide; ++j) store<kLanes>(total[r][j], sums + place_of(r, j));
    }
  }

  template <int kRows>
  static FUSED_RESNET_INLINE void fetch(const Part& part, const char* pixels, const char* weights) {
    const int64_t row_bytes = part.stride * static_cast<int64_t>(sizeof(float));
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(pixels + part.to_next_tile + r * row_bytes);
    for (int64_t line = part.line_begin; line < part.line_end; ++line) {
      __builtin_prefetch(weights + part.to_next_weights + line * kLine);
    }
  }

  static constexpr int place_of(int row, int vector) {
    return vector / kPerHalf * kSumsOfHalf + row * kHalf + vector % kPerHalf * kLanes;
  }

  template <int kRows>
  static FUSED_RESNET_INLINE void add_step(const float* a, int64_t stride, const float* weights,
                                           V (&total)[kRows][kWide]) {
    for (int64_t channel = 0; channel < kChannels; ++channel, weights += kHalf) {
      V b[kWide];
      for (int j = 0; j < kWide; ++j) {
        load<kLanes>(weights + j / kPerHalf * (kHalfBytes / 4) + j % kPerHalf * kLanes, &b[j]);
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
