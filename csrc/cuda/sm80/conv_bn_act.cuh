// out[m, k] = act(scale[k] * sum x[n, p*stride - pad + r*dilation, ..., c] * w[k, r, s, c] + shift[k] + residual[m, k])
// Implicit GEMM for sm_80 and later: cp.async ring, ldmatrix, mma.sync, output through shared memory. Sums are fp32; of
// elements of one byte, u8 or s8 with s8 weights, int32.
// row m = (n, p, q), column k; reduction (r, s, c), c fastest.
#pragma once

#include "cuda/sm80/instructions.cuh"
#include "cuda/sm80/tile_layout.h"
#include "cuda/sm80/tiles.h"

namespace fused_resnet {

// A tile with everything that follows from it and from the element, at compile time.
template <class Element, int kTileIndex>
struct TileTraits {
  static constexpr Tile kTile = kTiles[kTileIndex];
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kStages = kTile.stages;
  static constexpr int kWarpsN = kTile.warps_n;
  static constexpr int kThreads = num_threads(kTile), kStageBytes = stage_bytes(kTile);
  static constexpr int kWarpM = kBlockM / kTile.warps_m, kWarpN = kBlockN / kTile.warps_n;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Element));  // elements in 16 bytes
  static constexpr int kBlockK = kChunk * kChunksPerRow;
  static constexpr int kRowsPerCopy = kThreads / kChunksPerRow;
  static constexpr int kCopiesA = kBlockM / kRowsPerCopy, kCopiesB = kBlockN / kRowsPerCopy;
  static constexpr int kPitch = staging_pitch(kTile);
  static_assert(kBlockM % kRowsPerCopy == 0 && kBlockN % kRowsPerCopy == 0, "every thread copies as many chunks");
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "ldmatrix.x4 loads 16 rows or columns");
  static_assert(kRowsPerCopy % 8 == 0, "a thread's rows share row % 8, and with it their swizzle");
};

// One thread's part of filling a stage. kCopyBytes: what copy_bytes() says of the shape and the pointers. A chunk is
// one copy or several, each within one tap; with 0 each element is looked up by itself.
template <class Element, int kTileIndex, int kCopyBytes>
struct StageLoader {
  using Traits = TileTraits<Element, kTileIndex>;

  // Rows keep 32-bit offsets from the tile's first row; in copies where they can be, which is the wider range.
  static constexpr int kUnit = offset_unit(kCopyBytes, sizeof(Element));

  const ConvShape& shape;
  const Element* x;       // the window's corner of the tile's first row
  const Element* weight;  // this thread's first filter
  int32_t offsets[Traits::kCopiesA], h[Traits::kCopiesA], w[Traits::kCopiesA];
  int num_filters;  // of this thread's filters, how many exist
  int chunk, row;

  __device__ __forceinline__ StageLoader(const ConvArguments& args, const BlockOrigin& origin, int thread)
      : shape(args.shape), chunk(copy_chunk(thread)), row(copy_row(thread)) {
    const RowOrigin first = row_origin(shape, origin.m);
    const int64_t base = input_row(shape, first, 0, origin.group).offset;
    x = static_cast<const Element*>(args.x) + base;
#pragma unroll
    for (int i = 0; i < Traits::kCopiesA; ++i) {
      const InputRow r = input_row(shape, first, row + i * Traits::kRowsPerCopy, origin.group);
      offsets[i] = static_cast<int32_t>((r.offset - base) / kUnit);
      h[i] = r.h;
      w[i] = r.w;
    }
    const int k = origin.k + row;
    const int64_t filter = static_cast<int64_t>(origin.group) * shape.group_filters + k;
    weight = static_cast<const Element*>(args.weight) + filter * shape.reduction;
    num_filters = k < shape.group_filters ? (shape.group_filters - k - 1) / Traits::kRowsPerCopy + 1 : 0;
  }

  __device__ __forceinline__ const Element* source(int i, const Tap& tap) const {
    return x + tap.offset + static_cast<int64_t>(offsets[i]) * kUnit;
  }
  __device__ __forceinline__ bool is_valid(int i, const Tap& tap) const {
    return is_inside(shape, {0, h[i], w[i]}, tap);
  }

  __device__ __forceinline__ void load(unsigned char* stage, int step) const {
    const int k = step * Traits::kBlockK + chunk * Traits::kChunk;
    // rows of one thread are a multiple of eight apart, so their swizzled chunk is the same
    Chunk* a = reinterpret_cast<Chunk*>(stage) + chunk_position(row, chunk);
    Chunk* b = a + Traits::kBlockM * kChunksPerRow;
    if constexpr (kCopyBytes == 0) {
      load_elements(a, b, k);
    } else {
#pragma unroll
      for (int at = 0; at < Traits::kChunk; at += kUnit) copy(a, b, k, at);
    }
  }

  // kCopyBytes of each of the chunks, from their element `at` on.
  __device__ __forceinline__ void copy(Chunk* a, Chunk* b, int first_k, int at) const {
    constexpr int kNext = Traits::kRowsPerCopy * Traits::kBlockK;
    Element* to_a = reinterpret_cast<Element*>(a) + at;
    Element* to_b = reinterpret_cast<Element*>(b) + at;
    const int k = first_k + at;
    const Tap tap = filter_tap(shape, k);
#pragma unroll
    for (int i = 0; i < Traits::kCopiesA; ++i) {
      copy_async<kCopyBytes>(to_a + i * kNext, source(i, tap), is_valid(i, tap));
    }
#pragma unroll
    for (int i = 0; i < Traits::kCopiesB; ++i) {
      const Element* filter = weight + static_cast<int64_t>(i) * Traits::kRowsPerCopy * shape.reduction + k;
      copy_async<kCopyBytes>(to_b + i * kNext, filter, i < num_filters && k < shape.reduction);
    }
  }

  // The same chunks, looked up element by element. Four bytes at a time: more would not leave registers for the sums.
  __device__ __forceinline__ void load_elements(Chunk* a, Chunk* b, int first_k) const {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Element));
    constexpr int kNext = Traits::kRowsPerCopy * kChunksPerRow;
#pragma unroll 1
    for (int word = 0; word < 4; ++word) {
      const int k = first_k + word * kPerWord;
      Tap taps[kPerWord];
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) taps[e] = filter_tap(shape, k + e);
#pragma unroll
      for (int i = 0; i < Traits::kCopiesA; ++i) {
        Packed<Element> values;
#pragma unroll
        for (int e = 0; e < kPerWord; ++e) {
          values.load(e, is_valid(i, taps[e]) ? source(i, taps[e]) : nullptr);
        }
        a[i * kNext].words[word] = values.chunk.words[0];
      }
#pragma unroll
      for (int i = 0; i < Traits::kCopiesB; ++i) {
        const Element* filter = weight + static_cast<int64_t>(i) * Traits::kRowsPerCopy * shape.reduction + k;
        Packed<Element> values;
#pragma unroll
        for (int e = 0; e < kPerWord; ++e) {
          values.load(e, i < num_filters && k + e < shape.reduction ? filter + e : nullptr);
        }
        b[i * kNext].words[word] = values.chunk.words[0];
      }
    }
  }
};

// acc += the stage's A (warp's rows) times its B (warp's columns).
template <class Element, int kTileIndex>
__device__ __forceinline__ void multiply_stage(
    const unsigned char* stage, int warp_row, int warp_column, int lane,
    Sum<Element> (&acc)[TileTraits<Element, kTileIndex>::kMmaM][TileTraits<Element, kTileIndex>::kMmaN][4]) {
  using Traits = TileTraits<Element, kTileIndex>;
  const Chunk* a_tile = reinterpret_cast<const Chunk*>(stage);
  const Chunk* b_tile = a_tile + Traits::kBlockM * kChunksPerRow;
#pragma unroll
  for (int step = 0; step < kStepsPerStage; ++step) {
    uint32_t a[Traits::kMmaM][4], b[Traits::kMmaN / 2][4];
    const ChunkSource from_a = ldmatrix_a(lane, step), from_b = ldmatrix_b(lane, step);
#pragma unroll
    for (int i = 0; i < Traits::kMmaM; ++i) {
      load_matrices(a[i], a_tile + chunk_position(warp_row + i * 16 + from_a.row, from_a.chunk));
      prepare_fragment<Element>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < Traits::kMmaN / 2; ++j) {
      load_matrices(b[j], b_tile + chunk_position(warp_column + j * 16 + from_b.row, from_b.chunk));
      prepare_fragment<Element>(b[j]);
    }
#pragma unroll
    for (int i = 0; i < Traits::kMmaM; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kMmaN; ++j) {
        multiply_accumulate<Element>(acc[i][j], a[i], b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
      }
    }
  }
}

template <class S>
struct alignas(8) Pair {
  S first, second;
};

// A row's next Traits::kChunk staged sums, sixteen bytes at a time.
template <class Traits, class S>
__device__ __forceinline__ void load_staged(const S* staged, int row, int column, S (&sums)[Traits::kChunk]) {
#pragma unroll
  for (int q = 0; q < Traits::kChunk; q += 4) {
    Packed<S> quad;
    quad.chunk = *reinterpret_cast<const Chunk*>(staged + staging_position(row, column + q, Traits::kPitch));
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[q + e] = quad.elements[e];
  }
}

// The fast end: 16-byte rows, no splits; the activation and whether there is a residual are known at compile time, so
// that the loop over rows has no branches and all of a thread's residual is on its way at once.
template <class Element, int kTileIndex>
struct RowWriter {
  using Traits = TileTraits<Element, kTileIndex>;
  static constexpr int kChunk = Traits::kChunk, kChunks = Traits::kBlockN / kChunk;
  static constexpr int kStep = Traits::kThreads / kChunks, kRows = Traits::kBlockM / kStep;
  static constexpr int kAtOnce = kRows < 8 ? kRows : 8;

  template <Activation kActivation, bool kHasResidual>
  static __device__ __forceinline__ void write(const ConvArguments& args, int64_t offset, int num_rows, int first,
                                               const ScaleShift* affine, const Sum<Element>* staged, int column) {
    const Element* residual = static_cast<const Element*>(args.epilogue.residual) + offset;
    Element* out = static_cast<Element*>(args.out) + offset;
    const int64_t pitch = static_cast<int64_t>(kStep) * args.shape.K;
#pragma unroll 1
    for (int row = first; row < num_rows; row += kAtOnce * kStep) {
      Packed<Element> skip[kAtOnce];
      if constexpr (kHasResidual) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (row + j * kStep < num_rows) skip[j].chunk = *reinterpret_cast<const Chunk*>(residual + j * pitch);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (row + j * kStep >= num_rows) break;
        Sum<Element> sums[kChunk];
        load_staged<Traits>(staged, row + j * kStep, column, sums);
        Packed<Element> result;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          float v = scaled<Element>(sums[e], affine[e]);
          if constexpr (kHasResidual) v = add_residual(args.epilogue, v, skip[j], e);
          result.put(e, finished<Element>(args.epilogue, v, kActivation));
        }
        *reinterpret_cast<Chunk*>(out + j * pitch) = result.chunk;
      }
      residual += kAtOnce * pitch;
      out += kAtOnce * pitch;
    }
  }

  template <Activation kActivation>
  static __device__ __forceinline__ void write(const ConvArguments& args, int64_t offset, int num_rows, int first,
                                               const ScaleShift* affine, const Sum<Element>* staged, int column) {
    if (args.epilogue.residual != nullptr)
      write<kActivation, true>(args, offset, num_rows, first, affine, staged, column);
    else
      write<kActivation, false>(args, offset, num_rows, first, affine, staged, column);
  }
};

// Staged sums to finished output, or to the partial sums of this block's split. A thread keeps to one chunk of
// columns, so its BN values stay in registers.
template <class Element, int kTileIndex>
__device__ __forceinline__ void store_output(const ConvArguments& args, const BlockOrigin& origin, int split,
                                             const Sum<Element>* staged, int thread) {
  using Traits = TileTraits<Element, kTileIndex>;
  constexpr int kChunk = Traits::kChunk, kChunks = Traits::kBlockN / kChunk;
  const ConvShape& shape = args.shape;
  const int column = thread % kChunks * kChunk;
  const int num_columns = shape.group_filters - origin.k - column;  // that exist from here on
  if (num_columns <= 0) return;
  const int first_channel = origin.group * shape.group_filters + origin.k + column;
  const int64_t rows_left = num_rows(shape) - origin.m;
  const int num_tile_rows = rows_left < Traits::kBlockM ? static_cast<int>(rows_left) : Traits::kBlockM;

  ScaleShift affine[kChunk];
  auto* partials = static_cast<Sum<Element>*>(args.partials);
  if (partials == nullptr) {
    scale_and_shift_chunk<Element>(args.epilogue, first_channel, num_columns, affine);
  } else {
    partials += split * num_rows(shape) * shape.K;
  }
  if (partials == nullptr && args.has_vector_rows) {
    using Writer = RowWriter<Element, kTileIndex>;
    const int first = thread / kChunks;
    const int64_t offset = (origin.m + first) * shape.K + first_channel;
    switch (kIsByte<Element> ? Activation::kNone : args.epilogue.activation) {
      case Activation::kRelu:
        Writer::template write<Activation::kRelu>(args, offset, num_tile_rows, first, affine, staged, column);
        return;
      case Activation::kNone:
        Writer::template write<Activation::kNone>(args, offset, num_tile_rows, first, affine, staged, column);
        return;
      default:
        break;
    }
  }
  for (int row = thread / kChunks; row < num_tile_rows; row += Traits::kThreads / kChunks) {
    const int64_t offset = (origin.m + row) * shape.K + first_channel;
    Sum<Element> sums[kChunk];
    load_staged<Traits>(staged, row, column, sums);
    if (partials == nullptr) {
      store_chunk<Element>(args, offset, num_columns, affine, sums);
    } else {
      store_sums<kChunk>(partials + offset, num_columns, args.has_vector_rows, sums);
    }
  }
}

// One block per tile and split, kTile.stages - 1 stages in flight; smem_bytes(kTile) of dynamic shared memory.
template <class Element, int kTileIndex, int kCopyBytes>
__global__ void __launch_bounds__(TileTraits<Element, kTileIndex>::kThreads,
                                  kCopyBytes == kChunkBytes ? kTiles[kTileIndex].resident_blocks : 1)
    conv_bn_act_kernel(const __grid_constant__ ConvArguments args) {
  // Prologue: where this thread works, and the first stages on their way.
  using Traits = TileTraits<Element, kTileIndex>;
  constexpr int kStages = Traits::kStages, kStageBytes = Traits::kStageBytes;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / Traits::kWarpsN * Traits::kWarpM;
  const int warp_column = warp % Traits::kWarpsN * Traits::kWarpN;
  const uint32_t block = static_cast<uint32_t>(block_index()), splits = static_cast<uint32_t>(args.splits);
  const int split = static_cast<int>(block % splits);
  const BlockOrigin origin = block_origin(args.shape, block / splits, Traits::kBlockM, Traits::kBlockN);
  const StageLoader<Element, kTileIndex, kCopyBytes> loader(args, origin, thread);
  unsigned char* smem = shared_memory();

  const int num_steps = (args.shape.reduction + Traits::kBlockK - 1) / Traits::kBlockK;
  const StageRange steps = stage_range(num_steps, args.splits, split);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (steps.first + stage < steps.last) loader.load(smem + stage * kStageBytes, steps.first + stage);
    commit_copies();
  }

  // Main loop: one stage is multiplied while later ones arrive.
  Sum<Element> acc[Traits::kMmaM][Traits::kMmaN][4] = {};
  int read = 0;
  for (int step = steps.first; step < steps.last; ++step) {
    wait_copies<kStages - 2>();
    // the stage is complete for everyone, and everyone has finished with the one filled next
    sync_block();
    const int write = read == 0 ? kStages - 1 : read - 1;
    if (step + kStages - 1 < steps.last) loader.load(smem + write * kStageBytes, step + kStages - 1);
    commit_copies();
    multiply_stage<Element, kTileIndex>(smem + read * kStageBytes, warp_row, warp_column, lane, acc);
    read = read + 1 == kStages ? 0 : read + 1;
  }
  wait_copies<0>();
  sync_block();

  // Epilogue: the sums through shared memory, which is free again, so that rows are written as they lie.
  auto* staged = reinterpret_cast<Sum<Element>*>(smem);
#pragma unroll
  for (int i = 0; i < Traits::kMmaM; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kMmaN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {  // two neighbours: one 64-bit store, which meets every bank once a half-warp
        const int row = warp_row + i * 16 + accumulator_row(lane, e);
        const int column = warp_column + j * 8 + accumulator_column(lane, e);
        *reinterpret_cast<Pair<Sum<Element>>*>(staged + staging_position(row, column, Traits::kPitch)) = {
            acc[i][j][e], acc[i][j][e + 1]};
      }
    }
  }
  sync_block();
  store_output<Element, kTileIndex>(args, origin, split, staged, thread);
}

// A thread of bytes has twice as many sums, and their loads, in registers.
template <class Element>
constexpr int kSumBlocksPerSm = Packed<Element>::kCount > 8 ? 4 : 8;

// The splits' sums, added in order, to finished output: the second kernel. One thread per chunk of a row, fewer than
// 2^31 of them.
template <class Element>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerSm<Element>)
    sum_splits_kernel(const __grid_constant__ ConvArguments args) {
  constexpr int kChunk = Packed<Element>::kCount;
  const int64_t rows = num_rows(args.shape);
  const uint32_t chunks = static_cast<uint32_t>(args.shape.K - 1) / kChunk + 1;
  const uint32_t index = static_cast<uint32_t>(block_index()) * kSumThreads + thread_index();
  const uint32_t row = index / chunks;
  if (row >= rows) return;
  const int channel = static_cast<int>(index - row * chunks) * kChunk;
  const int num_columns = args.shape.K - channel;
  const int64_t offset = int64_t{row} * args.shape.K + channel;

  // Sum, then the same epilogue as without splits.
  Sum<Element> sums[kChunk];
  const auto* partials = static_cast<const Sum<Element>*>(args.partials) + offset;
  add_sums<kChunk>(partials, args.splits, rows * args.shape.K, num_columns, args.has_vector_rows, sums);
  ScaleShift affine[kChunk];
  scale_and_shift_chunk<Element>(args.epilogue, channel, num_columns, affine);
  store_chunk<Element>(args, offset, num_columns, affine, sums);
}

}  // namespace fused_resnet
