// Whether VDPBF16PS, which multiplies pairs of bf16, is worth its conversions: measured, since processors that have it
// differ by four times. No torch here.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "common/inline.h"
#include "cpu/dispatch.h"
#include "cpu/vectors.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_resnet {
namespace blocked {

#if defined(__x86_64__)

// A vector's worth of either. By inline assembly, since a template without a target cannot call intrinsics that have
// one.
struct OfPairs {
  template <class V>
  static FUSED_RESNET_INLINE void add(const V& factor, V* sum) {
    V total = *sum;
    asm("vdpbf16ps %1, %1, %0" : "+v"(total) : "v"(factor));
    *sum = total;
  }
};
struct OfFp32 {
  template <class V>
  static FUSED_RESNET_INLINE void add(const V& factor, V* sum) {
    V total = *sum;
    asm("vfmadd231ps %1, %1, %0" : "+v"(total) : "v"(factor));
    *sum = total;
  }
};

// In registers, and not equal to each other: of equal ones a compiler would keep one.
template <class Products, int kCount>
struct ManySums {
  Lanes<16>::Vector first;
  ManySums<Products, kCount - 1> others;

  FUSED_RESNET_INLINE void begin() {
    first = Lanes<16>::Vector{} + static_cast<float>(kCount);
    others.begin();
  }
  FUSED_RESNET_INLINE void add(const Lanes<16>::Vector& factor) {
    Products::add(factor, &first);
    others.add(factor);
  }
  FUSED_RESNET_INLINE void end() const {
    const Lanes<16>::Vector used = first;
    asm volatile("" ::"v"(used));
    others.end();
  }
};
template <class Products>
struct ManySums<Products, 0> {
  FUSED_RESNET_INLINE void begin() {}
  FUSED_RESNET_INLINE void add(const Lanes<16>::Vector&) {}
  FUSED_RESNET_INLINE void end() const {}
};

// Nanoseconds of some products. Each is independent of as many others as hide its latency.
template <class Products>
FUSED_RESNET_INLINE double nanoseconds_of_products() {
  constexpr int kSums = 16, kRounds = 1000;
  ManySums<Products, kSums> sums;
  sums.begin();
  const Lanes<16>::Vector factor = Lanes<16>::Vector{} + 1.f;
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < kRounds; ++round) sums.add(factor);
  sums.end();
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
  return taken.count();
}

// By the best of some turns: others may use the core meanwhile.
FUSED_RESNET_AVX512 inline bool measure_pair_products() {
  constexpr int kTurns = 10;
  constexpr double kLeast = 1.2;
  double pairs = std::numeric_limits<double>::infinity(), singles = pairs;
  for (int turn = 0; turn < kTurns; ++turn) {
    pairs = std::min(pairs, nanoseconds_of_products<OfPairs>());
    singles = std::min(singles, nanoseconds_of_products<OfFp32>());
  }
  return 2 * singles > kLeast * pairs;
}

inline bool pair_products_pay() {
  static const bool pay = measure_pair_products();
  return pay;
}

inline const char* why_no_avx512_bf16() {
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  unsigned a, b, c, d;
  const bool has_it = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvx512Bf16) != 0;
  return has_it ? nullptr : "this CPU has no AVX-512 for bf16";
}

#else

inline bool pair_products_pay() {
  return false;
}

inline const char* why_no_avx512_bf16() {
  return "AVX-512 is used on x86-64";
}

#endif

}  // namespace blocked
}  // namespace fused_resnet
