// Max- and average-pooling over blocked activations. A window's part outside of the map is left out. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/dtype.h"
#include "common/inline.h"
#include "cpu/blocked/requantizing.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

struct Pooling {
  View input, out;
  int64_t blocks, H, W, P, Q, R, S, stride_h, stride_w, padding_h, padding_w;
  bool is_max;
  bool counts_padding;  // an average's divisor: R * S, or as many pixels as there are

  int64_t lines(int64_t images) const { return images * blocks * P; }
};

// The pixels of one window along one side.
struct Extent {
  int64_t begin, end;
  Extent(int64_t output, int64_t stride, int64_t padding, int64_t window, int64_t size)
      : begin(std::max<int64_t>(output * stride - padding, 0)),
        end(std::min(output * stride - padding + window, size)) {}
  int64_t count() const { return end - begin; }
};

// NaN where there is one. It is looked for apart: GCC 12 makes scalars of a choice by two comparisons at once.
template <int kLanes, class T>
FUSED_RESNET_INLINE void largest(const char* plane, int64_t line, const Extent& h, const Extent& w, int64_t lane,
                                 typename Lanes<kLanes>::Vector* result) {
  using V = typename Lanes<kLanes>::Vector;
  V found = V{} - std::numeric_limits<float>::infinity(), nan = V{};
  for (int64_t i = h.begin; i < h.end; ++i) {
    for (int64_t j = w.begin; j < w.end; ++j) {
      V value;
      load<kLanes>(reinterpret_cast<const T*>(plane + i * line + j * kPixelBytes) + lane, &value);
      found = value > found ? value : found;
      nan = value != value ? value : nan;
    }
  }
  *result = nan != nan ? nan : found;
}

// As many bf16 as fit a vector of kBytes, as integers.
template <int kBytes>
struct Shorts {
  typedef int16_t Vector __attribute__((vector_size(kBytes)));
  typedef int16_t Unaligned __attribute__((vector_size(kBytes), aligned(2), may_alias));
};

// The same for bf16, whose order is that of integers once the bits of negative numbers are turned over. NaN is what has
// a larger magnitude than infinity.
template <int kBytes>
FUSED_RESNET_INLINE void largest_of_bf16(const char* plane, int64_t line, const Extent& h, const Extent& w, char* out) {
  using V = typename Shorts<kBytes>::Vector;
  using U = typename Shorts<kBytes>::Unaligned;
  constexpr int16_t kMagnitude = 0x7fff, kInfinity = 0x7f80, kNan = 0x7fc0;
  V found = V{} + INT16_MIN, most = V{};
  for (int64_t i = h.begin; i < h.end; ++i) {
    for (int64_t j = w.begin; j < w.end; ++j) {
      const V value = *reinterpret_cast<const U*>(plane + i * line + j * kPixelBytes);
      const V ordered = value ^ ((value >> 15) & kMagnitude), magnitude = value & kMagnitude;
      found = ordered > found ? ordered : found;
      most = magnitude > most ? magnitude : most;
    }
  }
  const V result = found ^ ((found >> 15) & kMagnitude);
  *reinterpret_cast<U*>(out) = most > V{} + kInfinity ? V{} + kNan : result;
}

// Line by line: thousands of pixels in a row would cost an fp32 sum a digit.
template <int kLanes, class T>
FUSED_RESNET_INLINE void total(const char* plane, int64_t line, const Extent& h, const Extent& w, int64_t lane,
                               typename Lanes<kLanes>::Vector* result) {
  using V = typename Lanes<kLanes>::Vector;
  V sum = V{};
  for (int64_t i = h.begin; i < h.end; ++i) {
    V of_line = V{};
    for (int64_t j = w.begin; j < w.end; ++j) {
      V value;
      load<kLanes>(reinterpret_cast<const T*>(plane + i * line + j * kPixelBytes) + lane, &value);
      of_line += value;
    }
    sum += of_line;
  }
  *result = sum;
}

// Lines [begin, end) of outputs: line = (image, block, p).
template <int kLanes, class T>
FUSED_RESNET_INLINE void pool_lines(const Pooling& s, int64_t begin, int64_t end) {
  typename Lanes<kLanes>::Vector value;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t p = index % s.P, block = index / s.P % s.blocks, image = index / s.P / s.blocks;
    const char* plane = s.input.base + image * s.input.image + block * s.input.plane;
    char* out = s.out.base + image * s.out.image + block * s.out.plane + p * s.out.line;
    const Extent h(p, s.stride_h, s.padding_h, s.R, s.H);
    for (int64_t q = 0; q < s.Q; ++q) {
      const Extent w(q, s.stride_w, s.padding_w, s.S, s.W);
      if (s.is_max && std::is_same<T, BFloat16>::value) {
        constexpr int kBytes = 4 * kLanes;
        for (int64_t at = 0; at < kPixelBytes; at += kBytes) {
          largest_of_bf16<kBytes>(plane + at, s.input.line, h, w, out + q * kPixelBytes + at);
        }
        continue;
      }
      const float pixels = static_cast<float>(s.counts_padding ? s.R * s.S : h.count() * w.count());
      for (int64_t lane = 0; lane < kPixelBytes / static_cast<int64_t>(sizeof(T)); lane += kLanes) {
        if (s.is_max) {
          largest<kLanes, T>(plane, s.input.line, h, w, lane, &value);
        } else {
          total<kLanes, T>(plane, s.input.line, h, w, lane, &value);
          value = value / pixels;
        }
        store<kLanes>(value, reinterpret_cast<T*>(out + q * kPixelBytes) + lane);
      }
    }
  }
}

// The largest bytes of windows, line by line as above.
template <class Byte, int kBytes>
FUSED_RESNET_INLINE void pool_bytes(const Pooling& s, int64_t begin, int64_t end) {
  using V = typename VectorOf<Byte, kBytes>::Vector;
  using U = typename VectorOf<Byte, kBytes>::Unaligned;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t p = index % s.P, block = index / s.P % s.blocks, image = index / s.P / s.blocks;
    const char* plane = s.input.base + image * s.input.image + block * s.input.plane;
    char* out = s.out.base + image * s.out.image + block * s.out.plane + p * s.out.line;
    const Extent h(p, s.stride_h, s.padding_h, s.R, s.H);
    for (int64_t q = 0; q < s.Q; ++q, out += kPixelBytes) {
      const Extent w(q, s.stride_w, s.padding_w, s.S, s.W);
      for (int64_t at = 0; at < kPixelBytes; at += kBytes) {
        V found = V{} + std::numeric_limits<Byte>::min();
        for (int64_t i = h.begin; i < h.end; ++i) {
          const char* line = plane + i * s.input.line + at;
          for (int64_t j = w.begin; j < w.end; ++j) {
            const V value = *reinterpret_cast<const U*>(line + j * kPixelBytes);
            found = value > found ? value : found;
          }
        }
        *reinterpret_cast<U*>(out + at) = found;
      }
    }
  }
}

// Sums of maps' bytes, times a factor: the mean of each channel.
struct Averaging {
  Layout layout;
  const char* buffer;
  float factor;
  float* means;
  int64_t stride;  // values from one image's means to the next

  int64_t blocks() const { return layout.N * layout.used_blocks(); }
};

// Of blocks [begin, end), counted over all images. Of some pixels sums stay within 16 bits.
template <class Byte>
FUSED_RESNET_INLINE void average_bytes(const Averaging& s, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 128;
  const Layout& l = s.layout;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / l.used_blocks(), block = index % l.used_blocks();
    int32_t sums[kPixelBytes] = {};
    for (int64_t h = 0; h < l.H; ++h) {
      const auto* pixel = reinterpret_cast<const Byte*>(s.buffer + l.at(image, block, h, 0));
      for (int64_t w = 0; w < l.W;) {
        int16_t some[kPixelBytes] = {};
        for (const int64_t last = std::min(w + kTogether, l.W); w < last; ++w, pixel += kPixelBytes) {
          for (int i = 0; i < kPixelBytes; ++i) some[i] = static_cast<int16_t>(some[i] + pixel[i]);
        }
        for (int i = 0; i < kPixelBytes; ++i) sums[i] += some[i];
      }
    }
    float* to = s.means + image * s.stride + block * l.lanes;
    const int64_t count = std::min(l.C - block * l.lanes, l.lanes);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(sums[i]) * s.factor;
  }
}

template <class Byte>
void average_anywhere(const Averaging& s, int64_t begin, int64_t end) {
  average_bytes<Byte>(s, begin, end);
}

template <class Byte>
FUSED_RESNET_AVX2 void average_avx2(const Averaging& s, int64_t begin, int64_t end) {
  average_bytes<Byte>(s, begin, end);
}

template <class Byte>
FUSED_RESNET_AVX512 void average_avx512(const Averaging& s, int64_t begin, int64_t end) {
  average_bytes<Byte>(s, begin, end);
}

// The same lines compiled for each instruction set.
template <class T>
void pool_anywhere(const Pooling& s, int64_t begin, int64_t end) {
  pool_lines<4, T>(s, begin, end);
}

template <class T>
FUSED_RESNET_AVX2 void pool_avx2(const Pooling& s, int64_t begin, int64_t end) {
  pool_lines<8, T>(s, begin, end);
}

template <class T>
FUSED_RESNET_AVX512 void pool_avx512(const Pooling& s, int64_t begin, int64_t end) {
  pool_lines<16, T>(s, begin, end);
}

template <class Byte>
void pool_bytes_anywhere(const Pooling& s, int64_t begin, int64_t end) {
  pool_bytes<Byte, 16>(s, begin, end);
}

template <class Byte>
FUSED_RESNET_AVX2 void pool_bytes_avx2(const Pooling& s, int64_t begin, int64_t end) {
  pool_bytes<Byte, 32>(s, begin, end);
}

template <class Byte>
FUSED_RESNET_AVX512 void pool_bytes_avx512(const Pooling& s, int64_t begin, int64_t end) {
  pool_bytes<Byte, 64>(s, begin, end);
}

}  // namespace blocked
}  // namespace fused_resnet
