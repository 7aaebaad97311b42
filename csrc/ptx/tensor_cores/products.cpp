// Fragments of matrices in registers, and their product.
#include "ptx/tensor_cores/products.h"

#include <algorithm>
#include <array>
#include <limits>

#include "ptx/clones.h"

namespace fused_resnet::ptx {
namespace {

// ---- values

const float* byte_table(Type type) {
  static const auto tables = [] {
    std::array<std::array<float, 256>, 2> values;
    for (u32 code = 0; code < 256; ++code) {
      values[0][code] = float_of(kE4M3, code);
      values[1][code] = float_of(kE5M2, code);
    }
    return values;
  }();
  return tables[type == kE5M2].data();
}

// As values.h's widen, for multiples of eight.
CLONES void widen_halves(const u16* from, float* to, int count) {
  for (int i = 0; i < count; i += 8) {
    for (int c = 0; c < 8; ++c) {
      const u32 code = from[i + c], magnitude = code & 0x7fff;
      float scaled;  // a multiplication rebiases the exponent, and makes subnormal numbers normal
      const u32 shifted = magnitude << 13;
      std::memcpy(&scaled, &shifted, sizeof scaled);
      scaled *= 0x1p112f;
      u32 result;
      std::memcpy(&result, &scaled, sizeof result);
      result = magnitude >= 0x7c00 ? 0x7f800000 | shifted : result;
      result |= (code & 0x8000) << 16;
      std::memcpy(to + i + c, &result, sizeof result);
    }
  }
}

CLONES void widen_bfloats(const u16* from, float* to, int count) {
  for (int i = 0; i < count; i += 8) {
    for (int c = 0; c < 8; ++c) {
      const u32 result = static_cast<u32>(from[i + c]) << 16;
      std::memcpy(to + i + c, &result, sizeof result);
    }
  }
}

void widen_pairs(Type type, const Tile* tiles, int count, int k, float* to) {
  u16 values[kMaxColumns * kDepthBytes / 2];
  for (int row = 0; row < count; ++row) std::memcpy(values + row * k, tiles[row], 2 * k);
  (type == kF16 ? widen_halves : widen_bfloats)(values, to, count * k);
}

// The tensor core ignores the low 13 bits of .tf32 (PTX ISA 9.7.15.5.2; so it is measured for mma.sync).
void widen_words(const Tile* tiles, int count, int k, float* to) {
  for (int row = 0; row < count; ++row) {
    u32 words[kDepthBytes / 4];
    std::memcpy(words, tiles[row], sizeof words);
    for (int i = 0; i < k; ++i) to[row * k + i] = as<float>(words[i] & 0xffffe000u);
  }
}

// Rows of A, or columns of B, as fp32, one after the other.
void widen(Type type, const Tile* tiles, int count, int k, float* to) {
  if (size_of(type) == 2) return widen_pairs(type, tiles, count, k, to);
  if (type == kTF32) return widen_words(tiles, count, k, to);
  const float* table = byte_table(type);
  for (int row = 0; row < count; ++row)
    for (int i = 0; i < k; ++i) to[row * k + i] = table[tiles[row][i]];
}

void transpose(const float* rows, int n, int k, float* to) {  // (n, k) to (k, n)
  for (int i = 0; i < k; ++i)
    for (int c = 0; c < n; ++c) to[i * n + c] = rows[c * k + i];
}

void multiply_add_floats(const Product& product, int rounding, const Tile* a, const Tile* b, u32* d) {
  alignas(64) float wide_a[kTileRows * kMaxDepth], columns[kMaxDepth * kMaxColumns], wide_b[kMaxDepth * kMaxColumns];
  const int n = product.n, k = product.k;
  widen(product.a, a, kTileRows, k, wide_a);
  if (product.negated)
    for (int i = 0; i < kTileRows * k; ++i) wide_a[i] = -wide_a[i];
  widen(product.b, b, n, k, columns);
  transpose(columns, n, k, wide_b);
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
      if (product.a == kB8) {  // bits (9.7.15.5.2, .and.popc)
        for (int i = 0; i < product.k; ++i) products += __builtin_popcount(a[row][i] & b[column][i]);
      } else {
        for (int i = 0; i < product.k; ++i) products += factors[i] * byte_as(product.b, b[column][i]);
      }
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
