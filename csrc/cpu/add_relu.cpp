// The operators of _C_cpu.so. No CUDA here.
//
// cpu_add_relu: out = max(a + b, 0) in one pass over memory, which is what limits it; torch.relu(a + b) takes two.
// cpu_max_pool2d: the maximum of each window in channels_last memory, without the indices that ATen's also writes.
// cpu_instruction_set: which instructions the kernels of this library use, why, and what to warn of.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "cpu/vectors.h"

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
FUSED_RESNET_AVX512 void add_relu_avx512(const T* a, const T* b, T* out, int64_t n) {
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

// Whether add_relu_avx2<T> may run where the best instructions are AVX2 or wider.
template <class T>
bool can_convert() {
  return !std::is_same_v<T, Half> || __builtin_cpu_supports("f16c");
}
#endif

template <class T>
void add_relu_parallel(const void* a, const void* b, void* out, int64_t numel) {
  torch::stable::parallel_for(0, numel, kGrainSize, [&](int64_t begin, int64_t end) {
    const T* from_a = static_cast<const T*>(a) + begin;
    const T* from_b = static_cast<const T*>(b) + begin;
    T* to = static_cast<T*>(out) + begin;
#if defined(__x86_64__)
    const InstructionSet best = best_instruction_set();
    // only bfloat16, with its arithmetic on bits, gains from wider vectors; the others wait for memory
    if constexpr (std::is_same_v<T, BFloat16Bits>) {
      if (best == InstructionSet::kAvx512) return add_relu_avx512<T>(from_a, from_b, to, end - begin);
    }
    if (best != InstructionSet::kPortable && can_convert<T>()) {
      return add_relu_avx2<T>(from_a, from_b, to, end - begin);
    }
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

// ----------------------------------------------------------------------------------------------------- max pooling

// Sixteen-bit floats, whatever their format, as integers of the same order; every NaN becomes the largest.
template <int16_t kInfinity>
struct OrderedBits {
  using Storage = int16_t;
  static inline __attribute__((always_inline)) int16_t key(int16_t bits) {
    const int16_t ordered = bits ^ ((bits >> 15) & 0x7fff);
    const int16_t magnitude = bits & 0x7fff;
    return magnitude > kInfinity ? int16_t{0x7fff} : ordered;
  }
  // Larger of the two, channel by channel.
  static inline __attribute__((always_inline)) void fold(const int16_t* __restrict in, int16_t* __restrict out,
                                                         int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int16_t a = key(in[i]), b = key(out[i]);
      const int16_t larger = a > b ? a : b;
      out[i] = larger ^ ((larger >> 15) & 0x7fff);
    }
  }
};

// NaN compares false and stays once it is there, as in torch.
template <class T>
struct Ordinary {
  using Storage = T;
  static inline __attribute__((always_inline)) void fold(const T* __restrict in, T* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] > out[i] || in[i] != in[i] ? in[i] : out[i];
  }
};

struct Pooling {
  int64_t C, H, W, P, Q, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

// Rows [begin, end) of the output, counted over all images: row = (n, p).
template <class Format, class T = typename Format::Storage>
inline __attribute__((always_inline)) void max_pool_rows(const T* x, T* out, const Pooling& s, int64_t begin,
                                                         int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* image = x + row / s.P * s.H * s.W * s.C;
    const int64_t top = row % s.P * s.stride_h - s.padding_h;
    for (int64_t q = 0; q < s.Q; ++q) {
      const int64_t left = q * s.stride_w - s.padding_w;
      T* to = out + (row * s.Q + q) * s.C;
      bool is_first = true;
      for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + s.kernel_h, s.H); ++h) {
        for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + s.kernel_w, s.W); ++w) {
          const T* from = image + (h * s.W + w) * s.C;
          if (is_first) {
            std::memcpy(to, from, sizeof(T) * s.C);
          } else {
            Format::fold(from, to, s.C);
          }
          is_first = false;
        }
      }
    }
  }
}

#if defined(__x86_64__)
template <class Format, class T>
FUSED_RESNET_AVX512 void max_pool_avx512(const T* x, T* out, const Pooling& s, int64_t begin, int64_t end) {
  max_pool_rows<Format>(x, out, s, begin, end);
}

template <class Format, class T>
__attribute__((target("avx2"))) void max_pool_avx2(const T* x, T* out, const Pooling& s, int64_t begin, int64_t end) {
  max_pool_rows<Format>(x, out, s, begin, end);
}
#endif

template <class Format, class T = typename Format::Storage>
void max_pool_parallel(const void* from, void* to, const Pooling& s, int64_t rows) {
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const int64_t grain = std::max<int64_t>(1, kGrainSize / (s.Q * s.C * s.kernel_h * s.kernel_w));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
    const InstructionSet best = best_instruction_set();
    if (best == InstructionSet::kAvx512) return max_pool_avx512<Format>(x, out, s, begin, end);
    if (best == InstructionSet::kAvx2) return max_pool_avx2<Format>(x, out, s, begin, end);
#endif
    max_pool_rows<Format>(x, out, s, begin, end);
  });
}

void max_pool2d(Tensor x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                Tensor out) {
  constexpr const char* kPool = "cpu_max_pool2d";
  STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2, kPool,
                  ": kernel_size, stride and padding must have 2 values");
  STD_TORCH_CHECK(is_channels_last(x) && is_channels_last(out), kPool, ": x and out must be channels_last");
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), kPool, ": x and out must have one dtype");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && padding[i] >= 0 && padding[i] <= kernel_size[i] / 2, kPool,
                    ": window and stride must be positive and padding at most half the window");
    const int64_t room = x.size(2 + i) + 2 * padding[i] - kernel_size[i];
    STD_TORCH_CHECK(room >= 0 && out.size(2 + i) == room / stride[i] + 1, kPool, ": out has the wrong height or width");
  }
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == x.size(1), kPool, ": out has the wrong batch or channels");
  const Pooling s{x.size(1),      x.size(2), x.size(3), out.size(2), out.size(3), kernel_size[0],
                  kernel_size[1], stride[0], stride[1], padding[0],  padding[1]};
  if (out.numel() == 0) return;
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const int64_t rows = out.size(0) * s.P;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return max_pool_parallel<Ordinary<float>>(from, to, s, rows);
    case ScalarType::Double:
      return max_pool_parallel<Ordinary<double>>(from, to, s, rows);
    case ScalarType::Half:
      return max_pool_parallel<OrderedBits<0x7c00>>(from, to, s, rows);
    case ScalarType::BFloat16:
      return max_pool_parallel<OrderedBits<0x7f80>>(from, to, s, rows);
    default:
      STD_TORCH_CHECK(false, kPool, ": the dtype must be float32, float16, bfloat16 or float64");
  }
}

std::tuple<std::string, std::string, std::string> instruction_set() {
  const ChosenInstructions& chosen = chosen_instructions();
  return {kInstructionSetNames[static_cast<int>(chosen.set)], chosen.why, chosen.warning};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fused_resnet::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_add_relu", TORCH_BOX(&fused_resnet::add_relu));
  m.impl("cpu_max_pool2d", TORCH_BOX(&fused_resnet::max_pool2d));
}
