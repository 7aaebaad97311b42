// The micro-kernel of the tile unit: two tiles of pixels x two halves of a panel, bf16 summed in fp32. No torch here.
#pragma once

#include <cstdint>

#include "cpu/blocked/convolution.h"
#include "cpu/blocked/tiles.h"

namespace fused_resnet {
namespace blocked {

// Tiles 0 to 3 hold the sums as [tile][half], 4 and 5 pixels, 6 and 7 weights.
template <class Tiles, int kEpilogueLanes>
class TileKernel {
 public:
  static constexpr int kTiles = 2, kBlock = 2, kSumsOfHalf = kMaxTileRows * kHalf, kLanes = kEpilogueLanes;

  explicit TileKernel(int rows) : tiles_(rows_of(rows)) {}

  FUSED_RESNET_INLINE void multiply(const Convolution& c, const Block<kBlock>& block, const char* weights,
                                    float* sums) {
    tiles_.template zero<0>();
    tiles_.template zero<1>();
    tiles_.template zero<2>();
    tiles_.template zero<3>();
    for (int s = 0; s < c.num_segments; ++s) {
      const Segment& segment = c.segments[s];
      add_steps(block.a[s][0], block.a[s][1], segment.stride_w * kPixelBytes, segment.offsets, segment.steps, weights);
      weights += segment.steps * kStepBytes;
    }
    tiles_.template store<0>(sums, kPixelBytes);
    tiles_.template store<2>(sums + 2 * kSumsOfHalf, kPixelBytes);
    tiles_.template store<3>(sums + 3 * kSumsOfHalf, kPixelBytes);
    tiles_.template store<1>(sums + kSumsOfHalf, kPixelBytes);
  }

 private:
  static TileRows rows_of(int rows) {
    const auto r = static_cast<uint8_t>(rows);
    return {r, r, r, r, r, r, kMaxTileRows, kMaxTileRows};
  }

  // In this order two products after each other share one operand, which the tile unit then keeps: a half of the
  // weights costs max(16, rows) cycles only when it is new.
  FUSED_RESNET_INLINE void add_steps(const char* a0, const char* a1, int64_t stride, const int64_t* offsets,
                                     int64_t steps, const char* weights) {
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      const int64_t offset = offsets[step];
      tiles_.template load<6>(weights, kPixelBytes);
      tiles_.template load<4>(a0 + offset, stride);
      tiles_.template dot_bf16<0, 4, 6>();
      tiles_.template load<5>(a1 + offset, stride);
      tiles_.template dot_bf16<2, 5, 6>();
      tiles_.template load<7>(weights + kHalfBytes, kPixelBytes);
      tiles_.template dot_bf16<3, 5, 7>();
      tiles_.template dot_bf16<1, 4, 7>();
    }
  }

  Tiles tiles_;
};

}  // namespace blocked
}  // namespace fused_resnet
