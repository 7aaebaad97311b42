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
  static constexpr int kCluster = kTile.cluster, kShare = kBlockN / kCluster;  // of the filters, that a block brings
  static constexpr int kBlockK = block_k(sizeof(Element));
  static constexpr int kConsumers = num_consumers(kTile), kThreads = num_threads(kTile);
  static constexpr int kInputBytes = input_bytes(kTile), kStageBytes = stage_bytes(kTile);
  static constexpr int kStagingBytes = staging_bytes(kTile, sizeof(Element));
  static constexpr int kSums = kBlockN / 2;  // of a thread
  static_assert(kBlockM % kGroupRows == 0 && kBlockN % 64 == 0 && kBlockN <= 256, "shapes of wgmma");
  static_assert(kStageBytes % 1024 == 0 && kShare % 8 == 0, "eight rows of the swizzle's pattern");
  static_assert(kBlockM * kCluster <= kMostTileRows, "rows behind the last one are counted in 32 bits");
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
  // Full: its bytes have arrived. Empty: every warp of the cluster that multiplies has read it.
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

// Other blocks bring bytes of a stage too, and read what this one brings.
template <class Traits>
__device__ __forceinline__ void wait_stage(uint32_t barrier, uint32_t parity) {
  if constexpr (Traits::kCluster == 1) {
    wait_barrier(barrier, parity);
  } else {
    wait_cluster_barrier(barrier, parity);
  }
}

// Which tile a block takes next. Those of a cluster are below each other.
template <class Traits>
struct TileWalk {
  TileGrid grid;
  int index = static_cast<int>(block_index()) / Traits::kCluster;

  __device__ __forceinline__ static int rank() { return static_cast<int>(block_index()) % Traits::kCluster; }
  __device__ __forceinline__ bool has_tile() const { return index < grid.rows * grid.columns; }
  __device__ __forceinline__ void advance() { index += static_cast<int>(num_grid_blocks()) / Traits::kCluster; }
  // Its first row and column of the output.
  __device__ __forceinline__ TilePlace origin() const {
    const TilePlace at = tile_place(grid, index);
    return {(at.row * Traits::kCluster + rank()) * Traits::kBlockM, at.column * Traits::kBlockN};
  }
};

// Every stage of every tile of this block, by one thread.
template <class Traits>
__device__ __forceinline__ void produce(const ConvShape& s, const TensorMap& x, const TensorMap& weight,
                                        TileWalk<Traits> walk, const Memory<Traits>& memory) {
  RingPlace<Traits::kStages> place;
  const bool is_matrix = is_plain(s);
  for (; walk.has_tile(); walk.advance()) {
    const auto [m, k] = walk.origin();
    const RowOrigin origin = row_origin(s, m);
    const int p = static_cast<int>(s.by_columns.divide(origin.pixel)), q = static_cast<int>(origin.pixel) - p * s.Q;
    const int n = static_cast<int>(origin.n), h = p * s.stride_h - s.pad_h, w = q * s.stride_w - s.pad_w;
    int tap = 0;
    for (int r = 0; r < s.R; ++r) {
      for (int t = 0; t < s.S; ++t, ++tap) {
#pragma unroll 1
        for (int c = 0; c < s.C; c += Traits::kBlockK) {
          const uint32_t full = memory.full(place.stage);
          wait_stage<Traits>(memory.empty(place.stage), place.parity ^ 1);
          arrive_and_expect(full, Traits::kStageBytes);
          if (is_matrix) {
            copy_box(memory.input(place.stage), x, c, m, full);
          } else {
            copy_pixels(memory.input(place.stage), x, c, w, h, n, t * s.dilation_w, r * s.dilation_h, full);
          }
          if constexpr (Traits::kCluster == 1) {
            copy_box(memory.weight(place.stage), weight, c, tap, k, full);
          } else {
            const int first = walk.rank() * Traits::kShare;
            copy_box_to_blocks(memory.weight(place.stage) + first * kSpan, weight, c, tap, k + first, full,
                               (1 << Traits::kCluster) - 1);
          }
          place.advance();
        }
      }
    }
  }
}

// The warp has read the stage: says so in every block that writes there.
template <class Traits>
__device__ __forceinline__ void release(const Memory<Traits>& memory, int stage, int lane) {
  if constexpr (Traits::kCluster == 1) {
    if (lane == 0) arrive(memory.empty(stage));
  } else {
    if (lane < Traits::kCluster) arrive_in_block(address_in_block(memory.empty(stage), lane));
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
    wait_stage<Traits>(memory.full(place->stage), place->parity);
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
      release(memory, before, lane);
    }
    before = place->stage;
    place->advance();
  }
  wait_wgmma<0>();
  pin(sums);
  release(memory, before, lane);
}

// Every tile of this block, by one warpgroup: its 64 rows of each.
template <class Element, class Traits>
__device__ __forceinline__ void consume(const ConvArguments& args, const TensorMap& residual, const TensorMap& out,
                                        TileWalk<Traits> walk, const Memory<Traits>& memory, int consumer) {
  const int thread = thread_index() % 128, lane = thread % 32, barrier = 1 + consumer;
  const OutputRows<Element, Traits::kBlockN> rows{
      args, residual, out, memory.staging(consumer), memory.residual(consumer), thread};
  ScaleShift* affine = memory.affine(consumer);
  const int steps = args.shape.R * args.shape.S * steps_of_tap(args.shape, sizeof(Element));
  RingPlace<Traits::kStages> place;
  uint32_t parity = 0;
  for (; walk.has_tile(); walk.advance(), parity ^= 1) {
    const auto [first_row, k] = walk.origin();
    const int m = first_row + consumer * kGroupRows;
    // What the epilogue needs, while the first stages are on their way.
    rows.load_residual(m, k);
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
__global__ void __cluster_dims__(kTiles[kTileIndex].cluster, 1, 1)
    __launch_bounds__(num_threads(kTiles[kTileIndex]), kTiles[kTileIndex].resident_blocks)
        conv_bn_act_kernel(const __grid_constant__ ConvArguments args, const __grid_constant__ TensorMap x,
                           const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap residual,
                           const __grid_constant__ TensorMap out) {
  using Traits = TileTraits<Element, kTileIndex>;
  const Memory<Traits> memory{swizzled_memory()};
  const int thread = thread_index(), group = thread / 128;
  if (thread == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      init_barrier(memory.full(stage), 1);
      init_barrier(memory.empty(stage), 4 * Traits::kConsumers * Traits::kCluster);
    }
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) init_barrier(memory.residual(consumer), 1);
    fence_async_proxy();
    if constexpr (Traits::kCluster > 1) fence_barrier_init();
  }
  if constexpr (Traits::kCluster > 1) {
    sync_cluster();
  } else {
    sync_block();
  }
  const TileWalk<Traits> walk{tile_grid(args.shape, Traits::kBlockM * Traits::kCluster, Traits::kBlockN)};
  if (group == 0) {
    give_registers_back<Traits::kProducerRegisters>();
    if (thread == 0) produce(args.shape, x, weight, walk, memory);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Element>(args, residual, out, walk, memory, group - 1);
  }
  if constexpr (Traits::kCluster > 1) sync_cluster();  // others may still write to this block's memory
}

}  // namespace sm90
}  // namespace fused_resnet
