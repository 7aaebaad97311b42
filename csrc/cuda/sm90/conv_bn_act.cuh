// out[m, k] = act(scale[k] * sum x[n, p*stride - pad + r*dilation, ..., c] * w[k, r, s, c] + shift[k] + residual[m, k])
// Implicit GEMM for sm_90a: one thread brings stages by tensor copies, im2col among them, warpgroups multiply by wgmma.
// Blocks are persistent: the next tile's stages arrive while the last one's output is written.
// row m = (n, p, q), column k; reduction (r, s, c), c fastest, in steps of 128 bytes of one tap's channels.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/tiles.h"
#include "cuda/sm90/tma.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace fused_resnet {
namespace sm90 {

// A tile with everything that follows from it, at compile time.
template <class Element, int kTileIndex>
struct TileTraits {
  static constexpr Tile kTile = kTiles[kTileIndex];
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kStages = kTile.stages;
  static constexpr int kBlockK = block_k(sizeof(Element));
  static constexpr int kConsumers = num_consumers(kTile), kThreads = num_threads(kTile);
  static constexpr int kInputBytes = input_bytes(kTile), kStageBytes = stage_bytes(kTile);
  static constexpr int kStagingBytes = staging_bytes(kTile, sizeof(Element));
  static constexpr int kSums = kBlockN / 2;  // of a thread
  static_assert(kBlockM % kGroupRows == 0 && kBlockN % 64 == 0 && kBlockN <= 256, "shapes of wgmma");
  static_assert(kStageBytes % 1024 == 0, "eight rows of the swizzle's pattern");
  static constexpr int kProducerRegisters = producer_registers(kTile), kConsumerRegisters = consumer_registers(kTile);
};

// Shared memory: the ring, the staged output, the scales and shifts, the barriers.
template <class Traits>
struct Memory {
  unsigned char* base;

  __device__ __forceinline__ uint32_t input(int stage) const {
    return shared_address(base) + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ uint32_t weight(int stage) const { return input(stage) + Traits::kInputBytes; }
  __device__ __forceinline__ unsigned char* staging(int consumer) const {
    return base + Traits::kStages * Traits::kStageBytes + consumer * (Traits::kStagingBytes / Traits::kConsumers);
  }
  __device__ __forceinline__ ScaleShift* affine(int consumer) const {
    return reinterpret_cast<ScaleShift*>(staging(Traits::kConsumers)) + consumer * Traits::kBlockN;
  }
  // Full: its bytes have arrived. Empty: every warp that multiplies has read it.
  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared_address(affine(Traits::kConsumers)) + 16 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
  // Of the consumer's rows.
  __device__ __forceinline__ uint32_t residual(int consumer) const { return full(Traits::kStages) + 8 * consumer; }
};

// A position in the ring, and the parity of its round.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Every stage of every tile of this block, by one thread.
template <class Traits>
__device__ __forceinline__ void produce(const ConvShape& s, const TensorMap& x, const TensorMap& weight,
                                        const TileGrid& grid, const Memory<Traits>& memory) {
  RingPlace<Traits::kStages> place;
  const bool is_matrix = is_plain(s);
  for (int tile = static_cast<int>(block_index()); tile < grid.rows * grid.columns;
       tile += static_cast<int>(num_grid_blocks())) {
    const TilePlace at = tile_place(grid, tile);
    const int m = at.row * Traits::kBlockM, k = at.column * Traits::kBlockN;
    const RowOrigin origin = row_origin(s, m);
    const int p = static_cast<int>(s.by_columns.divide(origin.pixel)), q = static_cast<int>(origin.pixel) - p * s.Q;
    const int n = static_cast<int>(origin.n), h = p * s.stride_h - s.pad_h, w = q * s.stride_w - s.pad_w;
    int tap = 0;
    for (int r = 0; r < s.R; ++r) {
      for (int t = 0; t < s.S; ++t, ++tap) {
#pragma unroll 1
        for (int c = 0; c < s.C; c += Traits::kBlockK) {
          const uint32_t full = memory.full(place.stage);
          wait_barrier(memory.empty(place.stage), place.parity ^ 1);
          arrive_and_expect(full, Traits::kStageBytes);
          if (is_matrix) {
            copy_box(memory.input(place.stage), x, c, m, full);
          } else {
            copy_pixels(memory.input(place.stage), x, c, w, h, n, t * s.dilation_w, r * s.dilation_h, full);
          }
          copy_box(memory.weight(place.stage), weight, c, tap, k, full);
          place.advance();
        }
      }
    }
  }
}

// The sums of a tile: 64 rows of a warpgroup. One group of products runs while the next stage is awaited.
template <class Element, class Traits>
__device__ __forceinline__ void multiply_tile(const Memory<Traits>& memory, int consumer, int lane, int steps,
                                              RingPlace<Traits::kStages>* place, Sum<Element> (&sums)[Traits::kSums]) {
#pragma unroll
  for (Sum<Element>& sum : sums) sum = 0;
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_barrier(memory.full(place->stage), place->parity);
    const uint64_t a = matrix_descriptor(memory.input(place->stage) + consumer * kGroupRows * kSpan);
    const uint64_t b = matrix_descriptor(memory.weight(place->stage));
    pin(sums);
    fence_wgmma();
#pragma unroll
    for (int part = 0; part < kSpan / 32; ++part) multiply<Element>(sums, a + 2 * part, b + 2 * part);  // 32 bytes
    commit_wgmma();
    pin(sums);
    if (step > 0) {
      wait_wgmma<1>();
      if (lane == 0) arrive(memory.empty(before));
    }
    before = place->stage;
    place->advance();
  }
  wait_wgmma<0>();
  pin(sums);
  if (lane == 0) arrive(memory.empty(before));
}

// Every tile of this block, by one warpgroup: its 64 rows of each.
template <class Element, class Traits>
__device__ __forceinline__ void consume(const ConvArguments& args, const TensorMap& residual, const TensorMap& out,
                                        const TileGrid& grid, const Memory<Traits>& memory, int consumer) {
  const int thread = thread_index() % 128, lane = thread % 32, barrier = 1 + consumer;
  const OutputRows<Element, Traits::kBlockN> rows{
      args, residual, out, memory.staging(consumer), memory.residual(consumer), thread};
  ScaleShift* affine = memory.affine(consumer);
  const int steps = args.shape.R * args.shape.S * steps_of_tap(args.shape, sizeof(Element));
  RingPlace<Traits::kStages> place;
  uint32_t parity = 0;
  for (int tile = static_cast<int>(block_index()); tile < grid.rows * grid.columns;
       tile += static_cast<int>(num_grid_blocks()), parity ^= 1) {
    const TilePlace at = tile_place(grid, tile);
    const int m = at.row * Traits::kBlockM + consumer * kGroupRows, k = at.column * Traits::kBlockN;
    // What the epilogue needs, while the first stages are on their way. After the barrier all warps are done with the
    // last tile's scales.
    rows.load_residual(m, k);
    sync_warpgroup(barrier);
    for (int column = thread; column < Traits::kBlockN; column += 128) {
      const bool exists = k + column < args.shape.K;
      affine[column] = exists ? scale_and_shift(args.epilogue, k + column) : ScaleShift{0.0f, 0.0f};
    }
    Sum<Element> sums[Traits::kSums];
    multiply_tile<Element>(memory, consumer, lane, steps, &place, sums);

    sync_warpgroup(barrier);
    rows.wait_residual(parity);
    rows.finish(sums, affine);
    rows.store(m, k, barrier);
  }
  if (args.has_vector_rows && thread == 0) wait_stores();  // shared memory ends with the block
}

__device__ __forceinline__ unsigned char* swizzled_memory() {
  extern __shared__ __align__(1024) unsigned char of_stages[];
  return of_stages;
}

// As many blocks as fit on the device, or as there are tiles; smem_bytes(kTile, sizeof(Element)) of dynamic shared
// memory.
template <class Element, int kTileIndex>
__global__ void __launch_bounds__(num_threads(kTiles[kTileIndex]), kTiles[kTileIndex].resident_blocks)
    conv_bn_act_kernel(const __grid_constant__ ConvArguments args, const __grid_constant__ TensorMap x,
                       const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap residual,
                       const __grid_constant__ TensorMap out) {
  using Traits = TileTraits<Element, kTileIndex>;
  const Memory<Traits> memory{swizzled_memory()};
  const int thread = thread_index(), group = thread / 128;
  if (thread == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      init_barrier(memory.full(stage), 1);
      init_barrier(memory.empty(stage), 4 * Traits::kConsumers);
    }
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) init_barrier(memory.residual(consumer), 1);
    fence_async_proxy();
  }
  sync_block();
  const TileGrid grid = tile_grid(args.shape, Traits::kBlockM, Traits::kBlockN);
  if (group == 0) {
    give_registers_back<Traits::kProducerRegisters>();
    if (thread == 0) produce(args.shape, x, weight, grid, memory);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Element>(args, residual, out, grid, memory, group - 1);
  }
}

}  // namespace sm90
}  // namespace fused_resnet
