// out[m, k] = act(scale[k] * sum x[n, p*stride - pad + r*dilation, ..., c] * w[k, r, s, c] + shift[k] + residual[m, k])
// Implicit GEMM for sm_90a: one thread brings stages by tensor copies, im2col among them, warpgroups multiply by wgmma.
// Blocks are persistent: the next tile's stages arrive while the last one's output is written.
// row m = (n, p, q), column k; reduction (r, s, c), c fastest, in steps of 64 channels of one tap.
#pragma once

#include "cuda/sm80/tile_layout.h"
#include "cuda/sm90/instructions.cuh"
#include "cuda/sm90/tiles.h"

namespace fused_resnet {
namespace sm90 {

// A tile with everything that follows from it, at compile time.
template <int kTileIndex>
struct TileTraits {
  static constexpr Tile kTile = kTiles[kTileIndex];
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kStages = kTile.stages;
  static constexpr int kConsumers = num_consumers(kTile), kThreads = num_threads(kTile);
  static constexpr int kInputBytes = input_bytes(kTile), kStageBytes = stage_bytes(kTile);
  static constexpr int kStagingBytes = staging_bytes(kTile);
  static constexpr int kSums = kBlockN / 2;                    // of a thread
  static constexpr int kRowChunks = kBlockN / kChunkElements;  // of a staged row
  static constexpr int kWarpRows = 16;                         // that a warp sums, stages and writes
  static_assert(kBlockM % kGroupRows == 0 && kBlockN % 64 == 0 && kBlockN <= 256, "shapes of wgmma");
  static_assert(kStageBytes % 1024 == 0, "eight rows of the swizzle's pattern");
  static constexpr int kProducerRegisters = producer_registers(kTile), kConsumerRegisters = consumer_registers(kTile);
};

// Shared memory: the ring, the staged output, the scales and shifts, the barriers.
template <int kTileIndex>
struct Memory {
  using Traits = TileTraits<kTileIndex>;
  unsigned char* base;

  __device__ __forceinline__ uint32_t input(int stage) const {
    return shared_address(base) + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ uint32_t weight(int stage) const { return input(stage) + Traits::kInputBytes; }
  __device__ __forceinline__ Chunk* staging(int row) const {
    unsigned char* staged = base + Traits::kStages * Traits::kStageBytes;
    return reinterpret_cast<Chunk*>(staged) + row * Traits::kRowChunks;
  }
  __device__ __forceinline__ ScaleShift* affine(int consumer) const {
    unsigned char* first = base + Traits::kStages * Traits::kStageBytes + Traits::kStagingBytes;
    return reinterpret_cast<ScaleShift*>(first) + consumer * Traits::kBlockN;
  }
  // Full: its bytes have arrived. Empty: every warp that multiplies has read it.
  __device__ __forceinline__ uint32_t full(int stage) const {
    return shared_address(affine(Traits::kConsumers)) + 16 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
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
template <int kTileIndex>
__device__ __forceinline__ void produce(const ConvShape& s, const TensorMap& x, const TensorMap& weight,
                                        const TileGrid& grid, const Memory<kTileIndex>& memory) {
  using Traits = TileTraits<kTileIndex>;
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
        for (int c = 0; c < s.C; c += kBlockK) {
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
template <class Element, int kTileIndex>
__device__ __forceinline__ void multiply_tile(const Memory<kTileIndex>& memory, int consumer, int lane, int steps,
                                              RingPlace<TileTraits<kTileIndex>::kStages>* place,
                                              float (&sums)[TileTraits<kTileIndex>::kSums]) {
  constexpr int kGroupBytes = kGroupRows * kBlockK * kElementBytes;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_barrier(memory.full(place->stage), place->parity);
    const uint64_t a = matrix_descriptor(memory.input(place->stage) + consumer * kGroupBytes);
    const uint64_t b = matrix_descriptor(memory.weight(place->stage));
    pin(sums);
    fence_wgmma();
#pragma unroll
    for (int part = 0; part < kBlockK / 16; ++part) multiply<Element>(sums, a + 2 * part, b + 2 * part);  // 32 bytes
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

// A warp's 16 rows of the output, from row m and column k on, in its part of the staging memory. Rows of the residual
// and of the output pass there in whole chunks; between, each thread finds its sums' places by ldmatrix and stmatrix.
template <class Element, int kTileIndex>
struct RowWriter {
  using Traits = TileTraits<kTileIndex>;
  static constexpr int kChunks = Traits::kRowChunks, kCopies = Traits::kWarpRows * kChunks / 32;

  const ConvArguments& args;
  Chunk* staged;
  int lane;

  // Eight chunks of the same column in neighbouring rows lie in different banks.
  __device__ __forceinline__ Chunk* at(int row, int chunk) const {
    return staged + row * kChunks + (chunk ^ (row & 7));
  }

  // f(staged chunk, offset in the output, how many of its columns exist there) for this thread's chunks.
  template <class F>
  __device__ __forceinline__ void for_chunks(int m, int k, F f) const {
    const int rows = static_cast<int>(num_rows(args.shape));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * 32 + lane, row = index / kChunks, chunk = index % kChunks;
      const int column = k + chunk * kChunkElements;
      f(at(row, chunk), (m + row) * int64_t{args.shape.K} + column, m + row < rows ? args.shape.K - column : 0);
    }
  }

  // Sets the residual on its way, with zeros where there is none.
  __device__ __forceinline__ void load_residual(int m, int k) const {
    const Element* residual = static_cast<const Element*>(args.epilogue.residual);
    if (residual == nullptr) return;
    for_chunks(m, k, [&](Chunk* to, int64_t offset, int num_columns) {
      if (args.has_vector_rows) {
        copy_async<16>(to, residual + offset, num_columns > 0);
      } else {
        Packed<Element> skip;
#pragma unroll
        for (int e = 0; e < kChunkElements; ++e) skip.load(e, e < num_columns ? residual + offset + e : nullptr);
        *to = skip.chunk;
      }
    });
    commit_copies();
  }

  template <Activation kActivation>
  __device__ __forceinline__ void finish(const float (&sums)[Traits::kSums], const ScaleShift* affine) const {
#pragma unroll
    for (int block = 0; block < Traits::kBlockN / 16; ++block) {  // of 16 x 16
      // Matrices i: rows 0-7 and 8-15 of the first eight columns, then of the others.
      float values[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = 2 * block + i / 2;
        const ScaleShift* columns = affine + 8 * half + accumulator_column(lane, 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          values[2 * i + e] = scaled<Element>(sums[4 * half + 2 * (i % 2) + e], columns[e]);
        }
      }
      const ChunkSource source = ldmatrix_a(lane, block);
      Chunk* place = at(source.row, source.chunk);
      if (args.epilogue.residual != nullptr) {
        Packed<Element> skip;
        load_matrices(skip.chunk.words, place);
#pragma unroll
        for (int v = 0; v < 8; ++v) values[v] = add_residual(args.epilogue, values[v], skip, v);
      }
      Packed<Element> result;
#pragma unroll
      for (int v = 0; v < 8; ++v) result.put(v, finished<Element>(args.epilogue, values[v], kActivation));
      store_matrices(place, result.chunk.words);
    }
  }

  __device__ __forceinline__ void finish(const float (&sums)[Traits::kSums], const ScaleShift* affine) const {
    switch (args.epilogue.activation) {
      case Activation::kNone:
        return finish<Activation::kNone>(sums, affine);
      case Activation::kRelu:
        return finish<Activation::kRelu>(sums, affine);
      case Activation::kRelu6:
        return finish<Activation::kRelu6>(sums, affine);
      case Activation::kSilu:
        return finish<Activation::kSilu>(sums, affine);
    }
  }

  __device__ __forceinline__ void store(int m, int k) const {
    Element* out = static_cast<Element*>(args.out);
    for_chunks(m, k, [&](const Chunk* from, int64_t offset, int num_columns) {
      Packed<Element> result;
      result.chunk = *from;
      if (args.has_vector_rows) {
        if (num_columns > 0) *reinterpret_cast<Chunk*>(out + offset) = result.chunk;
      } else {
#pragma unroll
        for (int e = 0; e < kChunkElements; ++e) {
          if (e < num_columns) out[offset + e] = result.elements[e];
        }
      }
    });
  }
};

// Every tile of this block, by one warpgroup: its 64 rows of each.
template <class Element, int kTileIndex>
__device__ __forceinline__ void consume(const ConvArguments& args, const TileGrid& grid,
                                        const Memory<kTileIndex>& memory, int consumer) {
  using Traits = TileTraits<kTileIndex>;
  const int thread = thread_index() % 128, lane = thread % 32;
  const int first_row = consumer * kGroupRows + thread / 32 * Traits::kWarpRows;  // the warp's, in a tile
  const RowWriter<Element, kTileIndex> rows{args, memory.staging(first_row), lane};
  ScaleShift* affine = memory.affine(consumer);
  const int steps = args.shape.R * args.shape.S * steps_of_tap(args.shape);
  RingPlace<Traits::kStages> place;
  for (int tile = static_cast<int>(block_index()); tile < grid.rows * grid.columns;
       tile += static_cast<int>(num_grid_blocks())) {
    const TilePlace at = tile_place(grid, tile);
    const int m = at.row * Traits::kBlockM + first_row, k = at.column * Traits::kBlockN;
    // What the epilogue needs, while the first stages are on their way. After the barrier all warps are done with the
    // last tile's scales.
    rows.load_residual(m, k);
    sync_warpgroup(1 + consumer);
    for (int column = thread; column < Traits::kBlockN; column += 128) {
      const bool exists = k + column < args.shape.K;
      affine[column] = exists ? scale_and_shift(args.epilogue, k + column) : ScaleShift{0.0f, 0.0f};
    }
    float sums[Traits::kSums];
    multiply_tile<Element, kTileIndex>(memory, consumer, lane, steps, &place, sums);

    wait_copies<0>();
    sync_warpgroup(1 + consumer);
    rows.finish(sums, affine);
    __syncwarp();
    rows.store(m, k);  // each thread from where it will load the next tile's residual
  }
}

__device__ __forceinline__ unsigned char* swizzled_memory() {
  extern __shared__ __align__(1024) unsigned char of_stages[];
  return of_stages;
}

// As many blocks as fit on the device, or as there are tiles; smem_bytes(kTile) of dynamic shared memory.
template <class Element, int kTileIndex>
__global__ void __launch_bounds__(TileTraits<kTileIndex>::kThreads, kTiles[kTileIndex].resident_blocks)
    conv_bn_act_kernel(const __grid_constant__ ConvArguments args, const __grid_constant__ TensorMap x,
                       const __grid_constant__ TensorMap weight) {
  using Traits = TileTraits<kTileIndex>;
  const Memory<kTileIndex> memory{swizzled_memory()};
  const int thread = thread_index(), group = thread / 128;
  if (thread == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      init_barrier(memory.full(stage), 1);
      init_barrier(memory.empty(stage), 4 * Traits::kConsumers);
    }
    fence_async_proxy();
  }
  sync_block();
  const TileGrid grid = tile_grid(args.shape, Traits::kBlockM, Traits::kBlockN);
  if (group == 0) {
    give_registers_back<Traits::kProducerRegisters>();
    if (thread == 0) produce<kTileIndex>(args.shape, x, weight, grid, memory);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Element, kTileIndex>(args, grid, memory, group - 1);
  }
}

}  // namespace sm90
}  // namespace fused_resnet
