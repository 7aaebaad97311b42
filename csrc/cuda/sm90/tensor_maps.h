// What the convolution's tensor maps describe, without CUDA headers: the launcher encodes them with the driver, the
// emulator takes them as they are. Everything is innermost first.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/conv_arguments.h"
#include "cuda/sm90/tiles.h"

namespace fused_resnet {
namespace sm90 {

// Why a launch is refused, empty if it is not.
inline std::string why_not_launched(const ConvArguments& args, const Tile& tile, int element_bytes,
                                    const DeviceLimits& device) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.weight);
  if (std::string reason = why_not(args.shape, element_bytes, addresses % 16 == 0); !reason.empty()) return reason;
  if (const char* reason = why_illegal(tile, element_bytes, device)) return reason;
  return args.splits == 1 ? "" : "it does not split the reduction";
}

// Rows of `swizzle` bytes that are swizzled, zeros outside.
struct MapPlan {
  const void* address;
  int rank;  // 0: there is no such map
  int swizzle;
  uint64_t sizes[4], strides[3];  // elements; bytes, of all dimensions but the innermost
  uint32_t element_strides[4];
  uint32_t box[4];             // of tiles
  bool is_im2col;              // then, instead of the box:
  int32_t lower[2], upper[2];  // corners, W and H
  uint32_t channels, pixels;   // that a copy brings
};

// x as (C, N * H * W), or by im2col as (C, W, H, N): block_m rows of the implicit matrix.
inline MapPlan input_map(const ConvArguments& args, const Tile& tile, int element_bytes) {
  const ConvShape& s = args.shape;
  const uint64_t pixel = uint64_t(s.C) * uint64_t(element_bytes);
  const uint64_t width = uint64_t(s.W), height = uint64_t(s.H), images = uint64_t(s.N);
  const uint64_t channels = uint64_t(s.C);
  const auto rows = static_cast<uint32_t>(tile.block_m), depth = static_cast<uint32_t>(block_k(element_bytes));
  MapPlan map{};
  map.address = args.x, map.swizzle = kSpan;
  if (is_plain(s)) {
    map.rank = 2;
    map.sizes[0] = channels, map.sizes[1] = images * height * width;
    map.strides[0] = pixel;
    map.element_strides[0] = map.element_strides[1] = 1;
    map.box[0] = depth, map.box[1] = rows;
    return map;
  }
  map.rank = 4;
  map.sizes[0] = channels, map.sizes[1] = width, map.sizes[2] = height, map.sizes[3] = images;
  map.strides[0] = pixel, map.strides[1] = pixel * width, map.strides[2] = pixel * width * height;
  map.element_strides[0] = map.element_strides[3] = 1;
  map.element_strides[1] = static_cast<uint32_t>(s.stride_w),
  map.element_strides[2] = static_cast<uint32_t>(s.stride_h);
  map.is_im2col = true;
  const Corners corners = im2col_corners(s);
  for (int d = 0; d < 2; ++d) {
    map.lower[d] = static_cast<int32_t>(corners.lower[d]);
    map.upper[d] = static_cast<int32_t>(corners.upper[d]);
  }
  map.channels = depth, map.pixels = rows;
  return map;
}

// The weight as (C, R * S, K): channels of one tap, of block_n filters or a block's share of them. A box that leaves
// the tap's channels is filled with zeros there, so that no other tap's weights meet the zeros of x.
inline MapPlan weight_map(const ConvArguments& args, const Tile& tile, int element_bytes) {
  const ConvShape& s = args.shape;
  const uint64_t tap = uint64_t(s.C) * uint64_t(element_bytes), taps = uint64_t(s.R) * uint64_t(s.S);
  MapPlan map{};
  map.address = args.weight, map.swizzle = kSpan;
  map.rank = 3;
  map.sizes[0] = static_cast<uint64_t>(s.C), map.sizes[1] = taps, map.sizes[2] = static_cast<uint64_t>(s.K);
  map.strides[0] = tap, map.strides[1] = tap * taps;
  map.element_strides[0] = map.element_strides[1] = map.element_strides[2] = 1;
  map.box[0] = static_cast<uint32_t>(block_k(element_bytes)), map.box[1] = 1,
  map.box[2] = static_cast<uint32_t>(tile.block_n / tile.cluster);
  return map;
}

// The output, or the residual, as (K, N * P * Q): a panel of one warpgroup's rows. There is none where rows cannot be
// written in whole chunks.
inline MapPlan output_map(const void* address, const ConvArguments& args, const Tile& tile, int element_bytes) {
  MapPlan map{};
  if (address == nullptr || !args.has_vector_rows) return map;
  map.address = address, map.rank = 2, map.swizzle = panel_span(tile, element_bytes);
  map.sizes[0] = static_cast<uint64_t>(args.shape.K), map.sizes[1] = static_cast<uint64_t>(num_rows(args.shape));
  map.strides[0] = map.sizes[0] * uint64_t(element_bytes);
  map.element_strides[0] = map.element_strides[1] = 1;
  map.box[0] = static_cast<uint32_t>(map.swizzle / element_bytes), map.box[1] = kGroupRows;
  return map;
}

// All that a launch takes, in the kernel's order.
constexpr int kNumMaps = 4;
struct MapPlans {
  MapPlan maps[kNumMaps];
};
inline MapPlans tensor_maps(const ConvArguments& args, const Tile& tile, int element_bytes) {
  return {input_map(args, tile, element_bytes), weight_map(args, tile, element_bytes),
          output_map(args.epilogue.residual, args, tile, element_bytes),
          output_map(args.out, args, tile, element_bytes)};
}

}  // namespace sm90
}  // namespace fused_resnet
