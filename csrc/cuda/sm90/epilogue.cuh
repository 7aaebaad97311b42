// A warpgroup's 64 rows of a tile of the output, by way of shared memory: act(acc * scale + shift + residual).
// The residual arrives by tensor copies while the products are summed, and takes the output's place until then. In
// between each thread finds its sums' places: by ldmatrix and stmatrix, or as pairs of neighbours.
#pragma once

#include "cuda/sm80/tile_layout.h"
#include "cuda/sm90/tiles.h"
#include "cuda/sm90/tma.cuh"

namespace fused_resnet {
namespace sm90 {

__device__ __forceinline__ void store_matrices(void* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Two neighbours of a row, which one thread has summed.
template <class Element>
struct alignas(2 * sizeof(Element)) Pair {
  Element elements[2];
};

// Rows lie in panels, as the tensor copies want them: 64 rows of kRowBytes. Where the output's rows are no whole chunks
// there is no map of it, and elements travel one by one, each warp's own.
template <class Element, int kBlockN>
struct OutputRows {
  static constexpr int kElementBytes = sizeof(Element), kChunk = Packed<Element>::kCount, kWarpRows = 16;
  static constexpr int kRowBytes = kBlockN * kElementBytes < kSpan ? kBlockN * kElementBytes : kSpan;
  static constexpr int kRowChunks = kRowBytes / 16, kPanelColumns = kRowBytes / kElementBytes;
  static constexpr int kPanels = kBlockN / kPanelColumns, kPanelBytes = kGroupRows * kRowBytes;
  static constexpr int kSums = kBlockN / 2;  // of a thread

  const ConvArguments& args;
  const TensorMap &residual, &out;
  unsigned char* staged;  // the warpgroup's
  uint32_t arrived;       // the barrier of the residual
  int thread;             // of the warpgroup

  __device__ __forceinline__ int lane() const { return thread % 32; }
  __device__ __forceinline__ int first_row() const { return thread / 32 * kWarpRows; }

  // As the copies' swizzle of 128 or 64 bytes has it: eight chunks of a column lie in different banks.
  __device__ __forceinline__ unsigned char* at(int row, int chunk) const {
    const int line = row * kRowBytes / 128, panel = chunk / kRowChunks, within = chunk % kRowChunks;
    return staged + panel * kPanelBytes + row * kRowBytes + 16 * (within ^ (line % kRowChunks));
  }

  // f(staged elements, their offset in the output, how many of them exist there) for this thread's chunks.
  template <class F>
  __device__ __forceinline__ void for_chunks(int m, int k, F f) const {
    constexpr int kChunks = kBlockN / kChunk;
    const int rows = static_cast<int>(num_rows(args.shape));
#pragma unroll 1
    for (int i = lane(); i < kWarpRows * kChunks; i += 32) {
      const int row = first_row() + i / kChunks, column = k + i % kChunks * kChunk;
      const int num_columns = m + row < rows ? args.shape.K - column : 0;
      f(reinterpret_cast<Element*>(at(row, i % kChunks)), (m + row) * int64_t{args.shape.K} + column, num_columns);
    }
  }

  // Sets the residual on its way, with zeros where there is none, once the last tile has left this memory.
  __device__ __forceinline__ void load_residual(int m, int k) const {
    const Element* from = static_cast<const Element*>(args.epilogue.residual);
    if (args.has_vector_rows) {
      if (thread != 0) return;
      wait_stores_read();
      if (from == nullptr) return;
      arrive_and_expect(arrived, kPanels * kPanelBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_box(shared_address(staged) + panel * kPanelBytes, residual, k + panel * kPanelColumns, m, arrived);
      }
    } else if (from != nullptr) {
      for_chunks(m, k, [&](Element* to, int64_t offset, int num_columns) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) to[e] = e < num_columns ? from[offset + e] : static_cast<Element>(0.0f);
      });
    }
  }

  __device__ __forceinline__ void wait_residual(uint32_t parity) const {
    if (args.has_vector_rows && args.epilogue.residual != nullptr) wait_barrier(arrived, parity);
  }

  // Blocks of 16 x 16. Matrices i: rows 0-7 and 8-15 of the first eight columns, then of the others.
  template <Activation kActivation>
  __device__ __forceinline__ void finish_matrices(const Sum<Element> (&sums)[kSums], const ScaleShift* affine) const {
#pragma unroll
    for (int block = 0; block < kBlockN / 16; ++block) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = 2 * block + i / 2;
        const ScaleShift* columns = affine + 8 * half + accumulator_column(lane(), 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          values[2 * i + e] = scaled<Element>(sums[4 * half + 2 * (i % 2) + e], columns[e]);
        }
      }
      const ChunkSource source = ldmatrix_a(lane(), block);
      void* place = at(first_row() + source.row, source.chunk);
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

  // Blocks of 16 x 8.
  template <Activation kActivation>
  __device__ __forceinline__ void finish_pairs(const Sum<Element> (&sums)[kSums], const ScaleShift* affine) const {
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const int row = first_row() + accumulator_row(lane(), i % 4);
      const int column = 8 * (i / 4) + accumulator_column(lane(), 0), byte = column * kElementBytes;
      Pair<Element>* place = reinterpret_cast<Pair<Element>*>(at(row, byte / 16) + byte % 16);
      Packed<Element> skip, result;
      if (args.epilogue.residual != nullptr) {
        const Pair<Element> pair = *place;
        skip.elements[0] = pair.elements[0], skip.elements[1] = pair.elements[1];
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v = scaled<Element>(sums[i + e], affine[column + e]);
        if (args.epilogue.residual != nullptr) v = add_residual(args.epilogue, v, skip, e);
        result.put(e, finished<Element>(args.epilogue, v, kActivation));
      }
      *place = {result.elements[0], result.elements[1]};
    }
  }

  template <Activation kActivation>
  __device__ __forceinline__ void finish(const Sum<Element> (&sums)[kSums], const ScaleShift* affine) const {
    if constexpr (kElementBytes == 2) {
      finish_matrices<kActivation>(sums, affine);
    } else {
      finish_pairs<kActivation>(sums, affine);
    }
  }

  __device__ __forceinline__ void finish(const Sum<Element> (&sums)[kSums], const ScaleShift* affine) const {
    if constexpr (kIsByte<Element>) {
      finish<Activation::kNone>(sums, affine);  // it is in the limits
    } else {
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
  }

  // barrier: where the warpgroup meets, done with the scales too.
  __device__ __forceinline__ void store(int m, int k, int barrier) const {
    if (args.has_vector_rows) fence_async_proxy();
    sync_warpgroup(barrier);
    if (args.has_vector_rows) {
      if (thread != 0) return;
      for (int panel = 0; panel < kPanels; ++panel) {
        store_box(out, k + panel * kPanelColumns, m, shared_address(staged) + panel * kPanelBytes);
      }
      commit_stores();
    } else {
      Element* to = static_cast<Element*>(args.out);
      for_chunks(m, k, [&](const Element* from, int64_t offset, int num_columns) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          if (e < num_columns) to[offset + e] = from[e];
        }
      });
    }
  }
};

}  // namespace sm90
}  // namespace fused_resnet
