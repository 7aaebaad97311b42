// The tiles that the grouped 3x3 convolution is compiled for, which problems it takes, and its rank among the others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/conv_arguments.h"
#include "cuda/conv_shape.h"
#include "cuda/sm80/tiles.h"

namespace fused_resnet {
namespace grouped {

// One block computes a slab of channels, 128 bytes of each pixel, for lines x columns of the output at a time. It reads
// what lies under their windows once, for all groups of the slab.
struct Tile {
  int lines, columns, stride;
};

// A tile's index is in saved configs: new ones come last. It counts from kFirstTile, between sm80's and sm90's.
constexpr Tile kTiles[] = {
    {16, 16, 1},  // the least that is read twice
    {8, 8, 1},    // small maps
    {8, 8, 2},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr int kFirstTile = 60;

constexpr bool is_tile(int64_t index) {
  return index >= kFirstTile && index < kFirstTile + kNumTiles;
}

constexpr int kTaps = 9;    // 3 x 3
constexpr int kSpan = 128;  // bytes of a pixel in shared memory, all of a slab's
constexpr int kStages = 2;  // one tile is multiplied while the next one arrives
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kFilters = 16;  // of a warp
constexpr int kStrip = 16;    // pixels that are multiplied together: two lines of eight
constexpr int kMostWidth = 64;

constexpr int input_lines(const Tile& t) {
  return (t.lines - 1) * t.stride + 3;
}
constexpr int input_columns(const Tile& t) {
  return (t.columns - 1) * t.stride + 3;
}
constexpr int stage_bytes(const Tile& t) {
  return input_lines(t) * input_columns(t) * kSpan;
}
constexpr int smem_bytes(const Tile& t) {
  return kStages * stage_bytes(t);
}
constexpr int slab_channels(int element_bytes) {
  return kSpan / element_bytes;
}
// Channels that a warp's filters are multiplied with: their groups', or as many as an mma takes at least. Weights of
// other groups are zero.
constexpr int width(int group_channels, int element_bytes) {
  const int least = 32 / element_bytes > kFilters ? 32 / element_bytes : kFilters;
  return group_channels > least ? group_channels : least;
}
// A thread holds its filters' weights of all taps: four registers for each 32 bytes of a tap.
constexpr int weight_registers(int width, int element_bytes) {
  return kTaps * 4 * (width * element_bytes / 32);
}
// On a multiprocessor: registers are shared out for so many. Beside 72 of weights enough are left in 16 bits alone:
// fragments of TF32 are rounded in registers of their own.
constexpr int resident_blocks(int width, int element_bytes) {
  return weight_registers(width, element_bytes) <= (element_bytes == 2 ? 72 : 36) ? 2 : 1;
}

inline int64_t num_slabs(const ConvShape& s, int element_bytes) {
  return ceil_div(s.C, slab_channels(element_bytes));
}
inline int64_t num_tiles(const Tile& t, const ConvShape& s) {
  return s.N * ceil_div(s.P, t.lines) * ceil_div(s.Q, t.columns);
}

inline int blocks_per_sm(const Tile& t, const ConvShape& s, int element_bytes, const DeviceLimits& device) {
  const int by_smem = device.smem_per_sm / (smem_bytes(t) + kReservedSmemPerBlock);
  return std::max(1, std::min(by_smem, resident_blocks(width(s.group_channels, element_bytes), element_bytes)));
}

// As many blocks as run at a time, or as there are tiles; as many of each slab.
inline int64_t num_blocks(const Tile& t, const ConvShape& s, int element_bytes, const DeviceLimits& device) {
  const int64_t slabs = num_slabs(s, element_bytes);
  const int64_t resident = int64_t{device.num_sms} * blocks_per_sm(t, s, element_bytes, device);
  return slabs * std::min(num_tiles(t, s), std::max<int64_t>(1, resident / slabs));
}

// Why the kernel cannot compute this with any tile, empty if it can. is_aligned: x and weight start at multiples of 16
// bytes.
inline std::string why_not(const ConvShape& s, int element_bytes, bool is_aligned) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const auto product = [&](int64_t a, int64_t b) { return text(a) + "x" + text(b); };
  if (element_bytes == 1) return "elements have 1 byte, not 2 or 4";
  if (s.R != 3 || s.S != 3) return "a filter of " + product(s.R, s.S) + ", not 3x3";
  if (s.groups == 1) return "one group";
  if (s.group_filters != s.group_channels)
    return text(s.group_channels) + " channels and " + text(s.group_filters) + " filters a group, which differ";
  const int g = s.group_channels;
  const int most = std::min(kMostWidth, slab_channels(element_bytes));
  if (g > most || (g & (g - 1)) != 0) return text(g) + " channels a group, not a power of two up to " + text(most);
  if (s.C * element_bytes % 16 != 0) return text(s.C) + " channels are not a multiple of " + text(16 / element_bytes);
  if (s.stride_h != s.stride_w || s.stride_h > 2) return "a stride of " + product(s.stride_h, s.stride_w);
  if (s.dilation_h != 1 || s.dilation_w != 1) return "a dilation of " + product(s.dilation_h, s.dilation_w);
  if (!is_aligned) return "x or weight does not start at a multiple of 16 bytes";
  if (static_cast<double>(s.N) * s.P * s.Q > INT32_MAX) return "the output has too many tiles";
  return "";
}

inline std::string why_illegal(const Tile& t, const ConvShape& s, const DeviceLimits& device) {
  if (t.stride != s.stride_h) return "compiled for a stride of " + std::to_string(t.stride);
  if (smem_bytes(t) > device.smem_per_block) return "more shared memory than a block may have";
  return "";
}

// Why this cannot be launched; empty if it can.
inline std::string why_not_launched(const ConvArguments& args, const Tile& t, int element_bytes,
                                    const DeviceLimits& device) {
  if (args.splits != 1) return "it does not split the reduction";
  const uintptr_t read = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.weight);
  const std::string reason = why_not(args.shape, element_bytes, read % 16 == 0);
  return reason.empty() ? why_illegal(t, args.shape, device) : reason;
}

// Whether four neighbours of the output are accessed at once. Channels are a multiple of that, whatever the groups are.
inline bool has_whole_quads(const ConvArguments& args, int element_bytes) {
  const uintptr_t accessed =
      reinterpret_cast<uintptr_t>(args.out) | reinterpret_cast<uintptr_t>(args.epilogue.residual);
  return accessed % (4 * element_bytes) == 0;
}

// As sm80's estimate, and as rough: it ranks, and predicts no time. Nothing of it has been measured.
inline double estimated_cycles(const Tile& t, const ConvShape& s, int element_bytes, const DeviceLimits& device) {
  const Rates& rate = rates(device);
  const int64_t tiles = num_tiles(t, s);
  const double strips = static_cast<double>(s.N * ceil_div(s.P, 2) * ceil_div(s.Q, 8)) / tiles;
  const double fragments = strips * (slab_channels(element_bytes) / kFilters) * kTaps *
                           (width(s.group_channels, element_bytes) * element_bytes / 32);
  const double arithmetic = fragments * 2 * (16 * 8 * 16) / rate.fma;
  const double shared = fragments * 512 / kBytesFromSmem;
  const double from_l2 = (stage_bytes(t) + strips * kStrip * kSpan) / rate.from_l2;
  // Instructions, of a warp two a cycle: 60 to copy four pixels, 120 for a strip's sixteen filters.
  const double instructions =
      stage_bytes(t) / kSpan / 4 * 30.0 + strips * (slab_channels(element_bytes) / kFilters) * 60;
  const int64_t all = tiles * num_slabs(s, element_bytes);
  const double tile_cycles = 300.0;  // barriers
  const double each = std::max({arithmetic, shared, from_l2, instructions}) + tile_cycles;
  return static_cast<double>(ceil_div(all, device.num_sms)) * each;
}

// What the device can run of this, with its estimate; empty where the problem is none of the kernel's.
inline std::vector<RankedConfig> ranked_configs(const ConvShape& s, int element_bytes, const DeviceLimits& device,
                                                bool is_aligned) {
  std::vector<RankedConfig> found;
  if (!why_not(s, element_bytes, is_aligned).empty()) return found;
  for (int i = 0; i < kNumTiles; ++i) {
    if (!why_illegal(kTiles[i], s, device).empty()) continue;
    found.push_back({estimated_cycles(kTiles[i], s, element_bytes, device), {kFirstTile + i, 1}});
  }
  return found;
}

}  // namespace grouped
}  // namespace fused_resnet
