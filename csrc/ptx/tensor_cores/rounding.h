// How tensor cores sum the products of one instruction: in fp64 with one rounding, or as a GPU does.
//
// A GPU takes a few products at a time, and the accumulator. It cuts each of them off a number of bits below the
// largest one's exponent, adds what is left exactly, and rounds that sum. The numbers are those of the package
// mmasim 2.1.1: Xie, Wang, Yang, Yang, MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores, arXiv
// 2511.10909. Its authors found them by measurement.
#pragma once

#include "ptx/values.h"

namespace fused_resnet::ptx {

constexpr int kTileRows = 16, kMaxColumns = 256, kMaxDepth = 32;  // of what one warp multiplies at once

// The rules of one kind of instruction on one GPU.
struct Summation {
  int products;        // that are added at once, together with the accumulator
  int fraction_bits;   // of each addend, behind the point of the largest one
  int zero_exponent;   // what an addend of zero counts as where the largest exponent is sought
  bool keeps_13_bits;  // an fp32 result has 13 bits of fraction, not 23
  bool widens_bytes;   // an mma.sync of bytes where there is none: see multiply_add_widened
};
Summation summation_of(int gpu, bool is_wgmma, Type a, Type result);

// d = a b + d for a of 16 x k, b of k x n, d of 16 x n, in rows. The types say what the floats came from and what d is
// rounded to: kF32, or kF16. NaN becomes the canonical one.
struct Factors {
  Type a_type, b_type, result;
  int n, k;  // n: a multiple of 8
  const float *a, *b;
};
void multiply_add_in_fp64(const Factors& factors, float* d);
void multiply_add_as(const Summation& summation, const Factors& factors, float* d);

}  // namespace fused_resnet::ptx
