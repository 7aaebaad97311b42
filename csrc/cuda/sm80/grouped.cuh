// out[n, p, q, k] = act(scale[k] * sum x[n, p*stride - pad + r, ..., c] * w[k, r, s, c] + shift[k] + residual), where c
// runs over the channels of k's group: 3x3, of groups as wide as a power of two, depthwise too.
// A block keeps to one slab of channels. Its warps hold their filters' weights in registers, and the pixels pass by:
// cp.async brings the next tile with its halo while mma.sync multiplies the present one, a tap at a time.
// Of narrow groups an mma multiplies several at once; a filter's weights of the others are zero.
#pragma once

#include "cuda/sm80/grouped_tiles.h"
#include "cuda/sm80/instructions.cuh"
#include "cuda/sm80/tile_layout.h"

namespace fused_resnet {
namespace grouped {

// A tile with everything that follows from it, the element and the width, at compile time.
template <class Element, int kTileIndex, int kWidth>
struct Traits {
  static constexpr Tile kTile = kTiles[kTileIndex];
  static constexpr int kStride = kTile.stride;
  static constexpr int kInputLines = input_lines(kTile), kInputColumns = input_columns(kTile);
  static constexpr int kStageChunks = stage_bytes(kTile) / kChunkBytes;
  static constexpr int kStrips = kTile.lines * kTile.columns / kStrip, kStripsOfLine = kTile.columns / 8;
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Element));  // elements in 16 bytes
  static constexpr int kSlab = slab_channels(sizeof(Element));
  static constexpr int kStepChannels = 32 / static_cast<int>(sizeof(Element)), kSteps = kWidth / kStepChannels;
  // more would not leave registers for the weights
  static constexpr int kCopiesTogether = weight_registers(kWidth, sizeof(Element)) > 36 ? 1 : 8;
  static constexpr bool kHasOthers = kWidth == width(1, sizeof(Element));  // groups that are narrower than this
  static constexpr int kFilterBlocks = kSlab / kFilters, kParts = kWarps / kFilterBlocks;  // of the warps
  static_assert(kWidth % kFilters == 0 && kSlab % kWidth == 0 && kWidth % kStepChannels == 0, "whole products");
  static_assert(kTile.lines % 2 == 0 && kTile.columns % 8 == 0, "whole strips");
};

// Where the chunk of an input pixel lies in a stage. The XOR spreads one chunk of the eight pixels under eight
// neighbours of the output, which is what one phase of ldmatrix reads, over all 32 banks.
template <int kStride>
__device__ __forceinline__ int pixel_chunk(int pixel, int column, int chunk) {
  return pixel * kChunksPerRow + (chunk ^ (column / kStride & 7));
}

// The first pixel of a tile in the output.
struct Place {
  int n, p, q;
};

template <class Traits>
__device__ __forceinline__ Place tile_place(const ConvShape& s, int index) {
  const int columns = (s.Q + Traits::kTile.columns - 1) / Traits::kTile.columns;
  const int lines = (s.P + Traits::kTile.lines - 1) / Traits::kTile.lines;
  const int row = index / columns, n = row / lines;
  return {n, (row - n * lines) * Traits::kTile.lines, (index - row * columns) * Traits::kTile.columns};
}

// Its first pixel's row of the output, and how many of its lines and columns exist; for few registers.
struct Output {
  int row;
  uint16_t lines, columns;
};

template <class Traits>
__device__ __forceinline__ Output tile_output(const ConvShape& s, Place at) {
  return {(at.n * s.P + at.p) * s.Q + at.q, static_cast<uint16_t>(min(s.P - at.p, Traits::kTile.lines)),
          static_cast<uint16_t>(min(s.Q - at.q, Traits::kTile.columns))};
}

// What lies under a tile's windows, zeros outside the image. A warp takes lines, four pixels at a time; eight threads
// fetch a pixel's 128 bytes.
template <class Element, class Traits>
__device__ __forceinline__ void load_tile(const ConvArguments& args, Place at, int first_channel, Chunk* stage,
                                          int thread) {
  const ConvShape& s = args.shape;
  const int lane = thread % 32, chunk = copy_chunk(lane), first = copy_row(lane);
  const int channel = first_channel + chunk * Traits::kChunk;
  const int first_h = at.p * s.stride_h - s.pad_h, first_w = at.q * s.stride_w - s.pad_w + first;
  const Element* image = static_cast<const Element*>(args.x) + int64_t{at.n} * s.H * s.W * s.C + channel;
#pragma unroll 1
  for (int line = thread / 32; line < Traits::kInputLines; line += kWarps) {
    const int h = first_h + line;
    const bool has_line = static_cast<uint32_t>(h) < static_cast<uint32_t>(s.H) && channel < s.C;
    const Element* from = image + (int64_t{h} * s.W + first_w) * s.C;
    Chunk* to = stage + line * Traits::kInputColumns * kChunksPerRow;
#pragma unroll(Traits::kCopiesTogether)
    for (int i = 0; i < Traits::kInputColumns; i += 4) {
      const int column = first + i;
      if (i + 4 > Traits::kInputColumns && column >= Traits::kInputColumns) break;
      const bool is_valid = has_line && static_cast<uint32_t>(first_w + i) < static_cast<uint32_t>(s.W);
      copy_async<kChunkBytes>(to + pixel_chunk<Traits::kStride>(column, column, chunk), from + int64_t{i} * s.C,
                              is_valid);
    }
  }
}

template <class Element>
union Word {
  static constexpr int kCount = 4 / static_cast<int>(sizeof(Element));
  uint32_t bits;
  Element elements[kCount];

  __device__ __forceinline__ Word() : bits(0) {}
};

// A filter's weights for the channels from c on, of all taps; zero where they are of another group. Both count in the
// slab. Words of one group only, unless kHasOthers.
template <class Element, bool kHasOthers, class Take>
__device__ __forceinline__ void load_weights(const ConvArguments& args, int first_channel, int filter, int c,
                                             const Take& take) {
  constexpr int kCount = Word<Element>::kCount;
  const int g = args.shape.group_channels, k = first_channel + filter;
  const Element* weight = static_cast<const Element*>(args.weight) + int64_t{k} * kTaps * g;
  const auto is_of_group = [&](int channel) { return k < args.shape.K && ((channel ^ filter) & -g) == 0; };
  if (kHasOthers && g < kCount) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      Word<Element> word;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (is_of_group(c + e)) word.elements[e] = weight[tap * g + ((c + e) & (g - 1))];
      }
      take(tap, word.bits);
    }
  } else {
    const bool is_valid = is_of_group(c);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(weight + (c & (g - 1)));
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) take(tap, is_valid ? words[tap * g / kCount] : 0);
  }
}

// An output's sum over its own group alone, one by one: pixel and column are those of its window's corner in the stage.
// NaN and infinities of other groups, times zero, are NaN in the sum that an mma makes.
template <class Element, int kStride, int kInputColumns>
__device__ __forceinline__ float sum_alone(const ConvArguments& args, const Chunk* stage, int pixel, int column,
                                           int first_channel, int filter) {
  const int g = args.shape.group_channels, first = filter & -g;
  constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Element));
  const Element* weight = static_cast<const Element*>(args.weight) + int64_t{first_channel + filter} * kTaps * g;
  float sum = 0.0f;
#pragma unroll 1
  for (int tap = 0; tap < kTaps; ++tap) {
    const int r = tap / 3, t = tap - 3 * r;
#pragma unroll 1
    for (int c = first; c < first + g; ++c) {
      const int at = pixel_chunk<kStride>(pixel + r * kInputColumns + t, column + t, c / kChunk);
      const auto* chunk = reinterpret_cast<const Element*>(stage + at);
      sum = fmaf(static_cast<float>(chunk[c % kChunk]), static_cast<float>(weight[tap * g + c - first]), sum);
    }
  }
  return sum;
}

// Four elements of the output as they travel.
template <class Element>
struct alignas(4 * sizeof(Element)) Quad {
  Element elements[4];
};

// A warp's part of the kernel: kFilters filters of the slab. Columns of the products stand for filters in such an order
// that a lane's four of a row are neighbours in memory, and those of four lanes a sector.
template <class Element, class Traits>
struct Filters {
  const ConvArguments& args;
  int first_channel, filter, lane;  // of the slab; the warp's first one in it
  uint32_t weights[kTaps][Traits::kSteps][4];
  ScaleShift affine[4];

  __device__ __forceinline__ Filters(const ConvArguments& args, int first_channel, int filter, int lane)
      : args(args), first_channel(first_channel), filter(filter), lane(lane) {
    constexpr int kWord = Word<Element>::kCount;
    const int column = lane / 4;
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // b0, b1 of the first product, then of the second
        const int c = first_input() + step * Traits::kStepChannels + (lane % 4 + 4 * (i % 2)) * kWord;
        load_weights<Element, Traits::kHasOthers>(args, first_channel,
                                                  filter + 4 * (column / 2) + 2 * (i / 2) + column % 2, c,
                                                  [&](int tap, uint32_t word) { weights[tap][step][i] = word; });
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) prepare_fragment<Element>(weights[tap][step]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) affine[e] = {0.0f, 0.0f};
    if (output_channel() < args.shape.K) {
#pragma unroll
      for (int e = 0; e < 4; ++e) affine[e] = scale_and_shift(args.epilogue, output_channel() + e);
    }
  }

  // The first channel that these filters are multiplied with.
  __device__ __forceinline__ int first_input() const {
    constexpr int kWidth = Traits::kSteps * Traits::kStepChannels;
    return filter / kWidth * kWidth;
  }
  // The first of the lane's four.
  __device__ __forceinline__ int output_channel() const { return first_channel + filter + 4 * (lane % 4); }

  // Row i of a strip, within the tile.
  static __device__ __forceinline__ int strip_line(int strip, int i) {
    return strip / Traits::kStripsOfLine * 2 + i / 8;
  }
  static __device__ __forceinline__ int strip_column(int strip, int i) {
    return strip % Traits::kStripsOfLine * 8 + i % 8;
  }

  static __device__ __forceinline__ bool has_outputs(const Output& out, int strip) {
    return strip_line(strip, 0) < out.lines && strip_column(strip, 0) < out.columns;
  }

  // The sums of a strip: of rows lane / 4 and lane / 4 + 8, four filters each.
  __device__ __forceinline__ void multiply(const Chunk* stage, int strip, float (&sums)[2][4]) const {
    float products[2][4] = {};
    const ChunkSource from = ldmatrix_a(lane, 0);
    const int column = strip_column(strip, from.row) * Traits::kStride;
    const int pixel = strip_line(strip, from.row) * Traits::kStride * Traits::kInputColumns + column;
    const int chunk = from.chunk + first_input() / Traits::kChunk;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int r = tap / 3, t = tap % 3;
#pragma unroll
      for (int step = 0; step < Traits::kSteps; ++step) {
        uint32_t a[4];
        load_matrices(a, stage + pixel_chunk<Traits::kStride>(pixel + r * Traits::kInputColumns + t, column + t,
                                                              chunk + 2 * step));
        prepare_fragment<Element>(a);
        const uint32_t (&b)[4] = weights[tap][step];
        multiply_accumulate<Element>(products[0], a, b[0], b[1]);
        multiply_accumulate<Element>(products[1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[0][e] = products[e / 2][e % 2], sums[1][e] = products[e / 2][2 + e % 2];
  }

  // Those that are NaN once more, over their own group.
  __device__ __forceinline__ void correct(const Chunk* stage, int strip, float (&sums)[2][4]) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) total += sums[i / 4][i % 4];
    if (total == total || output_channel() >= args.shape.K) return;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + i / 4 * 8, k = filter + 4 * (lane % 4) + i % 4;
      const int column = strip_column(strip, row) * Traits::kStride;
      const int pixel = strip_line(strip, row) * Traits::kStride * Traits::kInputColumns + column;
      const float sum =
          sum_alone<Element, Traits::kStride, Traits::kInputColumns>(args, stage, pixel, column, first_channel, k);
#pragma unroll
      for (int e = 0; e < 8; ++e) {  // registers have no addresses
        if (e == i && sums[e / 4][e % 4] != sums[e / 4][e % 4]) sums[e / 4][e % 4] = sum;
      }
    }
  }

  // Sums to finished output.
  template <Activation kActivation>
  __device__ __forceinline__ void store(const Output& out, int strip, const float (&sums)[2][4]) const {
    const ConvShape& s = args.shape;
    const int channel = output_channel(), column = strip_column(strip, lane / 4);
    if (channel >= s.K || column >= out.columns) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = strip_line(strip, 8 * half);
      if (line >= out.lines) break;
      const int64_t offset = int64_t{out.row + line * s.Q + column} * s.K + channel;
      const Element* residual = static_cast<const Element*>(args.epilogue.residual);
      Packed<Element> skip, result;
      if (residual != nullptr) copy_quad(skip.elements, residual + offset);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v = scaled<Element>(sums[half][e], affine[e]);
        if (residual != nullptr) v = add_residual(args.epilogue, v, skip, e);
        result.put(e, finished<Element>(args.epilogue, v, kActivation));
      }
      copy_quad(static_cast<Element*>(args.out) + offset, result.elements);
    }
  }

  __device__ __forceinline__ void copy_quad(Element* to, const Element* from) const {
    if (args.has_vector_rows) {
      *reinterpret_cast<Quad<Element>*>(to) = *reinterpret_cast<const Quad<Element>*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) to[e] = from[e];
    }
  }

  __device__ __forceinline__ void store(const Output& out, int strip, const float (&sums)[2][4]) const {
    switch (args.epilogue.activation) {
      case Activation::kRelu:
        return store<Activation::kRelu>(out, strip, sums);
      case Activation::kRelu6:
        return store<Activation::kRelu6>(out, strip, sums);
      case Activation::kSilu:
        return store<Activation::kSilu>(out, strip, sums);
      default:
        return store<Activation::kNone>(out, strip, sums);
    }
  }
};

// For sm_120 nvcc 13.0 needs more than the 128 registers that two blocks leave a thread, and would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define FUSED_RESNET_GROUPED_BLOCKS(width, element_bytes) 1
#else
#define FUSED_RESNET_GROUPED_BLOCKS(width, element_bytes) resident_blocks(width, element_bytes)
#endif

// Blocks of a slab take its tiles in turns; smem_bytes(kTile) of dynamic shared memory. kWidth: width() of the shape.
template <class Element, int kTileIndex, int kWidth>
__global__ void __launch_bounds__(kThreads, FUSED_RESNET_GROUPED_BLOCKS(kWidth, sizeof(Element)))
    grouped_conv_kernel(const __grid_constant__ ConvArguments args) {
  using T = Traits<Element, kTileIndex, kWidth>;
  const ConvShape& s = args.shape;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int slabs = (s.C - 1) / T::kSlab + 1, block = static_cast<int>(block_index());
  const int first_channel = block % slabs * T::kSlab, step = static_cast<int>(num_grid_blocks()) / slabs;
  const int columns = (s.Q + T::kTile.columns - 1) / T::kTile.columns;
  const int num_tiles = static_cast<int>(s.N) * ((s.P + T::kTile.lines - 1) / T::kTile.lines) * columns;
  Chunk* stages = reinterpret_cast<Chunk*>(shared_memory());

  int index = block / slabs, read = 0;
  load_tile<Element, T>(args, tile_place<T>(s, index), first_channel, stages, thread);
  commit_copies();
  const int filter = warp % T::kFilterBlocks * kFilters;
  Filters<Element, T> filters(args, first_channel, filter, lane);
  for (; index < num_tiles; index += step, read ^= 1) {
    if (index + step < num_tiles) {
      Chunk* next = stages + (read ^ 1) * T::kStageChunks;
      load_tile<Element, T>(args, tile_place<T>(s, index + step), first_channel, next, thread);
    }
    commit_copies();
    wait_copies<1>();
    sync_block();  // the tile is complete for everyone
    const Chunk* stage = stages + read * T::kStageChunks;
    const Output out = tile_output<T>(s, tile_place<T>(s, index));
    if (first_channel + filter < s.K) {
#pragma unroll 1
      for (int strip = warp / T::kFilterBlocks; strip < T::kStrips; strip += T::kParts) {
        // What follows from it is found anew for each strip, where the weights need the registers.
        if constexpr (T::kCopiesTogether == 1) asm volatile("" : "+r"(filters.lane));
        if (!filters.has_outputs(out, strip)) continue;
        float sums[2][4];
        filters.multiply(stage, strip, sums);
        if constexpr (T::kHasOthers) filters.correct(stage, strip, sums);
        filters.store(out, strip, sums);
      }
    }
    sync_block();  // everyone has finished with the stage that is filled next
  }
}

}  // namespace grouped
}  // namespace fused_resnet
