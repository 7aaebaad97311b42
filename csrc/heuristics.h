// The tiles the convolution kernel is compiled for, which of them a device can run, and which one to take.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_resnet {

// One block computes block_m rows by block_n columns with warps_m x warps_n warps and a ring of `stages` buffers.
// A stage holds 128 bytes of the reduction for every row and column: 64 half-precision elements or 32 TF32 ones.
struct Tile {
  int block_m, block_n, warps_m, warps_n, stages;
  int resident_blocks;  // the compiler is told to leave registers for this many blocks on a multiprocessor
  bool any_alignment;   // also compiled for channels that are not a multiple of 16 bytes
};

constexpr Tile kTiles[] = {
    {128, 128, 2, 4, 3, 1, false},  // enough rows and filters to fill the device
    {128, 64, 2, 2, 3, 2, true},    // 64 filters: layer1
    {64, 64, 2, 2, 3, 4, false},    // few rows: small maps, small batches
    {128, 16, 4, 1, 3, 4, true},    // few filters per group
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr int kStageRowBytes = 128;
// 8 floats of padding: the rows of an accumulator fragment then start 8 banks apart
constexpr int kStagingPad = 8;

constexpr int num_threads(const Tile& t) {
  return 32 * t.warps_m * t.warps_n;
}
constexpr int stage_bytes(const Tile& t) {
  return (t.block_m + t.block_n) * kStageRowBytes;
}
constexpr int staging_bytes(const Tile& t) {
  return t.block_m * (t.block_n + kStagingPad) * 4;
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

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t num_blocks(const Tile& t, const GemmSize& size) {
  return ceil_div(size.rows, t.block_m) * ceil_div(size.columns, t.block_n) * size.groups;
}

// Cycles a multiprocessor needs, from data-sheet rates (A100: 1024 half-precision FMA, 128 bytes from shared memory
// and about 64 bytes from L2 per cycle). An estimate that ranks tiles; it predicts no time.
inline double estimated_cycles(const Tile& t, const GemmSize& size, const DeviceLimits& device) {
  const double arithmetic = t.block_m * t.block_n / 16.0;
  const double shared = static_cast<double>(t.block_m * t.warps_n + t.block_n * t.warps_m);
  const double from_l2 = 2.0 * (t.block_m + t.block_n);
  // the three overlap, but never quite: a quarter of what is hidden still shows, which prefers larger tiles
  const double longest = std::max({arithmetic, shared, from_l2});
  const double per_stage = longest + (arithmetic + shared + from_l2 - longest) / 4.0;
  const double stages = static_cast<double>(ceil_div(size.reduction_bytes, kStageRowBytes));
  const double epilogue = t.block_m * t.block_n / 8.0;
  const double fill = 600.0;  // latency of the first loads, hidden only by other resident blocks
  const int resident = blocks_per_sm(t, device);
  const int64_t blocks_on_busiest_sm = ceil_div(num_blocks(t, size), device.num_sms);
  const double rounds = static_cast<double>(ceil_div(blocks_on_busiest_sm, resident));
  return static_cast<double>(blocks_on_busiest_sm) * (stages * per_stage + epilogue) + rounds * fill;
}

// Index into kTiles of the cheapest legal tile, or -1 if the device can run none.
inline int choose_tile(const GemmSize& size, const DeviceLimits& device, bool is_aligned) {
  int best = -1;
  double best_cycles = 0;
  for (int i = 0; i < kNumTiles; ++i) {
    if (why_illegal(kTiles[i], device, is_aligned) != nullptr) continue;
    const double cycles = estimated_cycles(kTiles[i], size, device);
    if (best < 0 || cycles < best_cycles) {
      best = i;
      best_cycles = cycles;
    }
  }
  return best;
}

}  // namespace fused_resnet
