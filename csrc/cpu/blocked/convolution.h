// A convolution over blocked activations: out = act(sum over segments of conv + bias + residual). A second segment is
// another input with a window of its own, summed into the same outputs: a block's projection. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/activation.h"
#include "common/inline.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/tiling.h"
#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

constexpr int kMaxSegments = 2;

// Where a buffer's maps begin, and how far apart its parts are, in bytes.
struct View {
  char* base = nullptr;  // pixel (0, 0) of the first image's first block
  int64_t image = 0, plane = 0, line = 0;

  View() = default;
  View(const Layout& l, char* buffer)
      : base(buffer + l.pixel(0, 0)), image(l.image_bytes()), plane(l.plane_bytes()), line(l.pitch * kPixelBytes) {}
};

// What a convolution reads: k step i of an output is the pixel offsets[i] bytes from the one that its row of A is at.
struct Segment {
  View input;
  int64_t stride_h = 1, stride_w = 1, blocks = 0, steps = 0;  // blocks: of input channels
  const int64_t* offsets = nullptr;
};

// The epilogue in int8 (fused_resnet/operators/quantized.py): of a panel's 32 outputs M, B, and what their sums begin
// at where a kernel takes signed inputs as unsigned ones.
struct Requantizing {
  static constexpr int64_t kVectors = 3;

  const float* constants = nullptr;  // panels x 3 x 32
  float residual = 0.f, low = 0.f, high = 0.f;
  bool fits_int32 = false;  // y, whatever the bytes are
  bool is_input_signed = false, is_residual_signed = false;
};

struct Convolution {
  Segment segments[kMaxSegments];
  int num_segments = 1;
  int64_t images = 0, channels = 0, panels = 0, steps = 0;  // channels: of the output; steps: of all segments
  Tiling tiling;
  const char* weights = nullptr;  // see layout.h
  // of groups: [segment][panel], the first of the blocks that it reads, as many as the segment has; else null
  const int64_t* first_blocks = nullptr;
  const float* bias = nullptr;  // panels * 32 values, or null
  View out, residual;           // the residual's base may be null, and may be out's
  Activation activation = Activation::kNone;
  Requantizing requantizing;           // in int8, in place of a bias and an activation
  bool keeps_sums = false;             // in int8, in place of an epilogue: `out` has 16 int32 in a block's pixel
  const char* next_weights = nullptr;  // what the next convolution reads first, to be fetched meanwhile
  int64_t next_bytes = 0;
  int64_t chunk = 1;              // groups that take turns where panels are outermost
  bool panels_outermost = false;  // each panel's weights are read once, else each tile's pixels

  int64_t tiles() const { return images * tiling.count(); }
};

// Part of a convolution: groups of as many tiles as the kernel takes, and panels. What one thread computes.
struct Share {
  int64_t group_begin, group_end, panel_begin, panel_end;
};

struct PlacedTile {
  int64_t image;
  Tile tile;
  char* out;             // its first pixel in the output's first block
  const char* residual;  // and in the residual's, if there is one
};

// What a micro-kernel multiplies at a time: a block of a few tiles. Tile t's first row of A lies at a[segment][t].
template <int kMostTiles>
struct Block {
  int64_t num_tiles;
  PlacedTile tiles[kMostTiles];
  const char* a[kMaxSegments][kMostTiles];
};

FUSED_RESNET_INLINE const char* input_pixel(const Segment& segment, const PlacedTile& placed) {
  return segment.input.base + placed.image * segment.input.image +
         placed.tile.line * segment.stride_h * segment.input.line + placed.tile.begin * segment.stride_w * kPixelBytes;
}

FUSED_RESNET_INLINE char* output_pixel(const View& view, const PlacedTile& placed) {
  return view.base + placed.image * view.image + placed.tile.line * view.line + placed.tile.begin * kPixelBytes;
}

// Groups [begin, end) of kTiles tiles; beyond the last tile it comes again, with nothing to write.
template <int kTiles, int kMostTiles>
FUSED_RESNET_INLINE void place(const Convolution& c, int64_t begin, int64_t end, Block<kMostTiles>* block) {
  block->num_tiles = (end - begin) * kTiles;
  for (int64_t t = 0; t < block->num_tiles; ++t) {
    const int64_t wanted = begin * kTiles + t, index = std::min(wanted, c.tiles() - 1);
    PlacedTile& placed = block->tiles[t];
    placed = {index / c.tiling.count(), c.tiling.at(index % c.tiling.count()), nullptr, nullptr};
    if (wanted != index) placed.tile.written = 0;
    placed.out = output_pixel(c.out, placed);
    if (c.residual.base != nullptr) placed.residual = output_pixel(c.residual, placed);
    for (int s = 0; s < c.num_segments; ++s) block->a[s][t] = input_pixel(c.segments[s], block->tiles[t]);
  }
}

// The epilogue of 16 outputs of a tile's pixels. Channels beyond the output's get zeros: of an infinite input their
// sums are NaN, and the next convolution's zero weights would not remove that.
template <int kLanes, class T>
FUSED_RESNET_INLINE void finish_half(const Convolution& c, const PlacedTile& placed, int64_t channel,
                                     const float* sums) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int64_t kBlock = kPixelBytes / sizeof(T), kVectors = kHalf / kLanes;
  const bool has_residual = placed.residual != nullptr;
  char* out = placed.out + channel / kBlock * c.out.plane;
  const char* residual = placed.residual + channel / kBlock * c.residual.plane;
  V bias[kVectors] = {};
  if (c.bias != nullptr) {
    for (int i = 0; i < kVectors; ++i) load<kLanes>(c.bias + channel + i * kLanes, &bias[i]);
  }
  const int64_t excess = std::clamp<int64_t>(channel + kHalf - c.channels, 0, kHalf);
  for (uint32_t written = placed.tile.written; written != 0; written &= written - 1) {
    const int64_t row = __builtin_ctz(written), at = row * kPixelBytes;
    const T* added = has_residual ? reinterpret_cast<const T*>(residual + at) : nullptr;
    const Epilogue<T> epilogue{nullptr, added, c.activation};
    for (int i = 0; i < kVectors; ++i) {
      V sum;
      load<kLanes>(sums + row * kHalf + i * kLanes, &sum);
      sum += bias[i];
      finish<kLanes>(sum, epilogue, channel % kBlock + i * kLanes, kLanes, reinterpret_cast<T*>(out + at));
    }
    if (excess > 0) {
      T* end = reinterpret_cast<T*>(out + at) + channel % kBlock + kHalf;
      std::memset(end - excess, 0, excess * sizeof(T));
    }
  }
}

// What products of T are summed in.
template <class T>
using SumOf = std::conditional_t<sizeof(T) == 1, int32_t, float>;

template <class Kernel, class T>
FUSED_RESNET_INLINE void run_block(const Convolution& c, const Block<Kernel::kBlock>& block, int64_t panel,
                                   Kernel* kernel, SumOf<T>* sums) {
  kernel->multiply(c, block, c.weights + panel * c.steps * kStepBytes, sums);
  for (int64_t t = 0; t < block.num_tiles; ++t) {
    for (int64_t half = 0; half < 2; ++half) {
      finish_half<Kernel::kLanes, T>(c, block.tiles[t], panel * kPanel + half * kHalf,
                                     sums + (2 * t + half) * Kernel::kSumsOfHalf);
    }
  }
}

// A share of c by a micro-kernel, a class with
//   kTiles       tiles that are always multiplied together, a group
//   kBlock       the most tiles that are multiplied before their epilogue, in whole groups
//   kSumsOfHalf  sums between the halves of a tile's: [tile][half][row][16]
//   kLanes       of the epilogue's vectors
//   multiply(c, block, panel's weights, sums)
// It lives for the share, since a thread's tiles are set up once for it.
template <class Kernel, class T>
FUSED_RESNET_INLINE void run_share(const Convolution& c, const Share& share) {
  constexpr int64_t kGroups = Kernel::kBlock / Kernel::kTiles;
  Kernel kernel(c.tiling.rows());
  alignas(64) SumOf<T> sums[Kernel::kBlock * 2 * Kernel::kSumsOfHalf];
  Block<Kernel::kBlock> block;
  const int64_t passes = c.panels_outermost ? share.panel_end - share.panel_begin : 1;
  const int64_t panels = (share.panel_end - share.panel_begin) / passes;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = share.panel_begin + pass * panels;
    for (int64_t group = share.group_begin; group < share.group_end; group += kGroups) {
      place<Kernel::kTiles>(c, group, std::min(group + kGroups, share.group_end), &block);
      for (int64_t panel = first; panel < first + panels; ++panel) {
        run_block<Kernel, T>(c, block, panel, &kernel, sums);
      }
    }
  }
}

}  // namespace blocked
}  // namespace fused_resnet
