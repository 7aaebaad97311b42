// Matrices in shared memory that a wgmma.mma_async names by a descriptor (PTX ISA 9.7.15.5.1.2).
#pragma once

#include <vector>

#include "ptx/tensor_cores/products.h"

namespace fused_resnet::ptx {

struct Descriptor {
  u32 start, leading, stride;  // bytes
  int span;                    // of a row of the swizzle's pattern: 128, 64, 32 bytes; 16: no swizzle
  u32 base_offset;             // 0 to 7: the pattern begins so many times 128 bytes behind a multiple of its size
};

// A part of a matrix: rows of A, or columns of B. Either k is contiguous, or (MN-major, "transposed") they are.
struct MatrixPart {
  Descriptor descriptor;
  bool is_mn_major;
  int first, rows;  // multiples of 8
};

Descriptor descriptor_of(u64 encoded);
// Report reserved bits, and a start that is not where the swizzle's pattern and the base offset allow it.
void check_descriptor(Machine& machine, u64 encoded);
void check_start(Machine& machine, const MatrixPart& part, int element_bytes);
std::vector<Wgmma::Range> ranges_of(const MatrixPart& part);  // all that is read, in few pieces
void load(Warp& warp, const MatrixPart& part, Tile* rows);

}  // namespace fused_resnet::ptx
