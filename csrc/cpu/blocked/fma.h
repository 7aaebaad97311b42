// The micro-kernels of vector instructions: a tile of up to kMaxRows pixels x kHalves halves of a panel at a time. No
// torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/blocked/convolution.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

// What is multiplied: 32 bits of a pixel, the same for all outputs, with as many of each output's weights. They are one
// channel in fp32, a pair of them in bf16.
struct Fp32Products {
  template <class V>
  using Spread = float;

  static FUSED_RESNET_INLINE void spread(const float* pixel, float* to) { *to = *pixel; }
  template <class V>
  static FUSED_RESNET_INLINE void add(float pixel, const V& weights, V* sum) {
    *sum += pixel * weights;
  }
};

// VDPBF16PS takes and gives denormals as zeros, whatever MXCSR says. By inline assembly, since a template without a
// target cannot call intrinsics that have one.
#if defined(__x86_64__)
struct Bf16Products {
  template <class V>
  using Spread = V;

  template <class V>
  static FUSED_RESNET_INLINE void spread(const float* pixel, V* to) {
    asm("vbroadcastss %1, %0" : "=v"(*to) : "m"(*pixel));
  }
  template <class V>
  static FUSED_RESNET_INLINE void add(const V& pixel, const V& weights, V* sum) {
    V total = *sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(pixel), "v"(weights));
    *sum = total;
  }
};
#endif

// The same in its order, by fp32: a product of two bf16 is exact there.
struct WidenedBf16Products {
  template <class V>
  using Spread = uint32_t;

  static FUSED_RESNET_INLINE void spread(const float* pixel, uint32_t* to) { std::memcpy(to, pixel, sizeof *to); }
  template <class V>
  static FUSED_RESNET_INLINE void add(uint32_t pixel, const V& weights, V* sum) {
    using Bits = typename Lanes<sizeof(V) / sizeof(float)>::Bits;
    constexpr uint32_t kOdd = 0xffff0000;
    const Bits w = reinterpret_cast<Bits>(weights), p = Bits{} + pixel;
    *sum += reinterpret_cast<V>(p & kOdd) * reinterpret_cast<V>(w & kOdd);
    *sum += reinterpret_cast<V>(p << 16) * reinterpret_cast<V>(w << 16);
  }
};

// kSteps: the k steps of weights that stay in the first-level cache while all tiles of a block pass.
template <class Products, int kVectorLanes, int kHalves, int kMaxRows, int kSteps, int kTilesOfBlock>
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
        Part part{segment.offsets + step, steps, segment.stride_w * kValues, s == 0 && step == 0};
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
  static constexpr int64_t kValues = kPixelBytes / sizeof(float);  // of a k step: channels, or pairs of them
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

  static constexpr int place_of(int vector) { return vector / kPerHalf * kSumsOfHalf + vector % kPerHalf * kLanes; }

  // Of some pixels, one within the other: GCC 12 keeps an array that assembly adds to in memory.
  template <int kRows, class Unused = void>
  struct Sums {
    V first[kWide];
    Sums<kRows - 1> others;

    FUSED_RESNET_INLINE void begin(bool is_first, const float* sums) {
      for (int j = 0; j < kWide; ++j) {
        first[j] = V{};
        if (!is_first) load<kLanes>(sums + place_of(j), &first[j]);
      }
      others.begin(is_first, sums + kHalf);
    }
    FUSED_RESNET_INLINE void add(const float* pixel, int64_t stride, const V (&weights)[kWide]) {
      typename Products::template Spread<V> value;
      Products::spread(pixel, &value);
      for (int j = 0; j < kWide; ++j) Products::add(value, weights[j], &first[j]);
      others.add(pixel + stride, stride, weights);
    }
    FUSED_RESNET_INLINE void end(float* sums) const {
      for (int j = 0; j < kWide; ++j) store<kLanes>(first[j], sums + place_of(j));
      others.end(sums + kHalf);
    }
  };
  template <class Unused>
  struct Sums<0, Unused> {
    FUSED_RESNET_INLINE void begin(bool, const float*) {}
    FUSED_RESNET_INLINE void add(const float*, int64_t, const V (&)[kWide]) {}
    FUSED_RESNET_INLINE void end(float*) const {}
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
    Sums<kRows> total;
    total.begin(part.is_first, sums);
    for (int64_t step = 0; step < part.steps; ++step, weights += kStepBytes) {
      const char* pixels = a + part.offsets[step];
      fetch<kRows>(part, pixels, weights);
      const float *values = reinterpret_cast<const float*>(pixels), *row = reinterpret_cast<const float*>(weights);
      for (int64_t at = 0; at < kValues; ++at, row += kHalf) {
        V b[kWide];
        for (int j = 0; j < kWide; ++j) {
          load<kLanes>(row + j / kPerHalf * (kHalfBytes / 4) + j % kPerHalf * kLanes, &b[j]);
        }
        total.add(values + at, part.stride, b);
      }
    }
    total.end(sums);
  }

  template <int kRows>
  static FUSED_RESNET_INLINE void fetch(const Part& part, const char* pixels, const char* weights) {
    const int64_t row_bytes = part.stride * static_cast<int64_t>(sizeof(float));
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(pixels + part.to_next_tile + r * row_bytes);
    for (int64_t line = part.line_begin; line < part.line_end; ++line) {
      __builtin_prefetch(weights + part.to_next_weights + line * kLine);
    }
  }

  int rows_;
};

}  // namespace blocked
}  // namespace fused_resnet
