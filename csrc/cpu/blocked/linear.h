// Linear layers in int8: a convolution over two pixels of each image, the lower and the upper bytes of its channels,
// and what follows it. The channels are the sums of u8 maps, or vectors of fp32 as 16 bits. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/inline.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/gating.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/reading.h"
#include "cpu/blocked/requantizing.h"

namespace fused_resnet {
namespace blocked {

// Of a map: the sum of so many u8 fits two bytes.
constexpr int64_t kMostPixelsOfAMean = 257;

// Vectors of fp32 within a region have as many values as whole blocks of bytes have channels.
inline int64_t values_of_vector(int64_t C) {
  return (C + kPixelBytes - 1) / kPixelBytes * kPixelBytes;
}

struct Linear {
  int64_t images;
  Layout halves, sums;      // of one image: two pixels for each of the images
  Convolution convolution;  // without its memory
  float* output;
  int64_t stride;          // values from one image's output to the next: what is more than channels is zero
  bool is_signed = false;  // the upper bytes are 128 too large
  Activation activation = Activation::kNone;

  int64_t scratch_bytes() const { return halves.bytes() + sums.bytes(); }
};

struct LinearOfMeans : Linear {
  Layout maps;
  const char* input;
};

struct LinearOfVectors : Linear {
  const float* input;
  int64_t input_stride;
  Quantizer quantizer;  // to 16 bits
};

// Of images [begin, end).
FUSED_RESNET_INLINE void split(const LinearOfMeans& s, int64_t begin, int64_t end, char* halves) {
  const Layout& l = s.maps;
  for (int64_t image = begin; image < end; ++image) {
    for (int64_t block = 0; block < l.used_blocks(); ++block) {
      uint16_t sums[kPixelBytes] = {};
      for (int64_t h = 0; h < l.H; ++h) {
        const auto* pixel = reinterpret_cast<const uint8_t*>(s.input + l.at(image, block, h, 0));
        for (int64_t w = 0; w < l.W; ++w, pixel += kPixelBytes) {
          for (int i = 0; i < kPixelBytes; ++i) sums[i] = static_cast<uint16_t>(sums[i] + pixel[i]);
        }
      }
      auto* to = reinterpret_cast<uint8_t*>(halves + s.halves.at(0, block, 0, 2 * image));
      for (int i = 0; i < kPixelBytes; ++i) to[i] = static_cast<uint8_t>(sums[i]);
      for (int i = 0; i < kPixelBytes; ++i) to[kPixelBytes + i] = static_cast<uint8_t>(sums[i] >> 8);
    }
  }
}

// The same. Signed ones are 128 * 256 larger, so that all bytes are unsigned.
FUSED_RESNET_INLINE void split(const LinearOfVectors& s, int64_t begin, int64_t end, char* halves) {
  const uint32_t flip = s.is_signed ? 0x80 : 0;
  for (int64_t image = begin; image < end; ++image) {
    const float* values = s.input + image * s.input_stride;
    for (int64_t block = 0; block < s.halves.used_blocks(); ++block, values += kPixelBytes) {
      uint32_t bits[kPixelBytes];
      for (int i = 0; i < kPixelBytes; ++i) bits[i] = s.quantizer.bits(values[i]);
      auto* to = reinterpret_cast<uint8_t*>(halves + s.halves.at(0, block, 0, 2 * image));
      for (int i = 0; i < kPixelBytes; ++i) to[i] = static_cast<uint8_t>(bits[i]);
      for (int i = 0; i < kPixelBytes; ++i) to[kPixelBytes + i] = static_cast<uint8_t>((bits[i] >> 8) ^ flip);
    }
  }
}

// In int8, with one rounding for each operation.
template <int kLanes>
FUSED_RESNET_INLINE void activate(Activation activation, typename Lanes<kLanes>::Vector* value) {
  using V = typename Lanes<kLanes>::Vector;
  if (activation == Activation::kSilu) {
    V factor = *value;
    sigmoid<kLanes>(&factor);
    *value *= factor;
  } else if (activation != Activation::kNone) {
    *value = *value < 0.f ? V{} : *value;
    if (activation == Activation::kRelu6) *value = *value > 6.f ? V{} + 6.f : *value;
  }
}

// y = act(fma(float(upper), 256 * M, fma(float(lower), M, B))), each operation rounded once.
template <int kLanes>
FUSED_RESNET_INLINE void finish_linear(const Linear& s, const char* sums, int64_t begin, int64_t end) {
  using V = typename Lanes<kLanes>::Vector;
  using I = typename Ints<kLanes>::Vector;
  const int64_t K = s.convolution.channels;
  for (int64_t image = begin; image < end; ++image) {
    float* output = s.output + image * s.stride;
    for (int64_t first = 0; first < K; first += kHalf) {
      const auto* halves = reinterpret_cast<const int32_t*>(sums + s.sums.at(0, first / kHalf, 0, 2 * image));
      const float* constants =
          s.convolution.requantizing.constants + first / kPanel * (Requantizing::kVectors * kPanel) + first % kPanel;
      float results[kHalf];
      for (int64_t at = 0; at < kHalf; at += kLanes) {
        V multiplier, y, offset;
        load<kLanes>(constants + at, &multiplier);
        load<kLanes>(constants + kPanel + at, &y);
        load<kLanes>(constants + 2 * kPanel + at, &offset);
        const I lower = *reinterpret_cast<const typename Ints<kLanes>::Unaligned*>(halves + at);
        I upper = *reinterpret_cast<const typename Ints<kLanes>::Unaligned*>(halves + kHalf + at);
        if (s.is_signed) upper += __builtin_convertvector(offset, I);
        multiply_add<kLanes>(__builtin_convertvector(lower, V), multiplier, &y);
        multiply_add<kLanes>(__builtin_convertvector(upper, V), 256.f * multiplier, &y);
        activate<kLanes>(s.activation, &y);
        store<kLanes>(y, results + at);
      }
      std::memcpy(output + first, results, std::min(K - first, kHalf) * sizeof(float));
    }
    std::memset(output + K, 0, (s.stride - K) * sizeof(float));
  }
}

template <class Layer>
void split_anywhere(const Layer& s, int64_t begin, int64_t end, char* halves) {
  split(s, begin, end, halves);
}

template <class Layer>
FUSED_RESNET_AVX2 void split_avx2(const Layer& s, int64_t begin, int64_t end, char* halves) {
  split(s, begin, end, halves);
}

inline void finish_linear_anywhere(const Linear& s, const char* sums, int64_t begin, int64_t end) {
  finish_linear<4>(s, sums, begin, end);
}

FUSED_RESNET_AVX2 inline void finish_linear_avx2(const Linear& s, const char* sums, int64_t begin, int64_t end) {
  finish_linear<8>(s, sums, begin, end);
}

}  // namespace blocked
}  // namespace fused_resnet
