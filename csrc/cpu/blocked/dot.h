// The micro-kernels of dot products of four bytes: a tile of up to kMaxRows pixels x kHalves halves of a panel at a
// time, in exact int32. Which instructions multiply is a class: VnniDot, MaddDot. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/blocked/requantizing.h"

namespace fused_resnet {
namespace blocked {

constexpr int64_t kFour = 4;  // channels of a product

// After a lambda's parameters: inlined, and so compiled for the instruction set of whoever calls it.
#define FUSED_RESNET_INLINED __attribute__((always_inline))

// run(0), ..., run(kCount - 1), each a constant: GCC keeps an array in registers if no loop indexes it before it is
// unrolled, and it takes an instruction by assembly for too large to unroll early.
template <class Run, int... kIndices>
FUSED_RESNET_INLINE void run_each(const Run& run, std::integer_sequence<int, kIndices...>) {
  (run(std::integral_constant<int, kIndices>()), ...);
}

template <int kCount, class Run>
FUSED_RESNET_INLINE void unrolled(const Run& run) {
  run_each(run, std::make_integer_sequence<int, kCount>());
}

#if defined(__x86_64__)

// Four bytes everywhere: of GCC 12's own broadcast of an integer each lane is an instruction.
template <class Vector>
FUSED_RESNET_INLINE void broadcast(const char* from, Vector* to) {
  struct Four {
    char bytes[kFour];
  };
  asm("vpbroadcastd %1, %0" : "=v"(*to) : "m"(*reinterpret_cast<const Four*>(from)));
}

// VPDPBUSD in vectors of kBytes, encoded for AVX-512 where they have 64, else for AVX-VNNI. Its first factor is
// unsigned: signed ones are taken 128 larger, and sums begin at -128 times the sum of the weights.
template <int kBytes>
struct VnniDot {
  static constexpr int kOutputs = kBytes / 4;  // of a vector
  static constexpr bool kIsOffset = true;
  using Sums = typename Ints<kOutputs>::Vector;
  using Weights = Sums;
  using Pixel = Sums;

  static FUSED_RESNET_INLINE void begin(const int32_t* from, Sums* sums) {
    *sums = *reinterpret_cast<const typename Ints<kOutputs>::Unaligned*>(from);
  }
  static FUSED_RESNET_INLINE void end(const Sums& sums, int32_t* to) {
    *reinterpret_cast<typename Ints<kOutputs>::Unaligned*>(to) = sums;
  }
  static FUSED_RESNET_INLINE void load(const char* from, Weights* weights) {
    *weights = *reinterpret_cast<const typename Ints<kOutputs>::Unaligned*>(from);
  }

  template <bool kSigned>
  static FUSED_RESNET_INLINE void load_pixel(const char* from, Pixel* pixel) {
    broadcast(from, pixel);
    if constexpr (kSigned) *pixel ^= INT32_MIN + 0x808080;  // 0x80808080
  }

  static FUSED_RESNET_INLINE void add(const Pixel& pixel, const Weights& weights, Sums* sums) {
    if constexpr (kBytes == 64) {
      asm("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(pixel), "v"(weights));
    } else {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*sums) : "x"(pixel), "x"(weights));
    }
  }
};

#endif

// Products of bytes as 16-bit numbers, summed in pairs: VPMADDWD, and what it means elsewhere. A sum of four is in two
// parts until the end. VPMADDUBSW would saturate.
template <int kBytes>
struct MaddDot {
  static constexpr int kOutputs = kBytes / 8;
  static constexpr bool kIsOffset = false;
  using Sums = typename Ints<kBytes / 4>::Vector;
  using Pairs = typename VectorOf<uint64_t, kBytes>::Vector;  // of a sum's parts
  using Shorts = typename VectorOf<int16_t, kBytes>::Vector;
  using Unsigned = typename VectorOf<uint8_t, kBytes / 2>::Vector;
  using Signed = typename VectorOf<int8_t, kBytes / 2>::Vector;
  using Loaded = typename VectorOf<int8_t, kBytes / 2>::Unaligned;
  using Weights = Shorts;
  using Pixel = Shorts;

  static FUSED_RESNET_INLINE void begin(const int32_t* from, Sums* sums) {
    const auto begun = *reinterpret_cast<const typename VectorOf<uint32_t, kBytes / 2>::Unaligned*>(from);
    *sums = reinterpret_cast<Sums>(__builtin_convertvector(begun, Pairs));
  }
  static FUSED_RESNET_INLINE void end(const Sums& sums, int32_t* to) {
    const Pairs parts = reinterpret_cast<Pairs>(sums), total = parts + (parts >> 32);
    *reinterpret_cast<typename VectorOf<uint32_t, kBytes / 2>::Unaligned*>(to) =
        __builtin_convertvector(total, typename VectorOf<uint32_t, kBytes / 2>::Vector);
  }
  static FUSED_RESNET_INLINE void load(const char* from, Weights* weights) {
    widen<true>(*reinterpret_cast<const Loaded*>(from), weights);
  }

  template <bool kSigned>
  static FUSED_RESNET_INLINE void load_pixel(const char* from, Pixel* pixel) {
    Loaded bytes;
#if defined(__x86_64__)
    if constexpr (kBytes == 32) broadcast(from, &bytes);
#endif
    if constexpr (kBytes == 16) std::memcpy(&bytes, from, 4), std::memcpy(reinterpret_cast<char*>(&bytes) + 4, from, 4);
    widen<kSigned>(bytes, pixel);
  }

  template <bool kSigned>
  static FUSED_RESNET_INLINE void widen(const Loaded& bytes, Shorts* shorts) {
#if defined(__x86_64__)
    if constexpr (kBytes == 32) {  // of which GCC 12 makes five instructions
      if constexpr (kSigned) {
        asm("vpmovsxbw %1, %0" : "=x"(*shorts) : "xm"(bytes));
      } else {
        asm("vpmovzxbw %1, %0" : "=x"(*shorts) : "xm"(bytes));
      }
      return;
    }
#endif
    if constexpr (kSigned) {
      *shorts = __builtin_convertvector(reinterpret_cast<Signed>(bytes), Shorts);
    } else {
      *shorts = __builtin_convertvector(reinterpret_cast<Unsigned>(bytes), Shorts);
    }
  }

  static FUSED_RESNET_INLINE void add(const Pixel& pixel, const Weights& weights, Sums* sums) {
    Sums pairs;
#if defined(__x86_64__)
    if constexpr (kBytes == 32) {
      asm("vpmaddwd %2, %1, %0" : "=x"(pairs) : "x"(pixel), "x"(weights));
    } else {
      Shorts product = pixel;
      asm("pmaddwd %1, %0" : "+x"(product) : "x"(weights));
      pairs = reinterpret_cast<Sums>(product);
    }
#else
    for (int i = 0; i < kBytes / 4; ++i) {
      pairs[i] = pixel[2 * i] * weights[2 * i] + pixel[2 * i + 1] * weights[2 * i + 1];
    }
#endif
    *sums += pairs;
  }
};

// kSteps: the k steps of weights that stay in the first-level cache while all tiles of a block pass.
template <class Dot, int kVectorLanes, int kHalves, int kMaxRows, int kSteps, int kTilesOfBlock>
class DotKernel {
 public:
  static constexpr int kTiles = 1, kBlock = kTilesOfBlock, kSumsOfHalf = kMaxRows * kHalf, kLanes = kVectorLanes;

  explicit DotKernel(int rows) : rows_(rows) {}

  FUSED_RESNET_INLINE void multiply(const Convolution& c, const Block<kBlock>& block, const char* weights,
                                    int32_t* sums) {
    const int64_t panel = (weights - c.weights) / (c.steps * kStepBytes);
    for (int i = 0; i < kPanel; ++i) begin_[i] = 0;
    if (Dot::kIsOffset && c.requantizing.is_input_signed) {
      const float* begin = c.requantizing.constants + (panel * Requantizing::kVectors + 2) * kPanel;
      for (int i = 0; i < kPanel; ++i) begin_[i] = static_cast<int32_t>(begin[i]);
    }
    const Segment& segment = c.segments[0];
    for (int64_t step = 0; step < segment.steps; step += kSteps) {
      const int64_t steps = std::min<int64_t>(kSteps, segment.steps - step);
      Part part{segment.offsets + step, steps, segment.stride_w * kPixelBytes, step == 0};
      for (int half = 0; half < 2; half += kHalves) {
        part.to_next_weights = half + kHalves < 2 ? kHalfBytes : steps * kStepBytes - half * kHalfBytes;
        for (int64_t t = 0; t < block.num_tiles; ++t) {
          const char* a = block.a[0][t];
          part.to_next_tile = block.a[0][std::min(t + 1, block.num_tiles - 1)] - a;
          part.line_begin = t * kLinesOfStep / block.num_tiles;
          part.line_end = (t + 1) * kLinesOfStep / block.num_tiles;
          part.begin = begin_ + half * kHalf;
          int32_t* to = sums + (2 * t + half) * kSumsOfHalf;
          if (c.requantizing.is_input_signed) {
            add_rows<kMaxRows, true>(part, a, weights + half * kHalfBytes, to);
          } else {
            add_rows<kMaxRows, false>(part, a, weights + half * kHalfBytes, to);
          }
        }
      }
      weights += steps * kStepBytes;
    }
  }

 private:
  static constexpr int kPerHalf = kHalf / Dot::kOutputs, kWide = kHalves * kPerHalf;
  static constexpr int64_t kLine = 64, kLinesOfStep = kHalves * kHalfBytes / kLine, kVectorBytes = kLine / kPerHalf;

  // Some k steps of a tile, and what it fetches meanwhile, as in FmaKernel.
  struct Part {
    const int64_t* offsets;
    int64_t steps, stride;                          // stride: bytes between the pixels of a tile
    bool is_first;                                  // the sums begin here
    int64_t to_next_tile = 0, to_next_weights = 0;  // bytes
    int64_t line_begin = 0, line_end = 0;           // of the next weights of each step
    const int32_t* begin = nullptr;
  };

  // All rows of a tile are summed in registers, so that their number is a constant.
  template <int kRows, bool kSigned>
  FUSED_RESNET_INLINE void add_rows(const Part& part, const char* a, const char* weights, int32_t* sums) {
    if constexpr (kRows > 0) {
      if (rows_ == kRows) return add_part<kRows, kSigned>(part, a, weights, sums);
      add_rows<kRows - 1, kSigned>(part, a, weights, sums);
    }
  }

  template <int kRows, bool kSigned>
  static FUSED_RESNET_INLINE void add_part(const Part& part, const char* a, const char* weights, int32_t* sums) {
    typename Dot::Sums total[kRows * kWide];
    unrolled<kRows * kWide>([&](auto i) FUSED_RESNET_INLINED {
      Dot::begin(part.is_first ? part.begin + i % kWide * Dot::kOutputs : sums + place_of(i), &total[i]);
    });
    for (int64_t step = 0; step < part.steps; ++step, weights += kStepBytes) {
      const char* pixels = a + part.offsets[step];
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(pixels + part.to_next_tile + r * part.stride);
      for (int64_t line = part.line_begin; line < part.line_end; ++line) {
        __builtin_prefetch(weights + part.to_next_weights + line * kLine);
      }
      for (int64_t four = 0; four < kHalf; ++four) {
        add_four<kRows, kSigned>(pixels + four * kFour, part.stride, weights + four * kLine, total);
      }
    }
    unrolled<kRows * kWide>([&](auto i) FUSED_RESNET_INLINED { Dot::end(total[i], sums + place_of(i)); });
  }

  static constexpr int place_of(int i) {
    const int row = i / kWide, vector = i % kWide;
    return vector / kPerHalf * kSumsOfHalf + row * kHalf + vector % kPerHalf * Dot::kOutputs;
  }

  template <int kRows, bool kSigned>
  static FUSED_RESNET_INLINE void add_four(const char* a, int64_t stride, const char* weights,
                                           typename Dot::Sums (&total)[kRows * kWide]) {
    typename Dot::Weights b[kWide];
    unrolled<kWide>([&](auto j) FUSED_RESNET_INLINED {
      Dot::load(weights + j / kPerHalf * kHalfBytes + j % kPerHalf * kVectorBytes, &b[j]);
    });
    unrolled<kRows>([&](auto r) FUSED_RESNET_INLINED {
      typename Dot::Pixel pixel;
      Dot::template load_pixel<kSigned>(a + r * stride, &pixel);
      unrolled<kWide>([&](auto j) FUSED_RESNET_INLINED { Dot::add(pixel, b[j], &total[r * kWide + j]); });
    });
  }

  int rows_;
  alignas(64) int32_t begin_[kPanel];
};

}  // namespace blocked
}  // namespace fused_resnet
