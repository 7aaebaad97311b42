// Where every thread's data lies: copies into shared memory, ldmatrix sources, accumulators, the staged output.
// Plain functions of small integers, used by the kernel and by the host checks alike.
#pragma once

#include "cuda/conv_shape.h"

namespace fused_resnet {

constexpr int kChunkBytes = 16;    // one cp.async, one row of an 8x8 ldmatrix
constexpr int kChunksPerRow = 8;   // 128 bytes of the reduction
constexpr int kStepsPerStage = 4;  // one mma takes 32 bytes of the reduction: m16n8k16 half, m16n8k8 TF32, k32 bytes

// Shared memory of a tile is rows of eight chunks. The XOR spreads the same chunk of eight consecutive rows, which
// is what one ldmatrix phase reads, over all 32 banks.
FUSED_RESNET_HD int chunk_position(int row, int chunk) {
  return row * kChunksPerRow + (chunk ^ (row & 7));
}

// Thread t copies chunk t % 8 of rows t / 8, t / 8 + threads / 8, ...: eight threads fetch one row's 128 bytes.
FUSED_RESNET_HD int copy_chunk(int thread) {
  return thread % kChunksPerRow;
}
FUSED_RESNET_HD int copy_row(int thread) {
  return thread / kChunksPerRow;
}

// The row and chunk whose address a lane hands to ldmatrix.x4.
struct ChunkSource {
  int row, chunk;
};

// A, 16 rows: matrices (rows 0-7, low half), (8-15, low), (0-7, high), (8-15, high) = registers a0..a3 of the mma.
FUSED_RESNET_HD ChunkSource ldmatrix_a(int lane, int step) {
  return {lane & 15, 2 * step + (lane >> 4)};
}

// B, 16 columns: matrices (columns 0-7, low), (0-7, high), (8-15, low), (8-15, high) = b0, b1 of two mma.
FUSED_RESNET_HD ChunkSource ldmatrix_b(int lane, int step) {
  return {(lane & 7) + ((lane >> 4) << 3), 2 * step + ((lane >> 3) & 1)};
}

// Accumulator i of a lane lies at this row and column of the 16 x 8 product.
FUSED_RESNET_HD int accumulator_row(int lane, int i) {
  return lane / 4 + 8 * (i / 2);
}
FUSED_RESNET_HD int accumulator_column(int lane, int i) {
  return 2 * (lane % 4) + i % 2;
}

// Index of (row, column) in the staged sums, `pitch` of them per row: staging_pitch() of a tile. A thread reads 16
// bytes of them at a time, up to 16 columns in a row. It would meet the banks of its neighbours, eight or sixteen
// columns on, if quads were not exchanged from one group of 32 columns to the next. Narrow rows lie two in a line of 32
// banks: there they are exchanged from one line to the next, and by half a row from one to its neighbour.
FUSED_RESNET_HD int staging_position(int row, int column, int pitch) {
  const int line = row >> 1;
  const int swizzle = (pitch < 32 ? line ^ (line << 1) : column >> 5) & 3;
  return row * pitch + (column ^ (4 * swizzle));
}

// Which part of the output a block computes. Columns run fastest, then groups, so that blocks in flight share their
// rows in L2: a group reads a few bytes of each line of x, and its neighbours the rest of it.
struct BlockOrigin {
  int64_t m;
  int k;  // within the group
  int group;
};

FUSED_RESNET_HD BlockOrigin block_origin(const ConvShape& s, int64_t block, int block_m, int block_n) {
  const int64_t tiles_n = (s.group_filters + block_n - 1) / block_n;
  const int64_t slab = block / tiles_n;  // the columns of one group, in one tile's rows
  const int64_t row_tile = slab / s.groups;
  return {row_tile * block_m, static_cast<int>(block - slab * tiles_n) * block_n,
          static_cast<int>(slab - row_tile * s.groups)};
}

}  // namespace fused_resnet
