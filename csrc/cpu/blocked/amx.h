// The micro-kernel of the tile unit: two tiles of pixels x two halves of a panel, bf16 summed in fp32 or bytes summed
// in int32. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blocked/convolution.h"
#include "cpu/blocked/tile_rows.h"
#include "cpu/blocked/tiles.h"

namespace fused_resnet {
namespace blocked {

// What passes through the first-level cache without a need to stay there. Pixels and weights of one block seldom fit it
// together. Which of them should leave was measured on ResNet-50's convolutions, each alternative on each (Xeon with
// AMX, 2026-11): of windows of one pixel the pixels, where they are many, of larger ones the weights.
enum class Streamed { kNothing, kPixels, kWeights };

inline Streamed streamed_of(const Convolution& c) {
  constexpr int64_t kFewSteps = 8;
  for (int s = 0; s < c.num_segments; ++s) {
    if (c.segments[s].steps > c.segments[s].blocks) return Streamed::kWeights;
  }
  return c.panels_outermost || c.steps >= kFewSteps ? Streamed::kPixels : Streamed::kNothing;
}

// What is multiplied: bf16, or unsigned or signed bytes with signed weights.
enum class Factors { kBFloat16, kUnsigned, kSigned };

// A share of a convolution, block after block: two tiles of pixels, a group, and a panel. Tiles 0 to 3 hold its sums as
// [tile][half], 4 and 5 pixels, 6 and 7 weights.
//
// The tile unit works on its own. At each k step the vector unit meanwhile finishes some rows of the block before, so
// that where the reduction is short a block costs the longer of both. And a part of the weights that come next is
// fetched into the second-level cache: those of the next panel, or the first of the next convolution.
template <class Tiles, class Rows, Streamed kStreamed, Factors kFactors>
class TileShare {
 public:
  TileShare(const Convolution& c, const Share& share) : c_(c), share_(share), tiles_(rows_of(c.tiling.rows())) {}

  FUSED_RESNET_INLINE void run() {
    const int64_t groups = share_.group_end - share_.group_begin, panels = share_.panel_end - share_.panel_begin;
    if (!c_.panels_outermost) fetch(c_.next_weights, c_.next_bytes, groups * panels);
    for (int64_t group = share_.group_begin; group < share_.group_end; group += groups_) {
      groups_ = std::min({share_.group_end - group, c_.chunk, kMostGroups});
      place<kTiles>(c_, group, group + groups_, &block_);
      has_more_ = group + groups_ < share_.group_end;
      if (c_.panels_outermost) {
        for (int64_t panel = share_.panel_begin; panel < share_.panel_end; ++panel) {
          fetch_after(panel);
          for (int64_t g = 0; g < groups_; ++g) multiply(g, panel);
        }
      } else {
        for (int64_t g = 0; g < groups_; ++g) {
          for (int64_t panel = share_.panel_begin; panel < share_.panel_end; ++panel) multiply(g, panel);
        }
      }
    }
    finish();
  }

 private:
  static constexpr int kTiles = kTilesOfBlock;
  static constexpr int64_t kMostGroups = 16, kLine = 64;

  // A block whose sums are in memory. Rows from `row` on are not finished yet; those beyond the last are not written.
  struct Pending {
    int row = kMaxTileRows;
    const float* sums = nullptr;
    FinishedTile tiles[kTiles];
    Rows rows;
  };

  // What is fetched, and how much of it in a block and at each step.
  struct Ahead {
    const char *at, *end_of_block, *end;
    int64_t bytes_of_block, bytes_of_step;
  };

  struct Steps {
    const char *a0, *a1;
    int64_t stride;
    const int64_t* offsets;
    int64_t count;
    const char* weights;

    FUSED_RESNET_INLINE void skip(int64_t steps) { offsets += steps, count -= steps, weights += steps * kStepBytes; }
  };

  static TileRows rows_of(int rows) {
    const auto r = static_cast<uint8_t>(rows);
    return {r, r, r, r, r, r, kMaxTileRows, kMaxTileRows};
  }

  int64_t panel_bytes() const { return c_.steps * kStepBytes; }

  // During the next `blocks` blocks, fetches what lies at `from`.
  FUSED_RESNET_INLINE void fetch(const char* from, int64_t bytes, int64_t blocks) {
    const int64_t lines = (bytes / kLine + blocks - 1) / blocks;
    ahead_ = {from, from, from + bytes, lines * kLine, (lines + c_.steps - 1) / c_.steps * kLine};
  }

  FUSED_RESNET_INLINE void fetch_after(int64_t panel) {
    const int64_t bytes = panel_bytes();
    if (panel + 1 < share_.panel_end) return fetch(c_.weights + (panel + 1) * bytes, bytes, groups_);
    if (has_more_) return fetch(c_.weights + share_.panel_begin * bytes, bytes, groups_);
    fetch(c_.next_weights, std::min(c_.next_bytes, bytes), groups_);
  }

  FUSED_RESNET_INLINE void multiply(int64_t g, int64_t panel) {
    ahead_.end_of_block = std::min(ahead_.at + ahead_.bytes_of_block, ahead_.end);
    const char* weights = c_.weights + panel * panel_bytes();
    tiles_.template zero<0>();
    tiles_.template zero<1>();
    tiles_.template zero<2>();
    tiles_.template zero<3>();
    for (int s = 0; s < c_.num_segments; ++s) {
      const Segment& segment = c_.segments[s];
      const char* const* a = &block_.a[s][kTiles * g];
      add_segment({a[0], a[1], segment.stride_w * kPixelBytes, segment.offsets, segment.steps, weights});
      weights += segment.steps * kStepBytes;
    }
    finish();
    float* sums = sums_[which_ ^= 1];
    tiles_.template store<0>(sums, kPixelBytes);
    tiles_.template store<2>(sums + kSumsOfTile, kPixelBytes);
    tiles_.template store<3>(sums + kSumsOfTile + kSumsOfHalf, kPixelBytes);
    tiles_.template store<1>(sums + kSumsOfHalf, kPixelBytes);
    pending_.row = 0;
    pending_.sums = sums;
    pending_.rows = Rows(c_, panel);
    for (int t = 0; t < kTiles; ++t)
      pending_.tiles[t] = FinishedTile(c_, block_.tiles[kTiles * g + t], panel * Rows::kPanelBytes);
  }

  // As few rows a step as finish all of them within the segment.
  FUSED_RESNET_INLINE void add_segment(Steps steps) {
    const int64_t left = kMaxTileRows - pending_.row;
    if (left > 0) {
      if (steps.count >= left) {
        add_and_finish<1>(&steps, left);
      } else if (2 * steps.count >= left) {
        add_and_finish<2>(&steps, left / 2);
      } else if (4 * steps.count >= left) {
        add_and_finish<4>(&steps, left / 4);
      } else if (8 * steps.count >= left) {
        add_and_finish<8>(&steps, left / 8);
      } else {
        add_and_finish<16>(&steps, 1);
      }
    }
    add_steps<0, false>(&steps, steps.count);
  }

  template <int kRows>
  FUSED_RESNET_INLINE void add_and_finish(Steps* steps, int64_t count) {
    if (c_.residual.base != nullptr) {
      add_steps<kRows, true>(steps, count);
    } else {
      add_steps<kRows, false>(steps, count);
    }
  }

  // In this order two products after each other share one operand, which the tile unit then keeps: a half of the
  // weights costs max(16, rows) cycles only when it is new.
  template <int kRows, bool kResidual>
  FUSED_RESNET_INLINE void add_steps(Steps* steps, int64_t count) {
    Pending pending = pending_;
    const char *weights = steps->weights, *at = ahead_.at;
    for (int64_t step = 0; step < count; ++step, weights += kStepBytes) {
      const int64_t offset = steps->offsets[step];
      for (const char* end = std::min(at + ahead_.bytes_of_step, ahead_.end_of_block); at < end; at += kLine) {
        __builtin_prefetch(at, 0, 2);
      }
      load<6, Streamed::kWeights>(weights, kPixelBytes);
      load<4, Streamed::kPixels>(steps->a0 + offset, steps->stride);
      dot<0, 4, 6>();
      load<5, Streamed::kPixels>(steps->a1 + offset, steps->stride);
      dot<2, 5, 6>();
      finish_rows<kRows / 2, kResidual>(pending, 0);
      load<7, Streamed::kWeights>(weights + kHalfBytes, kPixelBytes);
      dot<3, 5, 7>();
      finish_rows<kRows - kRows / 2, kResidual>(pending, kRows / 2);
      dot<1, 4, 7>();
      pending.row += kRows;
    }
    pending_.row = pending.row;
    ahead_.at = at;
    steps->skip(count);
  }

  template <int kSum, int kA, int kB>
  FUSED_RESNET_INLINE void dot() {
    if constexpr (kFactors == Factors::kBFloat16) {
      tiles_.template dot_bf16<kSum, kA, kB>();
    } else if constexpr (kFactors == Factors::kUnsigned) {
      tiles_.template dot_u8<kSum, kA, kB>();
    } else {
      tiles_.template dot_s8<kSum, kA, kB>();
    }
  }

  template <int kTile, Streamed kWhat>
  FUSED_RESNET_INLINE void load(const char* from, int64_t stride) {
    if constexpr (kWhat == kStreamed) {
      tiles_.template stream<kTile>(from, stride);
    } else {
      tiles_.template load<kTile>(from, stride);
    }
  }

  template <int kRows, bool kResidual>
  static FUSED_RESNET_INLINE void finish_rows(const Pending& pending, int first) {
    for (int r = first; r < first + kRows; ++r) {
      pending.rows.template finish<kResidual>(pending.sums, pending.tiles, pending.row + r);
    }
  }

  // What no step had time for.
  FUSED_RESNET_INLINE void finish() {
    for (; pending_.row < kMaxTileRows; ++pending_.row) {
      if (c_.residual.base != nullptr) {
        finish_rows<1, true>(pending_, 0);
      } else {
        finish_rows<1, false>(pending_, 0);
      }
    }
  }

  const Convolution& c_;
  const Share& share_;
  Tiles tiles_;
  int64_t groups_ = 0;     // of the chunk
  bool has_more_ = false;  // chunks after it
  Block<kTiles * kMostGroups> block_;
  Ahead ahead_ = {};
  Pending pending_;
  int which_ = 0;
  alignas(64) float sums_[2][kTiles * kSumsOfTile];
};

template <class Tiles, class Rows, Factors kFactors = Factors::kBFloat16>
FUSED_RESNET_INLINE void run_tiles(const Convolution& c, const Share& share) {
  if constexpr (!Tiles::kStreams) return TileShare<Tiles, Rows, Streamed::kNothing, kFactors>(c, share).run();
  switch (streamed_of(c)) {
    case Streamed::kNothing:
      return TileShare<Tiles, Rows, Streamed::kNothing, kFactors>(c, share).run();
    case Streamed::kPixels:
      return TileShare<Tiles, Rows, Streamed::kPixels, kFactors>(c, share).run();
    case Streamed::kWeights:
      return TileShare<Tiles, Rows, Streamed::kWeights, kFactors>(c, share).run();
  }
}

// In int8. Signed inputs, an image's or a sum's without an activation, are too few for a choice of what streams, and so
// are sums that bounds of their own end.
template <class Tiles, template <Ending, bool> class Rows>
FUSED_RESNET_INLINE void run_byte_tiles(const Convolution& c, const Share& share) {
  const Requantizing& r = c.requantizing;
  constexpr Ending kUnsigned = Ending::kUnsigned, kSigned = Ending::kSigned, kAny = Ending::kAny;
  constexpr Streamed kNothing = Streamed::kNothing;
  if (c.keeps_sums) return TileShare<Tiles, SumRows, kNothing, Factors::kUnsigned>(c, share).run();
  const bool is_out_signed = r.low < 0.f;
  const bool saturates = r.fits_int32 && (is_out_signed ? !r.is_residual_signed : r.high == 255.f);
  if (r.is_input_signed) {
    if (saturates && !is_out_signed && !r.is_residual_signed) {
      return TileShare<Tiles, Rows<kUnsigned, false>, kNothing, Factors::kSigned>(c, share).run();
    }
    return r.is_residual_signed ? TileShare<Tiles, Rows<kAny, true>, kNothing, Factors::kSigned>(c, share).run()
                                : TileShare<Tiles, Rows<kAny, false>, kNothing, Factors::kSigned>(c, share).run();
  }
  if (!saturates) {
    return r.is_residual_signed ? TileShare<Tiles, Rows<kAny, true>, kNothing, Factors::kUnsigned>(c, share).run()
                                : TileShare<Tiles, Rows<kAny, false>, kNothing, Factors::kUnsigned>(c, share).run();
  }
  if (is_out_signed) return run_tiles<Tiles, Rows<kSigned, false>, Factors::kUnsigned>(c, share);
  r.is_residual_signed ? run_tiles<Tiles, Rows<kUnsigned, true>, Factors::kUnsigned>(c, share)
                       : run_tiles<Tiles, Rows<kUnsigned, false>, Factors::kUnsigned>(c, share);
}

}  // namespace blocked
}  // namespace fused_resnet
