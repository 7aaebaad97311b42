// The operators of _C_cpu.so. No CUDA here.
//
// cpu_add_relu: out = max(a + b, 0) in one pass over memory, which is what limits it; torch.relu(a + b) takes two.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>

#include "operators.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

FUSED_RESNET_EMBED_DIGEST("cpu")

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;

// As many elements as ATen gives a thread at least (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainSize = 32768;

// NaN compares false and stays, as in torch.relu.
template <class T>
inline __attribute__((always_inline)) T relu(T v) {
  return v < T(0) ? T(0) : v;
}

template <class T>
inline __attribute__((always_inline)) void add_relu_loop(const T* a, const T* b, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = relu(a[i] + b[i]);
}

// bfloat16 as its bits, so that the compiler vectorises the conversions.
struct BFloat16Bits {
  uint16_t bits;
};

inline __attribute__((always_inline)) float widen(BFloat16Bits v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// Nearest, ties to even; NaN by itself, since rounding could carry it to infinity.
inline __attribute__((always_inline)) BFloat16Bits round_to_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(v != v ? 0x7fc0 : rounded)};
}

// max commutes with rounding, so it is applied to the fp32 sum.
inline __attribute__((always_inline)) void add_relu_loop(const BFloat16Bits* a, const BFloat16Bits* b,
                                                         BFloat16Bits* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_bfloat16(relu(widen(a[i]) + widen(b[i])));
}

using Half = c10::Half;

inline void add_relu_loop(const Half* a, const Half* b, Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Half>(relu(static_cast<float>(a[i]) + static_cast<float>(b[i])));
}

#if defined(__x86_64__)
// The same loops compiled for newer instructions.
template <class T>
__attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))) void add_relu_avx512(const T* a,
                                                                                                  const T* b, T* out,
                                                                                                  int64_t n) {
  add_relu_loop(a, b, out, n);
}

template <class T>
__attribute__((target("avx2"))) void add_relu_avx2(const T* a, const T* b, T* out, int64_t n) {
  add_relu_loop(a, b, out, n);
}

template <>
__attribute__((target("avx2,f16c"))) void add_relu_avx2(const Half* a, const Half* b, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 from_a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
    const __m256 from_b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)));
    const __m256 sum = _mm256_add_ps(from_a, from_b);
    // the second operand is returned when one is NaN or both are zero
    const __m256 positive = _mm256_max_ps(_mm256_setzero_ps(), sum);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(positive, _MM_FROUND_TO_NEAREST_INT));
  }
  add_relu_loop(a + i, b + i, out + i, n - i);
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}

bool has_avx512() {
  static const bool has =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

template <class T>
void add_relu_parallel(const void* a, const void* b, void* out, int64_t numel) {
  torch::stable::parallel_for(0, numel, kGrainSize, [&](int64_t begin, int64_t end) {
    const T* from_a = static_cast<const T*>(a) + begin;
    const T* from_b = static_cast<const T*>(b) + begin;
    T* to = static_cast<T*>(out) + begin;
#if defined(__x86_64__)
    // only bfloat16, with its arithmetic on bits, gains from wider vectors; the others wait for memory
    if constexpr (std::is_same_v<T, BFloat16Bits>) {
      if (has_avx512()) return add_relu_avx512<T>(from_a, from_b, to, end - begin);
    }
    if (has_avx2()) return add_relu_avx2<T>(from_a, from_b, to, end - begin);
#endif
    add_relu_loop(from_a, from_b, to, end - begin);
  });
}

void add_relu(Tensor a, Tensor b, Tensor out) {
  check_pointwise("cpu_add_relu", a, b, out);
  const void* from_a = a.const_data_ptr();
  const void* from_b = b.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const int64_t numel = a.numel();
  switch (a.scalar_type()) {
    case ScalarType::Float:
      return add_relu_parallel<float>(from_a, from_b, to, numel);
    case ScalarType::Double:
      return add_relu_parallel<double>(from_a, from_b, to, numel);
    case ScalarType::Half:
      return add_relu_parallel<Half>(from_a, from_b, to, numel);
    case ScalarType::BFloat16:
      return add_relu_parallel<BFloat16Bits>(from_a, from_b, to, numel);
    default:
      STD_TORCH_CHECK(false, "cpu_add_relu: the dtype must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_add_relu", TORCH_BOX(&fused_resnet::add_relu));
}
