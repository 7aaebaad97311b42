// The tiles the convolution kernel is compiled for, which of them a device can run, and which should be the cheapest.
#pragma once

#include <algorithm>
#include <cstdint>
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
  int capability;  // 10 * major + minor
};

// What a multiprocessor does in a cycle, so that clocks do not matter. Data-sheet rates: they rank, and predict no
// time.
struct Rates {
  int capability;  // from this one on, up to the next
  double fma;      // half-precision products that mma.sync adds up in fp32; half as many in TF32, on all of them
  double from_l2;  // bytes
};
// fma is FLOP/s / 2 / multiprocessors / clock.
constexpr Rates kRates[] = {
    // A100 whitepaper: 312 TFLOP/s, 108 at 1.41 GHz. L2: 64 is what one multiprocessor can take, a guess; all together
    // have 5120 / 108 = 47 (whitepaper)
    {80, 1024.0, 64.0},
    // GA102 whitepaper, RTX 3090: 71 TFLOP/s, 82 at 1.695 GHz; an A10 or A6000 has twice that. L2: not published, a
    // guess
    {86, 256.0, 32.0},
    // Ada whitepaper, RTX 4090: 165.2 TFLOP/s, 128 at 2.52 GHz; an L4 or L40S has twice that. L2: a guess
    {89, 256.0, 32.0},
    // H100 whitepaper: 989 TFLOP/s, 132 at 1.83 GHz = 2048 by WGMMA, of which mma.sync reaches 62.9 % (arXiv
    // 2501.12084, 6.2). L2: the A100's 5120 for 132 instead of 108 multiprocessors
    {90, 1288.0, 52.0},
    // Nothing is published about mma.sync on a B200: the A100's figures, a guess
    {100, 1024.0, 64.0},
    // RTX Blackwell whitepaper, RTX 5090: 209.5 TFLOP/s, 170 at 2.407 GHz. L2: a guess
    {120, 256.0, 32.0},
};
// 32 banks of 4 bytes, on all of them (CUDA C++ Programming Guide).
constexpr double kBytesFromSmem = 128.0;

inline const Rates& rates(const DeviceLimits& device) {
  const Rates* found = kRates;
  for (const Rates& row : kRates) {
    if (row.capability <= device.capability) found = &row;
  }
  return *found;
}

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
// The second kernel's start and latency, about 2 us. A guess; it has not been measured.
constexpr double kSecondKernelCycles = 3000.0;
// A thread of it adds a chunk of a row up.
constexpr int kSumThreads = 128;
inline int64_t num_sum_blocks(const ConvShape& s, int chunk) {
  return ceil_div(num_rows(s) * ceil_div(s.K, chunk), kSumThreads);
}

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

// Cycles a multiprocessor needs, by the rates of its kind. An estimate that ranks tiles and splits; it predicts no
// time. What comes from DRAM is left out: every tile reads it about once.
inline double estimated_cycles(const Tile& t, const GemmSize& size, const DeviceLimits& device, int splits) {
  const Rates& rate = rates(device);
  const double arithmetic = t.block_m * t.block_n * (kStageRowBytes / 2) / rate.fma;
  const double shared = kStageRowBytes / kBytesFromSmem * (t.block_m * t.warps_n + t.block_n * t.warps_m);
  const double from_l2 = kStageRowBytes / rate.from_l2 * (t.block_m + t.block_n);
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
  const double to_add = static_cast<double>(partial_bytes(size, splits)) / (rate.from_l2 * device.num_sms);
  return first + kSecondKernelCycles + to_add;
}

// How to compute a problem: with which of kTiles, and in how many parts of the reduction.
struct ConvConfig {
  int tile, splits;
};

struct RankedConfig {
  double cycles;  // estimated
  ConvConfig config;
};

// The configs alone, the cheapest first.
inline std::vector<ConvConfig> in_order(std::vector<RankedConfig> found) {
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.cycles < b.cycles; });
  std::vector<ConvConfig> configs;
  for (const RankedConfig& one : found) configs.push_back(one.config);
  return configs;
}

// Every config that the device can run.
inline std::vector<RankedConfig> ranked_configs(const GemmSize& size, const DeviceLimits& device, bool is_aligned) {
  std::vector<RankedConfig> found;
  const int most = static_cast<int>(std::min<int64_t>(kMostSplits, num_stages(size)));
  for (int splits = 1; splits <= most && (splits == 1 || partial_bytes(size, splits) <= kMostPartialBytes); ++splits) {
    for (int tile = 0; tile < kNumTiles; ++tile) {
      if (why_illegal(kTiles[tile], device, is_aligned) != nullptr) continue;
      found.push_back({estimated_cycles(kTiles[tile], size, device, splits), {tile, splits}});
    }
  }
  return found;
}

inline std::vector<ConvConfig> legal_configs(const GemmSize& size, const DeviceLimits& device, bool is_aligned) {
  return in_order(ranked_configs(size, device, is_aligned));
}

}  // namespace fused_resnet
