// A linear layer of the means of u8 maps, in int8: a convolution over two pixels of each image, the lower bytes of its
// channels' sums and the upper ones, and what follows it. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/inline.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/layout.h"

namespace fused_resnet {
namespace blocked {

// Of a map: the sum of so many u8 fits two bytes.
constexpr int64_t kMostPixelsOfAMean = 257;

struct LinearOfMeans {
  Layout maps;
  const char* input;
  Layout halves, sums;      // of one image: two pixels for each of the maps'
  Convolution convolution;  // without its memory
  float* output;

  int64_t scratch_bytes() const { return halves.bytes() + sums.bytes(); }
};

// Of images [begin, end).
FUSED_RESNET_INLINE void halve_sums(const LinearOfMeans& s, int64_t begin, int64_t end, char* halves) {
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

// y = fma(float(upper), 256 * M, fma(float(lower), M, B)), each operation rounded once.
FUSED_RESNET_INLINE void finish_linear(const LinearOfMeans& s, const char* sums, int64_t begin, int64_t end) {
  const int64_t K = s.convolution.channels;
  for (int64_t image = begin; image < end; ++image) {
    for (int64_t first = 0; first < K; first += kHalf) {
      int32_t halves[2][kHalf];
      std::memcpy(halves, sums + s.sums.at(0, first / kHalf, 0, 2 * image), sizeof halves);
      const float* multiplier =
          s.convolution.requantizing.constants + first / kPanel * (Requantizing::kVectors * kPanel) + first % kPanel;
      const float* bias = multiplier + kPanel;
      float y[kHalf];
      for (int64_t i = 0; i < kHalf; ++i) {
        y[i] = __builtin_fmaf(static_cast<float>(halves[0][i]), multiplier[i], bias[i]);
        y[i] = __builtin_fmaf(static_cast<float>(halves[1][i]), 256.f * multiplier[i], y[i]);
      }
      std::memcpy(s.output + image * K + first, y, std::min(K - first, kHalf) * sizeof(float));
    }
  }
}

inline void halve_sums_anywhere(const LinearOfMeans& s, int64_t begin, int64_t end, char* halves) {
  halve_sums(s, begin, end, halves);
}

FUSED_RESNET_AVX2 inline void halve_sums_avx2(const LinearOfMeans& s, int64_t begin, int64_t end, char* halves) {
  halve_sums(s, begin, end, halves);
}

inline void finish_linear_anywhere(const LinearOfMeans& s, const char* sums, int64_t begin, int64_t end) {
  finish_linear(s, sums, begin, end);
}

FUSED_RESNET_AVX2 inline void finish_linear_avx2(const LinearOfMeans& s, const char* sums, int64_t begin, int64_t end) {
  finish_linear(s, sums, begin, end);
}

}  // namespace blocked
}  // namespace fused_resnet
