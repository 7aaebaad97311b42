// The tiles that the convolution for sm_90a is compiled for, the order in which blocks take them, and which problems
// its tensor maps can describe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/conv_shape.h"
#include "cuda/sm80/tiles.h"

namespace fused_resnet {
namespace sm90 {

// One block computes block_m rows by block_n columns at a time: a warpgroup for every 64 rows, and one that brings a
// ring of `stages` buffers. A stage holds 128 bytes of one tap's channels for every row and column.
struct Tile {
  int block_m, block_n, stages;
  int resident_blocks;  // on a multiprocessor: registers are shared out for so many
  int cluster;          // blocks, of rows below each other, of which each brings a part of the filters for all
};

// A tile's index is in saved configs: new ones come last. It counts from kFirstTile, behind all that sm80/tiles.h has.
constexpr Tile kTiles[] = {
    {128, 256, 3, 1, 1}, {128, 128, 4, 1, 1},
    {128, 64, 3, 2, 1},   // 64 filters: layer1. One block's output is written while the other's products are summed
    {64, 128, 3, 2, 1},   // few rows, or short sums, where the output is what takes long
    {128, 256, 3, 1, 2},  // the fewest bytes from L2 for a product
    {128, 128, 4, 1, 2},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr int kFirstTile = 90;

constexpr bool is_tile(int64_t index) {
  return index >= kFirstTile && index < kFirstTile + kNumTiles;
}

constexpr int kGroupRows = 64;  // rows of a warpgroup's wgmma
constexpr int kSpan = 128;      // bytes of a row that are swizzled together, the most there are

// Channels of a stage.
FUSED_RESNET_HD constexpr int block_k(int element_bytes) {
  return kSpan / element_bytes;
}

constexpr int num_consumers(const Tile& t) {
  return t.block_m / kGroupRows;
}
constexpr int num_threads(const Tile& t) {
  return 128 * (1 + num_consumers(t));
}
constexpr int input_bytes(const Tile& t) {
  return t.block_m * kSpan;
}
constexpr int stage_bytes(const Tile& t) {
  return input_bytes(t) + t.block_n * kSpan;
}
// The output's tile, where the residual waits before. Then each warpgroup's scales and shifts, then the barriers.
constexpr int staging_bytes(const Tile& t, int element_bytes) {
  return t.block_m * t.block_n * element_bytes;
}
// Bytes of a row that lie together there, in panels of 64 rows.
constexpr int panel_span(const Tile& t, int element_bytes) {
  return t.block_n * element_bytes < kSpan ? t.block_n * element_bytes : kSpan;
}
constexpr int affine_bytes(const Tile& t) {
  return num_consumers(t) * t.block_n * 8;
}
constexpr int smem_bytes(const Tile& t, int element_bytes) {
  return t.stages * (stage_bytes(t) + 16) + staging_bytes(t, element_bytes) + affine_bytes(t) + 8 * num_consumers(t);
}

// Registers of a thread: the same for all at launch, then by setmaxnreg most of them go to those that multiply. One
// warp would do to bring the stages, without setmaxnreg. But each of a multiprocessor's four schedulers has registers
// of its own: nine warps get no more than twelve do.
constexpr int launch_registers(const Tile& t) {
  return kRegistersPerSm / (t.resident_blocks * num_threads(t)) / 8 * 8;
}
constexpr int producer_registers(const Tile& t) {
  return t.resident_blocks == 1 ? 40 : 24;
}
constexpr int consumer_registers(const Tile& t) {
  const int left = launch_registers(t) * (1 + num_consumers(t)) - producer_registers(t);
  return left / num_consumers(t) / 8 * 8;
}

// Whether the convolution is a matrix product as its tensors lie, without im2col.
FUSED_RESNET_HD bool is_plain(const ConvShape& s) {
  return s.R * s.S == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h + s.pad_w == 0;
}

FUSED_RESNET_HD int32_t steps_of_tap(const ConvShape& s, int element_bytes) {
  return (s.C - 1) / block_k(element_bytes) + 1;
}

// Blocks take tiles in this order, each the next one that is left at a fixed distance. Columns of kRowsTogether row
// tiles, so that what runs at a time reads few rows of x and few filters from L2. A guess; it has not been measured.
constexpr int kRowsTogether = 16;
struct TileGrid {
  int32_t rows, columns;
};
struct TilePlace {
  int32_t row, column;
};

// A cluster's tiles count as one, of all its rows.
FUSED_RESNET_HD TileGrid tile_grid(const ConvShape& s, int block_m, int block_n) {
  return {static_cast<int32_t>((num_rows(s) + block_m - 1) / block_m), (s.K - 1) / block_n + 1};
}

FUSED_RESNET_HD TilePlace tile_place(const TileGrid& grid, int32_t index) {
  const int32_t each = kRowsTogether * grid.columns, group = index / each;
  const int32_t first = group * kRowsTogether, left = grid.rows - first;
  const int32_t rows = left < kRowsTogether ? left : kRowsTogether;
  const int32_t within = index - group * each;
  return {first + within % rows, within / rows};
}

inline TileGrid tile_grid(const Tile& t, const ConvShape& s) {
  return tile_grid(s, t.block_m * t.cluster, t.block_n);
}

// As many blocks as run at a time, or as there are tiles; in whole clusters.
inline int64_t num_blocks(const Tile& t, const ConvShape& s, int num_sms) {
  const TileGrid grid = tile_grid(t, s);
  const int64_t resident = std::max(num_sms * t.resident_blocks / t.cluster, 1);
  return t.cluster * std::min(int64_t{grid.rows} * grid.columns, resident);
}

// The corners of the box in which im2col moves a window's first tap: {W, H} from the first and from the last pixel.
struct Corners {
  int64_t lower[2], upper[2];
};
inline Corners im2col_corners(const ConvShape& s) {
  return {{-s.pad_w, -s.pad_h}, {s.pad_w - int64_t{s.S - 1} * s.dilation_w, s.pad_h - int64_t{s.R - 1} * s.dilation_h}};
}

// Why the kernel cannot compute this, empty if it can. The limits are those of cuTensorMapEncodeIm2col for 4 dimensions
// and of the copy's offsets (PTX ISA 9.7.9.27.1.1). is_aligned: x and weight start at multiples of 16 bytes.
inline std::string why_not(const ConvShape& s, int element_bytes, bool is_aligned) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (element_bytes > 2) return "elements have " + text(element_bytes) + " bytes, not 1 or 2";
  if (s.groups != 1) return text(s.groups) + " groups";
  const int chunk = 16 / element_bytes;
  if (s.C % chunk != 0) return text(s.C) + " channels are not a multiple of " + text(chunk);
  if (!is_aligned) return "x or weight does not start at a multiple of 16 bytes";
  if (s.H == 0 || s.W == 0) return "an input without pixels";
  // coordinates and the number of tiles are 32-bit; a map's strides are below 2^40 bytes
  if (num_rows(s) > INT32_MAX - kMostTileRows || s.N > INT32_MAX) return text(num_rows(s)) + " rows of the output";
  if (num_rows(s) / 64 * (s.K / 64 + 1) > INT32_MAX - kMostTileRows) return "the output has too many tiles";
  const int64_t taps = int64_t{s.R} * s.S;
  if (std::max(int64_t{s.H} * s.W, taps) > (int64_t{1} << 40) / element_bytes / s.C - 1)
    return "a stride of 2^40 bytes";
  if (is_plain(s)) return "";
  if (std::max(s.stride_h, s.stride_w) > 8) return "a stride of " + text(std::max(s.stride_h, s.stride_w));
  const Corners corners = im2col_corners(s);
  for (const int64_t corner : {corners.lower[0], corners.lower[1], corners.upper[0], corners.upper[1]}) {
    if (corner < -128 || corner > 127) return "a window's corner at " + text(corner) + ", not from -128 to 127";
  }
  const int64_t offset = std::max(int64_t{s.S - 1} * s.dilation_w, int64_t{s.R - 1} * s.dilation_h);
  if (offset > 255) return "a tap " + text(offset) + " pixels from its window's corner, more than 255";
  return "";
}

// As sm80's estimate, and as rough: it ranks, and predicts no time. Nothing of it has been measured.
// H100 whitepaper: 989 TFLOP/s, 132 multiprocessors at 1.83 GHz; twice that of bytes.
constexpr double kMultiplyAddsPerCycle = 2048.0;
// From the last product of a tile to the first of the next: latencies, and the output's way through shared memory.
// Another resident block uses them.
constexpr double tile_cycles(const Tile& t) {
  return (1000.0 + t.block_m * t.block_n / 12.0) / t.resident_blocks;
}

inline double estimated_cycles(const Tile& t, const ConvShape& s, int element_bytes, const DeviceLimits& device) {
  const double arithmetic = t.block_m * t.block_n * (kSpan / 2) / kMultiplyAddsPerCycle;
  const double from_l2 = (input_bytes(t) + (stage_bytes(t) - input_bytes(t)) / t.cluster) / rates(device).from_l2;
  const double steps = static_cast<double>(s.R) * s.S * steps_of_tap(s, element_bytes);
  const TileGrid grid = tile_grid(t, s);
  const int64_t tiles_on_busiest_sm = ceil_div(int64_t{grid.rows} * grid.columns * t.cluster, device.num_sms);
  const double each = steps * std::max(arithmetic, from_l2) + tile_cycles(t);
  return static_cast<double>(tiles_on_busiest_sm) * each;
}

inline const char* why_illegal(const Tile& t, int element_bytes, const DeviceLimits& device) {
  if (device.capability != 90) return "compiled for compute capability 9.0 only";
  if (smem_bytes(t, element_bytes) > device.smem_per_block) return "more shared memory than a block may have";
  return nullptr;
}

// What the device can run of this, with its estimate; empty where the problem is not one for tensor maps.
inline std::vector<RankedConfig> ranked_configs(const ConvShape& s, int element_bytes, const DeviceLimits& device,
                                                bool is_aligned) {
  std::vector<RankedConfig> found;
  if (!why_not(s, element_bytes, is_aligned).empty()) return found;
  for (int i = 0; i < kNumTiles; ++i) {
    if (why_illegal(kTiles[i], element_bytes, device) != nullptr) continue;
    found.push_back({estimated_cycles(kTiles[i], s, element_bytes, device), {kFirstTile + i, 1}});
  }
  return found;
}

}  // namespace sm90
}  // namespace fused_resnet
