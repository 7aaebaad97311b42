// A convolution over blocked activations: out = act(sum over segments of conv + bias + residual). A second segment is
// another input with a window of its own, summed into the same outputs: a block's projection. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/activation.h"
#include "common/inline.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/tiling.h"
#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

constexpr int kMaxSegments = 2;
constexpr int64_t kSumsOfTile = 2 * 16 * kHalf;  // [half][row][16 outputs]

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
  int64_t stride_h = 1, stride_w = 1, steps = 0;
  const int64_t* offsets = nullptr;
};

struct Convolution {
  Segment segments[kMaxSegments];
  int num_segments = 1;
  int64_t images = 0, panels = 0, steps = 0;  // steps: of all segments
  Tiling tiling;
  const char* weights = nullptr;  // see layout.h
  const float* bias = nullptr;    // panels * 32 values, or null
  View out, residual;             // the residual's base may be null, and may be out's
  Activation activation = Activation::kNone;
  bool panels_outermost = false;  // each panel's weights are read once, else each tile's pixels

  int64_t tiles() const { return images * tiling.count(); }
};

// Part of a convolution: groups of as many tiles as the kernel takes, and panels. What one thread computes.
struct Share {
  int64_t group_begin, group_end, panel_begin, panel_end;
};

// What a micro-kernel multiplies: tile t's first row of A lies at a[segment][t].
template <int kTiles>
struct Operands {
  const char* a[kMaxSegments][kTiles];
  const char* weights;
};

struct PlacedTile {
  int64_t image;
  Tile tile;
};

// Tiles [group * kTiles, ...); beyond the last one it comes again, with nothing to write.
template <int kTiles>
FUSED_RESNET_INLINE void place(const Convolution& c, int64_t group, PlacedTile* placed) {
  for (int t = 0; t < kTiles; ++t) {
    const int64_t wanted = group * kTiles + t, index = std::min(wanted, c.tiles() - 1);
    placed[t] = {index / c.tiling.count(), c.tiling.at(index % c.tiling.count())};
    if (wanted != index) placed[t].tile.written = 0;
  }
}

template <int kTiles>
FUSED_RESNET_INLINE void point_at(const Convolution& c, const PlacedTile* placed, int64_t panel,
                                  Operands<kTiles>* operands) {
  for (int s = 0; s < c.num_segments; ++s) {
    const Segment& segment = c.segments[s];
    for (int t = 0; t < kTiles; ++t) {
      const Tile& tile = placed[t].tile;
      operands->a[s][t] = segment.input.base + placed[t].image * segment.input.image +
                          tile.line * segment.stride_h * segment.input.line +
                          tile.begin * segment.stride_w * kPixelBytes;
    }
  }
  operands->weights = c.weights + panel * c.steps * kStepBytes;
}

FUSED_RESNET_INLINE char* output_pixel(const View& view, const PlacedTile& placed, int64_t block) {
  return view.base + placed.image * view.image + block * view.plane + placed.tile.line * view.line +
         placed.tile.begin * kPixelBytes;
}

// The epilogue of 16 outputs of a tile's pixels.
template <int kLanes, class T>
FUSED_RESNET_INLINE void finish_half(const Convolution& c, const PlacedTile& placed, int64_t channel,
                                     const float* sums) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int64_t kBlock = kPixelBytes / sizeof(T), kVectors = kHalf / kLanes;
  const bool has_residual = c.residual.base != nullptr;
  char* out = output_pixel(c.out, placed, channel / kBlock);
  const char* residual = has_residual ? output_pixel(c.residual, placed, channel / kBlock) : nullptr;
  V bias[kVectors] = {};
  if (c.bias != nullptr) {
    for (int i = 0; i < kVectors; ++i) load<kLanes>(c.bias + channel + i * kLanes, &bias[i]);
  }
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
  }
}

template <class Kernel, class T>
FUSED_RESNET_INLINE void run_group(const Convolution& c, const PlacedTile* placed, int64_t panel, Kernel* kernel,
                                   float* sums) {
  Operands<Kernel::kTiles> operands;
  point_at<Kernel::kTiles>(c, placed, panel, &operands);
  kernel->multiply(c, operands, sums);
  for (int t = 0; t < Kernel::kTiles; ++t) {
    for (int half = 0; half < 2; ++half) {
      finish_half<Kernel::kLanes, T>(c, placed[t], panel * kPanel + half * kHalf,
                                     sums + t * kSumsOfTile + half * (kSumsOfTile / 2));
    }
  }
}

// A share of c by a micro-kernel: a class with kTiles, kLanes of its epilogue, and multiply(c, operands, sums), which
// writes [tile][half][row][16]. It lives for the share, since a thread's tiles are set up once for it.
template <class Kernel, class T>
FUSED_RESNET_INLINE void run_share(const Convolution& c, const Share& share) {
  Kernel kernel(c.tiling.rows());
  alignas(64) float sums[Kernel::kTiles * kSumsOfTile];
  PlacedTile placed[Kernel::kTiles];
  if (c.panels_outermost) {
    for (int64_t panel = share.panel_begin; panel < share.panel_end; ++panel) {
      for (int64_t group = share.group_begin; group < share.group_end; ++group) {
        place<Kernel::kTiles>(c, group, placed);
        run_group<Kernel, T>(c, placed, panel, &kernel, sums);
      }
    }
    return;
  }
  for (int64_t group = share.group_begin; group < share.group_end; ++group) {
    place<Kernel::kTiles>(c, group, placed);
    for (int64_t panel = share.panel_begin; panel < share.panel_end; ++panel) {
      run_group<Kernel, T>(c, placed, panel, &kernel, sums);
    }
  }
}

}  // namespace blocked
}  // namespace fused_resnet
