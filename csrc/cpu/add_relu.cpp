// cpu_add_relu: out = max(a + b, 0) in one pass over memory, which is what limits it; torch.relu(a + b) takes two.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/inline.h"
#include "cpu/dispatch.h"
#include "cpu/operator.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_resnet {
namespace {

using c10::Half;
using torch::headeronly::ScalarType;

// NaN compares false and stays, as in torch.relu.
template <class T>
FUSED_RESNET_INLINE T relu(T v) {
  return v < T(0) ? T(0) : v;
}

// Half and BFloat16 are added in fp32. max commutes with rounding, so it is applied to the fp32 sum.
template <class T>
FUSED_RESNET_INLINE void add_relu_loop(const T* a, const T* b, T* out, int64_t n) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(relu(static_cast<Wide>(a[i]) + static_cast<Wide>(b[i])));
}

// The same loop compiled for each instruction set.
template <class T>
void add_relu_anywhere(const T* a, const T* b, T* out, int64_t n) {
  add_relu_loop(a, b, out, n);
}

template <class T>
FUSED_RESNET_AVX2 void add_relu_avx2(const T* a, const T* b, T* out, int64_t n) {
  add_relu_loop(a, b, out, n);
}

template <class T>
FUSED_RESNET_AVX512 void add_relu_avx512(const T* a, const T* b, T* out, int64_t n) {
  add_relu_loop(a, b, out, n);
}

#if defined(__x86_64__)
__attribute__((target("avx2,f16c"))) void add_relu_f16c(const Half* a, const Half* b, Half* out, int64_t n) {
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
#endif

template <class T>
using AddRelu = void (*)(const T*, const T*, T*, int64_t);

// Only bfloat16, with its arithmetic on bits, gains from vectors wider than AVX2's; the others wait for memory.
template <class T>
AddRelu<T> best_add_relu() {
  return best_of<AddRelu<T>>(add_relu_anywhere<T>, add_relu_avx2<T>, nullptr);
}

template <>
AddRelu<BFloat16> best_add_relu() {
  return best_of<AddRelu<BFloat16>>(add_relu_anywhere<BFloat16>, add_relu_avx2<BFloat16>, add_relu_avx512<BFloat16>);
}

template <>
AddRelu<Half> best_add_relu() {
  AddRelu<Half> avx2 = nullptr;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c")) avx2 = add_relu_f16c;
#endif
  return best_of<AddRelu<Half>>(add_relu_anywhere<Half>, avx2, nullptr);
}

template <class T>
void add_relu_parallel(const void* a, const void* b, void* out, int64_t numel) {
  static const AddRelu<T> run = best_add_relu<T>();
  torch::stable::parallel_for(0, numel, kGrainSize, [&](int64_t begin, int64_t end) {
    run(static_cast<const T*>(a) + begin, static_cast<const T*>(b) + begin, static_cast<T*>(out) + begin, end - begin);
  });
}

void add_relu(Tensor a, Tensor b, Tensor out) {
  constexpr const char* kOp = "cpu_add_relu";
  check_pointwise(kOp, a, b, out);
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
      return add_relu_parallel<BFloat16>(from_a, from_b, to, numel);
    default:
      STD_TORCH_CHECK(false, kOp, ": the dtype must be float32, float16, bfloat16 or float64, not ", dtype_text(a));
  }
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_add_relu", TORCH_BOX(&fused_resnet::add_relu));
}
