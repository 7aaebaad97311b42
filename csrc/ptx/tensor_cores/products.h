// What one warp multiplies, whichever instruction asks: 16 rows of A by n columns of B, each 32 bytes deep or less.
#pragma once

#include "ptx/machine/operands.h"
#include "ptx/tensor_cores/rounding.h"

namespace fused_resnet::ptx {

constexpr int kDepthBytes = 32;  // of a row of A or a column of B, at most

using Tile = u8[kDepthBytes];                       // one row of A, or one column of B, along k
using Accumulators = u32[kTileRows * kMaxColumns];  // d in rows of n: bits of fp32, of .f16 too, or s32

// A multiplication as its instruction states it; constant, and part of an Instruction as its three types, a and b.
struct Product {
  Type a, b, result;  // result: kF32, kF16, kS32
  int n, k;
  bool negated, saturates, is_wgmma;
};

// d = a b + d. `rounding` as in PtxOptions.
void multiply_add(const Product& product, int rounding, const Tile* a, const Tile* b, u32* d);

// Fragments in registers (PTX ISA 9.7.14.5, 9.7.15.5.1). For all types, a register has four bytes along k, from byte
// 4 (l % 4) on in lane l. Register j of A: row l / 4 + 8 (j % 2), and 16 (j / 2) bytes further. Register j of B: column
// l / 4, and 16 j bytes further. `operand` counts the instruction's operands.
void gather_a(Machine& machine, Warp& warp, const Instruction& instruction, int operand, Tile* a);
void gather_b(Machine& machine, Warp& warp, const Instruction& instruction, int operand, Tile* b);
// Register j of an accumulator: row l / 4 + 8 (j / 2 % 2), column 8 (j / 4) + 2 (l % 4) + j % 2. Of .f16, two
// neighbouring columns share a register.
void gather_accumulators(const u64* const* registers, Type type, int n, u32* d);
void scatter_accumulators(u64* const* registers, Type type, int n, const u32* d);
int accumulator_registers(Type type, int n);

}  // namespace fused_resnet::ptx
