// The epilogue in int8, q = rint(min(max(fma(skip, R, fma(float(sum), M, B)), low), high)), in vectors of any width.
// Every kernel gives these bytes: each operation rounds once, and nothing may be contracted. No torch here.
#pragma once

#include <cstdint>

#include "common/inline.h"
#include "cpu/blocked/convolution.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

// As many numbers as fit a vector of kBytes.
template <class T, int kBytes>
struct VectorOf {
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(1), may_alias));
};

template <int kLanes>
struct Ints : VectorOf<int32_t, 4 * kLanes> {
  using Bytes = typename VectorOf<uint8_t, kLanes>::Vector;
  using UnalignedBytes = typename VectorOf<uint8_t, kLanes>::Unaligned;
};

// *sum = a * b + *sum, rounded once. Vectors of 4 lanes are those of any machine.
template <int kLanes>
FUSED_RESNET_INLINE void multiply_add(const typename Lanes<kLanes>::Vector& a, const typename Lanes<kLanes>::Vector& b,
                                      typename Lanes<kLanes>::Vector* sum) {
#if defined(__x86_64__)
  if constexpr (kLanes > 4) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
    return;
  }
#endif
  for (int i = 0; i < kLanes; ++i) (*sum)[i] = __builtin_fmaf(a[i], b[i], (*sum)[i]);
}

// Where an output's panel or half lies in a block of 64 channels.
FUSED_RESNET_INLINE int64_t place_of_bytes(const View& view, int64_t channel) {
  return channel / kPixelBytes * view.plane + channel % kPixelBytes;
}

// What the outputs of a half share.
template <int kLanes>
struct HalfConstants {
  using V = typename Lanes<kLanes>::Vector;
  static constexpr int kVectors = kHalf / kLanes;

  V multiplier[kVectors], bias[kVectors], residual, low, high;
  int32_t flip;

  FUSED_RESNET_INLINE HalfConstants(const Requantizing& r, int64_t channel)
      : residual(V{} + r.residual), low(V{} + r.low), high(V{} + r.high), flip(r.is_residual_signed ? 0x80 : 0) {
    const float* constants = r.constants + channel / kPanel * (Requantizing::kVectors * kPanel) + channel % kPanel;
    for (int i = 0; i < kVectors; ++i) {
      load<kLanes>(constants + i * kLanes, &multiplier[i]);
      load<kLanes>(constants + kPanel + i * kLanes, &bias[i]);
    }
  }
};

// 16 outputs of a pixel. skip: null without a residual.
template <int kLanes>
FUSED_RESNET_INLINE void requantize(const int32_t* sums, const HalfConstants<kLanes>& h, const uint8_t* skip,
                                    uint8_t* out) {
  using V = typename Lanes<kLanes>::Vector;
  using I = typename Ints<kLanes>::Vector;
  constexpr float kShift = 12582912.f;  // as in Quantizer
  for (int i = 0; i < kHalf / kLanes; ++i) {
    const I sum = *reinterpret_cast<const typename Ints<kLanes>::Unaligned*>(sums + i * kLanes);
    V y = h.bias[i];
    multiply_add<kLanes>(__builtin_convertvector(sum, V), h.multiplier[i], &y);
    if (skip != nullptr) {
      const auto bytes = *reinterpret_cast<const typename Ints<kLanes>::UnalignedBytes*>(skip + i * kLanes);
      const I added = (__builtin_convertvector(bytes, I) ^ h.flip) - h.flip;
      V residual = __builtin_convertvector(added, V), total = y;
      multiply_add<kLanes>(residual, h.residual, &total);
      y = total;
    }
    y = y > h.low ? y : h.low;
    y = y < h.high ? y : h.high;
    const I shifted = reinterpret_cast<I>(y + kShift);
    *reinterpret_cast<typename Ints<kLanes>::UnalignedBytes*>(out + i * kLanes) =
        __builtin_convertvector(shifted, typename Ints<kLanes>::Bytes);
  }
}

// 16 sums of a tile's pixels, as they are.
FUSED_RESNET_INLINE void keep_half(const View& out, const PlacedTile& placed, int64_t channel, const int32_t* sums) {
  char* to = placed.out + channel / kHalf * out.plane;
  for (uint32_t written = placed.tile.written; written != 0; written &= written - 1) {
    const int64_t row = __builtin_ctz(written);
    std::memcpy(to + row * kPixelBytes, sums + row * kHalf, kPixelBytes);
  }
}

// The epilogue of 16 outputs of a tile's pixels.
template <int kLanes, class T>
FUSED_RESNET_INLINE void finish_half(const Convolution& c, const PlacedTile& placed, int64_t channel,
                                     const int32_t* sums) {
  if (c.keeps_sums) return keep_half(c.out, placed, channel, sums);
  const HalfConstants<kLanes> constants(c.requantizing, channel);
  char* out = placed.out + place_of_bytes(c.out, channel);
  const char* residual = placed.residual == nullptr ? nullptr : placed.residual + place_of_bytes(c.residual, channel);
  for (uint32_t written = placed.tile.written; written != 0; written &= written - 1) {
    const int64_t row = __builtin_ctz(written), at = row * kPixelBytes;
    requantize<kLanes>(sums + row * kHalf, constants,
                       residual == nullptr ? nullptr : reinterpret_cast<const uint8_t*>(residual + at),
                       reinterpret_cast<uint8_t*>(out + at));
  }
}

}  // namespace blocked
}  // namespace fused_resnet
