// Fragments of matrices in registers, and their product.
#include "ptx/products.h"

#include <algorithm>
#include <limits>

namespace fused_resnet::ptx {
namespace {

// ---- values

void widen_bytes(Type type, const u8* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = float_of(type, from[i]);
}

// The tensor core ignores the low 13 bits of .tf32 (PTX ISA 9.7.15.5.2; so it is measured for mma.sync).
void widen_words(const u8* from, float* to, int count) {
  for (int i = 0; i < count; ++i) {
    u32 word;
    std::memcpy(&word, from + 4 * i, sizeof word);
    to[i] = as<float>(word & 0xffffe000u);
  }
}

void widen_row(Type type, const Tile& row, float* to, int k) {
  if (type == kF16 || type == kBF16) {
    u16 halves[kDepthBytes / 2];
    std::memcpy(halves, row, sizeof halves);
    widen(type, halves, to, k);
  } else if (type == kTF32) {
    widen_words(row, to, k);
  } else {
    widen_bytes(type, row, to, k);
  }
}

void multiply_add_floats(const Product& product, int rounding, const Tile* a, const Tile* b, u32* d) {
  alignas(64) float wide_a[kTileRows * kMaxDepth], wide_b[kMaxDepth * kMaxColumns], column[kMaxDepth];
  const int n = product.n, k = product.k;
  for (int row = 0; row < kTileRows; ++row) widen_row(product.a, a[row], wide_a + row * k, k);
  if (product.negated)
    for (int i = 0; i < kTileRows * k; ++i) wide_a[i] = -wide_a[i];
  for (int c = 0; c < n; ++c) {
    widen_row(product.b, b[c], column, k);
    for (int i = 0; i < k; ++i) wide_b[i * n + c] = column[i];
  }
  const Factors factors{product.a, product.b, product.result, n, k, wide_a, wide_b};
  float* sums = reinterpret_cast<float*>(d);
  if (rounding == 0) {
    multiply_add_in_fp64(factors, sums);
  } else {
    multiply_add_as(summation_of(rounding, product.is_wgmma, product.a, product.result), factors, sums);
  }
}

int byte_as(Type type, u8 value) {
  return type == kS8 ? static_cast<s8>(value) : value;
}

// Without .satfinite a sum wraps around (PTX ISA 9.7.14.5.14, 9.7.15.5.2).
void multiply_add_integers(const Product& product, const Tile* a, const Tile* b, u32* d) {
  for (int row = 0; row < kTileRows; ++row) {
    int factors[kMaxDepth];
    for (int i = 0; i < product.k; ++i) factors[i] = byte_as(product.a, a[row][i]);
    for (int column = 0; column < product.n; ++column) {
      u32& sum = d[row * product.n + column];
      int products = 0;
      for (int i = 0; i < product.k; ++i) products += factors[i] * byte_as(product.b, b[column][i]);
      s64 exact = static_cast<s64>(static_cast<s32>(sum)) + products;
      if (product.saturates) {
        using Limits = std::numeric_limits<s32>;
        exact = std::clamp<s64>(exact, Limits::min(), Limits::max());
      }
      sum = static_cast<u32>(exact);
    }
  }
}

}  // namespace

void multiply_add(const Product& product, int rounding, const Tile* a, const Tile* b, u32* d) {
  if (product.result == kS32) {
    multiply_add_integers(product, a, b, d);
  } else {
    multiply_add_floats(product, rounding, a, b, d);
  }
}

// ---- fragments

void gather_a(Machine& machine, Warp& warp, const Instruction& instruction, int operand, Tile* a) {
  u64 room[kLanes];
  for (int j = 0; j < instruction.count(operand); ++j) {
    const u64* values = read(machine, warp, instruction.at(operand, j), room);
    FOR_LANES std::memcpy(a[l / 4 + 8 * (j % 2)] + 4 * (l % 4) + 16 * (j / 2), &values[l], 4);
  }
}

void gather_b(Machine& machine, Warp& warp, const Instruction& instruction, int operand, Tile* b) {
  u64 room[kLanes];
  for (int j = 0; j < instruction.count(operand); ++j) {
    const u64* values = read(machine, warp, instruction.at(operand, j), room);
    FOR_LANES std::memcpy(b[l / 4] + 4 * (l % 4) + 16 * j, &values[l], 4);
  }
}

int accumulator_registers(Type type, int n) {
  return type == kF16 ? n / 4 : n / 2;
}

void gather_accumulators(const u64* const* registers, Type type, int n, u32* d) {
  for (int j = 0; j < accumulator_registers(type, n); ++j) {
    const u64* values = registers[j];
    if (type == kF16) {
      u32* to = d + 8 * (j % 2) * n + 8 * (j / 2);
      FOR_LANES for (int half = 0; half < 2; ++half) {
        const float value = float_of(kF16, static_cast<u16>(values[l] >> 16 * half));
        to[l / 4 * n + 2 * (l % 4) + half] = static_cast<u32>(bits(value));
      }
    } else {
      u32* to = d + 8 * (j / 2 % 2) * n + 8 * (j / 4) + j % 2;
      FOR_LANES to[l / 4 * n + 2 * (l % 4)] = static_cast<u32>(values[l]);
    }
  }
}

void scatter_accumulators(u64* const* registers, Type type, int n, const u32* d) {
  for (int j = 0; j < accumulator_registers(type, n); ++j) {
    u64* values = registers[j];
    if (type == kF16) {
      const u32* from = d + 8 * (j % 2) * n + 8 * (j / 2);
      FOR_LANES {
        const u32* pair = from + l / 4 * n + 2 * (l % 4);
        const u64 low = rounded(kF16, as<float>(pair[0])), high = rounded(kF16, as<float>(pair[1]));
        values[l] = low | high << 16;
      }
    } else {
      const u32* from = d + 8 * (j / 2 % 2) * n + 8 * (j / 4) + j % 2;
      FOR_LANES values[l] = from[l / 4 * n + 2 * (l % 4)];
    }
  }
}

}  // namespace fused_resnet::ptx
