// Sums of a tensor core's products.
#include "ptx/tensor_cores/rounding.h"

#include <algorithm>

#include "ptx/clones.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kTogether = 8;  // columns that are computed together

typedef double Four __attribute__((vector_size(32)));
typedef double UnalignedFour __attribute__((vector_size(32), aligned(8), may_alias));

inline Four load(const double* from) {
  return *reinterpret_cast<const UnalignedFour*>(from);
}
inline void keep(double* to, Four low, Four high) {
  *reinterpret_cast<UnalignedFour*>(to) = low;
  *reinterpret_cast<UnalignedFour*>(to + 4) = high;
}

// Four rows by eight columns at a time, all sums in registers. Products of factors of at most 24 bits are exact.
CLONES void multiply(const double* a, const double* b, double* d, int n, int k) {
  for (int column = 0; column < n; column += kTogether) {
    for (int row = 0; row < kTileRows; row += 4) {
      const double *a0 = a + row * k, *a1 = a0 + k, *a2 = a1 + k, *a3 = a2 + k;
      Four low0 = {}, low1 = {}, low2 = {}, low3 = {}, high0 = {}, high1 = {}, high2 = {}, high3 = {};
      for (int i = 0; i < k; ++i) {
        const double* factors = b + i * n + column;
        const Four low = load(factors), high = load(factors + 4);
        low0 += a0[i] * low;
        low1 += a1[i] * low;
        low2 += a2[i] * low;
        low3 += a3[i] * low;
        high0 += a0[i] * high;
        high1 += a1[i] * high;
        high2 += a2[i] * high;
        high3 += a3[i] * high;
      }
      double* sums = d + row * n + column;
      keep(sums, low0, high0);
      keep(sums + n, low1, high1);
      keep(sums + 2 * n, low2, high2);
      keep(sums + 3 * n, low3, high3);
    }
  }
}

CLONES void widen_to_fp64(const float* from, double* to, int count) {
  for (int i = 0; i < count; i += kTogether)
    for (int c = 0; c < kTogether; ++c) to[i + c] = static_cast<double>(from[i + c]);
}

CLONES void add_in_fp32(const double* sums, float* d, int count) {
  const float nan = canonical_nan();
  for (int i = 0; i < count; i += kTogether) {
    for (int c = 0; c < kTogether; ++c) {
      const float sum = static_cast<float>(static_cast<double>(d[i + c]) + sums[i + c]);
      d[i + c] = sum == sum ? sum : nan;
    }
  }
}

float to_half(double value) {
  return float_of(kF16, rounded(kF16, value));
}

// Toward zero. Beyond the largest number is infinity all the same, and a sum has no negative zero.
float truncated(double value, bool keeps_13_bits) {
  float result = static_cast<float>(value);
  u32 code = as<u32>(bits(result));
  const bool is_infinite = std::fabs(value) >= 0x1p128;
  if (!is_infinite && std::fabs(static_cast<double>(result)) > std::fabs(value)) --code;
  if (keeps_13_bits) code &= ~0x3ffu;
  return as<float>(code) + 0.0f;
}

int min_exponent(Type type) {  // of the type's normal numbers
  return type == kF16 || type == kE5M2 ? -14 : type == kE4M3 ? -6 : -126;
}

// The exponent as the hardware has it: that of a subnormal number, and of zero, is the smallest normal one.
int exponent_of(float value, int smallest) {
  return std::max(static_cast<int>(bits(value) >> 23 & 0xff) - 127, smallest);
}

double power_of_two(int exponent) {
  return as<double>(static_cast<u64>(1023 + exponent) << 52);
}

// The exponents of the factors, once for all sums that they take part in.
struct Exponents {
  int a[kTileRows * kMaxDepth], b[kMaxDepth * kMaxColumns];
};

void find_exponents(const Factors& factors, Exponents* exponents) {
  const int smallest_a = min_exponent(factors.a_type), smallest_b = min_exponent(factors.b_type);
  for (int i = 0; i < kTileRows * factors.k; ++i) exponents->a[i] = exponent_of(factors.a[i], smallest_a);
  for (int i = 0; i < factors.k * factors.n; ++i) exponents->b[i] = exponent_of(factors.b[i], smallest_b);
}

// One step of one row and eight columns: d += the products of k from `first` to `end`.
CLONES void add_products(const Summation& summation, const Factors& factors, const Exponents& exponents, int row,
                         int column, int first, int end, float* d) {
  double plain[kTogether];
  int largest[kTogether];
  const int smallest_d = min_exponent(factors.result);
  for (int c = 0; c < kTogether; ++c) {
    plain[c] = static_cast<double>(d[c]);
    largest[c] = d[c] != 0 ? exponent_of(d[c], smallest_d) : summation.zero_exponent;
  }
  for (int i = first; i < end; ++i) {
    const double x = static_cast<double>(factors.a[row * factors.k + i]);
    const int exponent = exponents.a[row * factors.k + i];
    const float* b = factors.b + i * factors.n + column;
    const int* exponents_b = exponents.b + i * factors.n + column;
    for (int c = 0; c < kTogether; ++c) {
      const double product = x * static_cast<double>(b[c]);
      plain[c] += product;
      const int sum = product != 0 ? exponent + exponents_b[c] : summation.zero_exponent;
      largest[c] = std::max(largest[c], sum);
    }
  }
  double scale[kTogether], sum[kTogether];
  bool finite[kTogether];
  for (int c = 0; c < kTogether; ++c) {
    scale[c] = power_of_two(summation.fraction_bits - largest[c]);
    finite[c] = std::isfinite(plain[c]);
    sum[c] = finite[c] ? std::trunc(static_cast<double>(d[c]) * scale[c]) : 0;
  }
  for (int i = first; i < end; ++i) {
    const double x = static_cast<double>(factors.a[row * factors.k + i]);
    const float* b = factors.b + i * factors.n + column;
    for (int c = 0; c < kTogether; ++c) {  // below 2^(fraction_bits + 2): fits 32 bits
      const double product = finite[c] ? x * static_cast<double>(b[c]) * scale[c] : 0;
      sum[c] += static_cast<double>(static_cast<s32>(product));
    }
  }
  for (int c = 0; c < kTogether; ++c) {
    const double value = sum[c] * power_of_two(largest[c] - summation.fraction_bits);
    if (!finite[c]) {
      d[c] = std::isnan(plain[c]) ? canonical_nan() : static_cast<float>(plain[c]);
    } else {
      d[c] = factors.result == kF16 ? to_half(value) + 0.0f : truncated(value, summation.keeps_13_bits);
    }
  }
}

void add_all_products(const Summation& summation, const Factors& factors, float* d) {
  Exponents exponents;
  find_exponents(factors, &exponents);
  for (int row = 0; row < kTileRows; ++row) {
    for (int column = 0; column < factors.n; column += kTogether) {
      float* sums = d + row * factors.n + column;
      for (int first = 0; first < factors.k; first += summation.products) {
        const int end = std::min(first + summation.products, factors.k);
        add_products(summation, factors, exponents, row, column, first, end, sums);
      }
    }
  }
}

// sm_90 has no mma of bytes. ptxas 13.0 makes of it two of f16: the first of k % 4 < 2, to zero, the second of the
// others. Then it adds the accumulator, to nearest.
void multiply_add_widened(const Summation& summation, const Factors& factors, float* d) {
  const int n = factors.n, k = factors.k, count = kTileRows * n;
  float a[kTileRows * kMaxDepth], b[kMaxDepth * kTogether], sums[kTileRows * kTogether] = {};
  for (int i = 0; i < k; ++i) {
    const int place = i / 4 * 2 + i % 2 + (i % 4 < 2 ? 0 : k / 2);
    for (int row = 0; row < kTileRows; ++row) a[row * k + place] = factors.a[row * k + i];
    std::copy(factors.b + i * n, factors.b + (i + 1) * n, b + place * n);
  }
  Summation halves = summation;
  halves.products = k / 2;
  add_all_products(halves, {kF16, kF16, factors.result, n, k, a, b}, sums);
  for (int i = 0; i < count; ++i) {
    const double exact = static_cast<double>(d[i]) + static_cast<double>(sums[i]);
    const float sum = factors.result == kF16 ? to_half(exact) : static_cast<float>(exact);
    d[i] = std::isnan(sum) ? canonical_nan() : sum;
  }
}

}  // namespace

Summation summation_of(int gpu, bool is_wgmma, Type a, Type result) {
  const bool is_hopper = gpu >= 90 || is_wgmma, is_byte = size_of(a) == 1;
  Summation rules{};
  rules.products = (is_hopper ? 32 : 16) / size_of(a);
  rules.fraction_bits = is_hopper ? 25 : 24;
  rules.zero_exponent = (result == kF16 ? -20 : -132) - is_hopper;
  if (is_byte && is_hopper && !is_wgmma) {
    rules.widens_bytes = true;
  } else if (is_byte) {
    rules.fraction_bits = 13;
    rules.keeps_13_bits = true;
  }
  return rules;
}

void multiply_add_in_fp64(const Factors& factors, float* d) {
  alignas(64) double a[kTileRows * kMaxDepth], b[kMaxDepth * kMaxColumns], sums[kTileRows * kMaxColumns];
  const int count = kTileRows * factors.n;
  widen_to_fp64(factors.a, a, kTileRows * factors.k);
  widen_to_fp64(factors.b, b, factors.k * factors.n);
  multiply(a, b, sums, factors.n, factors.k);
  if (factors.result == kF16) {
    for (int i = 0; i < count; ++i) d[i] = to_half(static_cast<double>(d[i]) + sums[i]);
  } else {
    add_in_fp32(sums, d, count);
  }
}

void multiply_add_as(const Summation& summation, const Factors& factors, float* d) {
  if (summation.widens_bytes) return multiply_add_widened(summation, factors, d);
  add_all_products(summation, factors, d);
}

}  // namespace fused_resnet::ptx
