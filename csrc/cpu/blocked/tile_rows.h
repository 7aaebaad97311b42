// The epilogue of tiles, row by row: act(sums + bias + residual) of a pixel's 32 outputs, from fp32 to bf16, or that of
// int8 from int32 to bytes. Each in two implementations: AVX-512's instructions, and C++ for any machine. No torch
// here.
//
//   kPanelBytes                          of 32 outputs of a pixel
//   Rows(c, panel)                       what the rows of a block share
//   finish<kResidual>(sums, tiles, row)  row of each of a block's two tiles: written if the tile has to write it
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dtype.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/requantizing.h"
#include "cpu/blocked/tiles.h"
#include "cpu/silu.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

constexpr int kTilesOfBlock = 2, kSumsOfHalf = kMaxTileRows * kHalf, kSumsOfTile = 2 * kSumsOfHalf;

// Where a tile's rows go.
struct FinishedTile {
  char* out = nullptr;
  const char* residual = nullptr;
  uint32_t written = 0;

  FinishedTile() = default;
  // at: of the panel in a pixel of all blocks, in bytes.
  FUSED_RESNET_INLINE FinishedTile(const Convolution& c, const PlacedTile& placed, int64_t at)
      : out(placed.out + at / kPixelBytes * c.out.plane + at % kPixelBytes),
        residual(placed.residual + at / kPixelBytes * c.residual.plane + at % kPixelBytes),
        written(placed.tile.written) {}
};

// kSilu: that is the activation.
template <bool kSilu>
class PlainRows {
 public:
  static constexpr int64_t kPanelBytes = 64;

  PlainRows() = default;
  PlainRows(const Convolution& c, int64_t panel)
      : activation_(c.activation),
        bias_(c.bias == nullptr ? nullptr : c.bias + panel * kPanel),
        channels_(std::min(c.channels - panel * kPanel, kPanel)) {}

  template <bool kResidual>
  void finish(const float* sums, const FinishedTile (&tiles)[kTilesOfBlock], int row) const {
    for (int t = 0; t < kTilesOfBlock; ++t) finish_one<kResidual>(sums + t * kSumsOfTile, tiles[t], row);
  }

 private:
  template <bool kResidual>
  void finish_one(const float* sums, const FinishedTile& tile, int row) const {
    if ((tile.written >> row & 1) == 0) return;
    auto* out = reinterpret_cast<BFloat16*>(tile.out + row * kPixelBytes);
    auto* residual = reinterpret_cast<const BFloat16*>(tile.residual + row * kPixelBytes);
    for (int64_t channel = 0; channel < kPanel; ++channel) {
      float value = sums[(channel / kHalf * kMaxTileRows + row) * kHalf + channel % kHalf];
      if (bias_ != nullptr) value += bias_[channel];
      if (kResidual) value += static_cast<float>(residual[channel]);
      if (kSilu) {
        silu<uint32_t>(&value);
      } else if (activation_ != Activation::kNone) {
        value = value < 0.f ? 0.f : value;
        if (activation_ == Activation::kRelu6) value = value > 6.f ? 6.f : value;
      }
      out[channel] = BFloat16(channel < channels_ ? value : 0.f);
    }
  }

  Activation activation_ = Activation::kNone;
  const float* bias_ = nullptr;
  int64_t channels_ = 0;
};

// In int8, where sums are kept.
class SumRows {
 public:
  static constexpr int64_t kPanelBytes = 2 * kPixelBytes;

  SumRows() = default;
  FUSED_RESNET_INLINE SumRows(const Convolution& c, int64_t) : to_second_half_(c.out.plane) {}

  template <bool kResidual>
  FUSED_RESNET_INLINE void finish(const float* sums, const FinishedTile (&tiles)[kTilesOfBlock], int row) const {
    for (int t = 0; t < kTilesOfBlock; ++t) {
      if ((tiles[t].written >> row & 1) == 0) continue;
      const float* from = sums + t * kSumsOfTile + row * kHalf;
      char* to = tiles[t].out + row * kPixelBytes;
      std::memcpy(to, from, kPixelBytes);
      std::memcpy(to + to_second_half_, from + kSumsOfHalf, kPixelBytes);
    }
  }

 private:
  int64_t to_second_half_ = 0;
};

// What y becomes: bytes of this kind, saturated, of a y that int32 holds, or bytes between any bounds, of any y.
enum class Ending { kUnsigned, kSigned, kAny };

// kSigned: the residual's bytes are.
template <Ending kEnding, bool kSigned>
class PlainByteRows {
 public:
  static constexpr int64_t kPanelBytes = 32;

  PlainByteRows() = default;
  PlainByteRows(const Convolution& c, int64_t panel) : requantizing_(&c.requantizing), channel_(panel * kPanel) {}

  template <bool kResidual>
  void finish(const float* sums, const FinishedTile (&tiles)[kTilesOfBlock], int row) const {
    for (int t = 0; t < kTilesOfBlock; ++t) finish_one<kResidual>(sums + t * kSumsOfTile, tiles[t], row);
  }

 private:
  template <bool kResidual>
  void finish_one(const float* sums, const FinishedTile& tile, int row) const {
    if ((tile.written >> row & 1) == 0) return;
    for (int half = 0; half < 2; ++half) {
      const HalfConstants<4> constants(*requantizing_, channel_ + half * kHalf);
      const int64_t at = row * kPixelBytes + half * kHalf;
      requantize<4>(reinterpret_cast<const int32_t*>(sums) + (half * kMaxTileRows + row) * kHalf, constants,
                    kResidual ? reinterpret_cast<const uint8_t*>(tile.residual + at) : nullptr,
                    reinterpret_cast<uint8_t*>(tile.out + at));
    }
  }

  const Requantizing* requantizing_ = nullptr;
  int64_t channel_ = 0;
};

#if defined(__x86_64__)

// By inline assembly, since a template without a target cannot call intrinsics that have one. No branch: rows that are
// not written have an empty mask, with which memory is neither read nor written.
template <bool kSilu>
class Avx512Rows {
 public:
  static constexpr int64_t kPanelBytes = 64;

  Avx512Rows() = default;
  FUSED_RESNET_INLINE Avx512Rows(const Convolution& c, int64_t panel) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const int64_t channels = std::min(c.channels - panel * kPanel, kPanel);
    kept_ = channels == kPanel ? ~uint32_t{0} : (uint32_t{1} << channels) - 1;
    least_ = V{} + (c.activation == Activation::kNone ? -kInfinity : 0.f);
    most_ = V{} + (c.activation == Activation::kRelu6 ? 6.f : kInfinity);
    bias_[0] = bias_[1] = V{};
    if (c.bias != nullptr) {
      for (int half = 0; half < 2; ++half) load<kHalf>(c.bias + panel * kPanel + half * kHalf, &bias_[half]);
    }
  }

  template <bool kResidual>
  FUSED_RESNET_INLINE void finish(const float* sums, const FinishedTile (&tiles)[kTilesOfBlock], int row) const {
    for (int t = 0; t < kTilesOfBlock; ++t) finish_one<kResidual>(sums + t * kSumsOfTile, tiles[t], row);
  }

 private:
  using V = typename Lanes<kHalf>::Vector;
  struct HalfLine {
    char bytes[kPixelBytes / 2];
  };
  struct Line {
    char bytes[kPixelBytes];
  };

  template <bool kResidual>
  FUSED_RESNET_INLINE void finish_one(const float* sums, const FinishedTile& tile, int row) const {
    const uint32_t written = -(tile.written >> row & 1);
    V value[2];
    for (int half = 0; half < 2; ++half) {
      load<kHalf>(sums + (half * kMaxTileRows + row) * kHalf, &value[half]);
      value[half] += bias_[half];
      if (kResidual) {
        typename Lanes<kHalf>::Bits wide;
        const char* from = tile.residual + row * kPixelBytes + half * sizeof(HalfLine);
        asm("vpmovzxwd %1, %0%{%2%}%{z%}" : "=v"(wide) : "m"(*reinterpret_cast<const HalfLine*>(from)), "Yk"(written));
        value[half] += reinterpret_cast<V>(wide << 16);
      }
      if (kSilu) {
        silu<typename Lanes<kHalf>::Bits>(&value[half]);
        continue;
      }
      // of NaN and a number either gives the second
      asm("vmaxps %1, %2, %0" : "=v"(value[half]) : "v"(value[half]), "v"(least_));
      asm("vminps %1, %2, %0" : "=v"(value[half]) : "v"(value[half]), "v"(most_));
    }
    V result;
    asm("vcvtne2ps2bf16 %1, %2, %0%{%3%}%{z%}" : "=v"(result) : "v"(value[0]), "v"(value[1]), "Yk"(kept_));
    asm("vmovdqu16 %1, %0%{%2%}"
        : "+m"(*reinterpret_cast<Line*>(tile.out + row * kPixelBytes))
        : "v"(result), "Yk"(written));
  }

  V bias_[2], least_, most_;
  uint32_t kept_;
};

// Beyond int32 a conversion gives its least number, as of NaN. Where y may be there the upper bound, which keeps NaN,
// is applied before, and the lower one after it.
//
// Rows that are not written go to a line that nobody reads: masks would take time from the arithmetic, by which short
// reductions are bound.
template <Ending kEnding, bool kSigned>
class Avx512ByteRows {
 public:
  static constexpr int64_t kPanelBytes = 32;

  Avx512ByteRows() = default;
  FUSED_RESNET_INLINE Avx512ByteRows(const Convolution& c, int64_t panel) {
    const Requantizing& r = c.requantizing;
    const float* constants = r.constants + panel * Requantizing::kVectors * kPanel;
    for (int half = 0; half < 2; ++half) {
      load<kHalf>(constants + half * kHalf, &multiplier_[half]);
      load<kHalf>(constants + kPanel + half * kHalf, &bias_[half]);
    }
    residual_ = V{} + r.residual;
    most_ = V{} + r.high;
    least_ = Words{} + static_cast<int16_t>(r.low);
  }

  template <bool kResidual>
  FUSED_RESNET_INLINE void finish(const float* sums, const FinishedTile (&tiles)[kTilesOfBlock], int row) const {
    V bytes, second;
    alignas(kPixelBytes) char nowhere[kPixelBytes];
    words_of<kResidual>(sums + row * kHalf, tiles[0], row, nowhere, &bytes);
    words_of<kResidual>(sums + kSumsOfTile + row * kHalf, tiles[1], row, nowhere, &second);
    if (kEnding == Ending::kSigned) {
      asm("vpacksswb %1, %0, %0" : "+v"(bytes) : "v"(second));
    } else {
      asm("vpackuswb %1, %0, %0" : "+v"(bytes) : "v"(second));
    }
    asm("vpermd %0, %1, %0" : "+v"(bytes) : "v"(kOrder));
    asm("vmovdqu64 %t1, %0" : "=m"(*line_of(tiles[0], row, nowhere)) : "v"(bytes));
    asm("vextracti64x4 $1, %1, %0" : "=m"(*line_of(tiles[1], row, nowhere)) : "v"(bytes));
  }

 private:
  using V = typename Lanes<kHalf>::Vector;
  typedef int32_t Order __attribute__((vector_size(64)));
  typedef int16_t Words __attribute__((vector_size(64)));
  struct Quarter {
    char bytes[kPixelBytes / 4];
  };
  struct HalfLine {
    char bytes[kPixelBytes / 2];
  };
  struct Line {
    char bytes[kPixelBytes];
  };

  // Without a branch, which would be mispredicted.
  template <class T>
  static FUSED_RESNET_INLINE T* chosen(uint32_t is_first, T* first, T* second) {
    const auto a = reinterpret_cast<uintptr_t>(first), b = reinterpret_cast<uintptr_t>(second);
    return reinterpret_cast<T*>(b + ((a - b) & -static_cast<uintptr_t>(is_first)));
  }

  static FUSED_RESNET_INLINE HalfLine* line_of(const FinishedTile& tile, int row, char* nowhere) {
    return reinterpret_cast<HalfLine*>(chosen(tile.written >> row & 1, tile.out + row * kPixelBytes, nowhere));
  }

  // 32 outputs as 16-bit numbers, packed within lanes of 16 bytes: four of the first half and four of the second.
  template <bool kResidual>
  FUSED_RESNET_INLINE void words_of(const float* sums, const FinishedTile& tile, int row, const char* nowhere,
                                    V* words) const {
    V first, second;
    round<kResidual>(0, sums, tile, row, nowhere, &first);
    round<kResidual>(1, sums, tile, row, nowhere, &second);
    asm("vpackssdw %1, %2, %0" : "=v"(*words) : "v"(second), "v"(first));
    if (kEnding == Ending::kAny) {
      asm("vpmaxsw %1, %0, %0" : "+v"(*words) : "v"(least_));
      asm("vpandd %1, %0, %0" : "+v"(*words) : "v"(Words{} + int16_t{0xff}));  // which nothing saturates then
    }
  }

  template <bool kResidual>
  FUSED_RESNET_INLINE void round(int half, const float* sums, const FinishedTile& tile, int row, const char* nowhere,
                                 V* rounded) const {
    V total;
    asm("vcvtdq2ps %1, %0" : "=v"(total) : "m"(*reinterpret_cast<const Line*>(sums + half * kSumsOfHalf)));
    asm("vfmadd213ps %2, %1, %0" : "+v"(total) : "v"(multiplier_[half]), "v"(bias_[half]));
    if (kResidual) {
      V wide;
      const char* skip = chosen(tile.written >> row & 1, tile.residual + row * kPixelBytes, nowhere);
      const auto* from = reinterpret_cast<const Quarter*>(skip + half * sizeof(Quarter));
      if (kSigned) {
        asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*from));
      } else {
        asm("vpmovzxbd %1, %0" : "=v"(wide) : "m"(*from));
      }
      asm("vcvtdq2ps %0, %0" : "+v"(wide));
      asm("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(wide), "v"(residual_));
    }
    if (kEnding == Ending::kAny) {  // of NaN and a number the former
      asm("vminps %1, %2, %0" : "=v"(total) : "v"(total), "v"(most_));
    }
    asm("vcvtps2dq %1, %0" : "=v"(*rounded) : "v"(total));
  }

  // Of bytes packed twice within lanes of 16, four by four.
  static constexpr Order kOrder = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

  V multiplier_[2], bias_[2], residual_, most_;
  Words least_;
};

#endif

}  // namespace blocked
}  // namespace fused_resnet
