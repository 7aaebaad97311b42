// The tiles the convolution kernel is compiled for, which of them a device can run, and which should be the cheapest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/conv_shape.h"

namespace fused_resnet {

// One block computes block_m rows by block_n columns with warps_m x warps_n warps and a ring of `stages` buffers.
// A stage holds 128 bytes of the reduction for every row and column: 64 half-precision elements or 32 TF32 ones.
struct Tile {
  int block_m, block_n, warps_m, warps_n, stages;
  int resident_blocks;  // the compiler is told to leave registers for this many blocks on a multiprocessor
  bool any_alignment;   // also compiled for channels that are not a multiple of 16 bytes
};

// A tile's index is in saved configs: new ones come last.
constexpr Tile kTiles[] = {
    {128, 128, 2, 4, 3, 1, false},  // enough rows and filters to fill the device
    {128, 64, 2, 2, 3, 2, true},    // 64 filters: layer1
    {64, 64, 2, 2, 3, 4, false},    // few rows: small maps, small batches
    {128, 16, 4, 1, 3, 4, true},    // few filters per group
    // tile 1 where a multiprocessor has 100 KB: two blocks, not one of 4 warps. Tile 0 has 8, and registers for no more
    {128, 64, 2, 2, 2, 2, false},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr int kStageRowBytes = 128;
constexpr int num_threads(const Tile& t) {
  return 32 * t.warps_m * t.warps_n;
}
constexpr int stage_bytes(const Tile& t) {
  return (t.block_m + t.block_n) * kStageRowBytes;
}
// Floats from one staged row of the output to the next. 8 of padding: the rows of an accumulator fragment then start 8
// banks apart. Rows of 16 have none, or 16 bytes of each of two fp32 rows would share their banks.
constexpr int staging_pitch(const Tile& t) {
  return t.block_n < 32 ? t.block_n : t.block_n + 8;
}
constexpr int staging_bytes(const Tile& t) {
  return t.block_m * staging_pitch(t) * 4;
}
constexpr int smem_bytes(const Tile& t) {
  return t.stages * stage_bytes(t) > staging_bytes(t) ? t.stages * stage_bytes(t) : staging_bytes(t);
}
constexpr int accumulators_per_thread(const Tile& t) {
  return t.block_m * t.block_n / num_threads(t);
}

struct DeviceLimits {
  int num_sms;
  int smem_per_block;  // opt-in maximum
  int smem_per_sm;
};

// The same on every device from sm_80 to sm_120 (CUDA C++ Programming Guide, technical specifications).
constexpr int kRegistersPerSm = 65536;
constexpr int kRegistersPerThread = 255;
constexpr int kThreadsPerBlock = 1024;
constexpr int kReservedSmemPerBlock = 1024;

// What ptxas may give a thread, handed out in eights, when resident_blocks are to fit.
constexpr int registers_per_thread(const Tile& t) {
  const int share = kRegistersPerSm / (t.resident_blocks * num_threads(t)) / 8 * 8;
  return share < kRegistersPerThread ? share : kRegistersPerThread;
}

// What a thread holds at once in the inner loop: sums and the fragments of one step.
constexpr int live_registers(const Tile& t) {
  return accumulators_per_thread(t) + 4 * (t.block_m / t.warps_m / 16) + 2 * (t.block_n / t.warps_n / 8);
}

// Null when the device can run the tile, else the hardware fact that forbids it.
inline const char* why_illegal(const Tile& t, const DeviceLimits& device, bool is_aligned) {
  if (!is_aligned && !t.any_alignment) return "compiled for 16-byte aligned channels only";
  if (num_threads(t) > kThreadsPerBlock) return "more than 1024 threads in a block";
  if (live_registers(t) > registers_per_thread(t)) return "more registers than its share of a multiprocessor";
  if (smem_bytes(t) > device.smem_per_block) return "more shared memory than a block may have";
  return nullptr;
}

inline int blocks_per_sm(const Tile& t, const DeviceLimits& device) {
  const int by_smem = device.smem_per_sm / (smem_bytes(t) + kReservedSmemPerBlock);
  return std::max(1, std::min(by_smem, t.resident_blocks));
}

// The problem as the cost model sees it: per group rows x columns, the reduction in bytes.
struct GemmSize {
  int64_t rows, columns, reduction_bytes;
  int64_t groups;
};

inline GemmSize gemm_size(const ConvShape& s, int element_bytes) {
  return {num_rows(s), s.group_filters, static_cast<int64_t>(s.reduction) * element_bytes, s.groups};
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t num_blocks(const Tile& t, const GemmSize& size) {
  return ceil_div(size.rows, t.block_m) * ceil_div(size.columns, t.block_n) * size.groups;
}

inline int64_t num_stages(const GemmSize& size) {
  return ceil_div(size.reduction_bytes, kStageRowBytes);
}

// The reduction may be split among blocks where there are too few tiles for the device. Their sums meet in fp32 in
// memory, where a second kernel adds them up in order.
constexpr int kMostSplits = 32;
constexpr int64_t kMostPartialBytes = int64_t{1} << 26;
constexpr double kBytesFromL2 = 64.0;  // per cycle and multiprocessor
// The second kernel's start and latency, about 2 us. A guess; it has not been measured.
constexpr double kSecondKernelCycles = 3000.0;

inline int64_t partial_bytes(const GemmSize& size, int splits) {
  return splits * size.rows * size.columns * size.groups * 4;
}

// The stages that part `split` sums: [first, last).
struct StageRange {
  int first, last;
};
FUSED_RESNET_HD StageRange stage_range(int num_stages, int splits, int split) {
  const int each = num_stages / splits, left = num_stages % splits;  // the first `left` parts have one more
  const int first = split * each + (split < left ? split : left);
  return {first, first + each + (split < left ? 1 : 0)};
}

// Cycles a multiprocessor needs, from data-sheet rates (A100: 1024 half-precision FMA, 128 bytes from shared memory
// and about 64 bytes from L2 per cycle). An estimate that ranks tiles and splits; it predicts no time.
inline double estimated_cycles(const Tile& t, const GemmSize& size, const DeviceLimits& device, int splits) {
  const double arithmetic = t.block_m * t.block_n / 16.0;
  const double shared = static_cast<double>(t.block_m * t.warps_n + t.block_n * t.warps_m);
  const double from_l2 = kStageRowBytes / kBytesFromL2 * (t.block_m + t.block_n);
  // the three overlap, but never quite: of what is hidden a quarter still shows, which prefers larger tiles, and more
  // where there are fewer than 8 warps to take turns
  const double longest = std::max({arithmetic, shared, from_l2});
  const int resident = blocks_per_sm(t, device);
  const double shown = std::max(0.25, 2.0 / (resident * t.warps_m * t.warps_n));
  const double per_stage = longest + (arithmetic + shared + from_l2 - longest) * shown;
  const double stages = static_cast<double>(ceil_div(num_stages(size), splits));
  const double epilogue = t.block_m * t.block_n / 8.0;
  // latency of the first loads, hidden only by other resident blocks; twice that where half as many are on their way
  const double fill = 1200.0 / (t.stages - 1);
  const int64_t blocks_on_busiest_sm = ceil_div(num_blocks(t, size) * splits, device.num_sms);
  const double rounds = static_cast<double>(ceil_div(blocks_on_busiest_sm, resident));
  const double first = static_cast<double>(blocks_on_busiest_sm) * (stages * per_stage + epilogue) + rounds * fill;
  if (splits == 1) return first;
  const double to_add = static_cast<double>(partial_bytes(size, splits)) / (kBytesFromL2 * device.num_sms);
  return first + kSecondKernelCycles + to_add;
}

// How to compute a problem: with which of kTiles, and in how many parts of the reduction.
struct ConvConfig {
  int tile, splits;
};

// Every config that the device can run, the cheapest first.
inline std::vector<ConvConfig> legal_configs(const GemmSize& size, const DeviceLimits& device, bool is_aligned) {
  std::vector<std::pair<double, ConvConfig>> found;
  const int most = static_cast<int>(std::min<int64_t>(kMostSplits, num_stages(size)));
  for (int splits = 1; splits <= most && (splits == 1 || partial_bytes(size, splits) <= kMostPartialBytes); ++splits) {
    for (int tile = 0; tile < kNumTiles; ++tile) {
      if (why_illegal(kTiles[tile], device, is_aligned) != nullptr) continue;
      found.push_back({estimated_cycles(kTiles[tile], size, device, splits), {tile, splits}});
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<ConvConfig> configs;
  for (const auto& [cycles, config] : found) configs.push_back(config);
  return configs;
}

}  // namespace fused_resnet
