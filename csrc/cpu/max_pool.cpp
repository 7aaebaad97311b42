// cpu_max_pool2d: the maximum of each window in channels_last memory, without the indices that ATen's also writes.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/inline.h"
#include "cpu/dispatch.h"
#include "cpu/operator.h"

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;

// Sixteen-bit floats, whatever their format, as integers of the same order; every NaN becomes the largest.
template <int16_t kInfinity>
struct OrderedBits {
  using Storage = int16_t;
  static FUSED_RESNET_INLINE int16_t key(int16_t bits) {
    const int16_t ordered = bits ^ ((bits >> 15) & 0x7fff);
    const int16_t magnitude = bits & 0x7fff;
    return magnitude > kInfinity ? int16_t{0x7fff} : ordered;
  }
  // Larger of the two, channel by channel.
  static FUSED_RESNET_INLINE void fold(const int16_t* __restrict in, int16_t* __restrict out, int64_t n) {
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
  static FUSED_RESNET_INLINE void fold(const T* __restrict in, T* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] > out[i] || in[i] != in[i] ? in[i] : out[i];
  }
};

struct Pooling {
  int64_t C, H, W, P, Q, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

// Rows [begin, end) of the output, counted over all images: row = (n, p).
template <class Format, class T = typename Format::Storage>
FUSED_RESNET_INLINE void max_pool_rows(const T* x, T* out, const Pooling& s, int64_t begin, int64_t end) {
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

// The same rows compiled for each instruction set.
template <class Format, class T>
void max_pool_anywhere(const T* x, T* out, const Pooling& s, int64_t begin, int64_t end) {
  max_pool_rows<Format>(x, out, s, begin, end);
}

template <class Format, class T>
FUSED_RESNET_AVX2 void max_pool_avx2(const T* x, T* out, const Pooling& s, int64_t begin, int64_t end) {
  max_pool_rows<Format>(x, out, s, begin, end);
}

template <class Format, class T>
FUSED_RESNET_AVX512 void max_pool_avx512(const T* x, T* out, const Pooling& s, int64_t begin, int64_t end) {
  max_pool_rows<Format>(x, out, s, begin, end);
}

template <class Format, class T = typename Format::Storage>
void max_pool_parallel(const void* from, void* to, const Pooling& s, int64_t rows) {
  using MaxPool = void (*)(const T*, T*, const Pooling&, int64_t, int64_t);
  static const auto run =
      best_of<MaxPool>(max_pool_anywhere<Format, T>, max_pool_avx2<Format, T>, max_pool_avx512<Format, T>);
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const int64_t grain = std::max<int64_t>(1, kGrainSize / (s.Q * s.C * s.kernel_h * s.kernel_w));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(x, out, s, begin, end); });
}

void max_pool2d(Tensor x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                Tensor out) {
  constexpr const char* kOp = "cpu_max_pool2d";
  check_pair(kOp, "kernel_size", kernel_size);
  check_pair(kOp, "stride", stride);
  check_pair(kOp, "padding", padding);
  check_channels_last(kOp, "x", x);
  check_channels_last(kOp, "out", out);
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), kOp, ": x and out must have one dtype, not ", dtype_text(x),
                  " and ", dtype_text(out));
  std::vector<int64_t> expected = {x.size(0), x.size(1)};
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && padding[i] >= 0 && padding[i] <= kernel_size[i] / 2, kOp,
                    ": window and stride must be positive and padding at most half the window, not ",
                    in_parentheses(kernel_size), ", ", in_parentheses(stride), " and ", in_parentheses(padding));
    const int64_t room = x.size(2 + i) + 2 * padding[i] - kernel_size[i];
    STD_TORCH_CHECK(room >= 0, kOp, ": a window of ", in_parentheses(kernel_size), " does not fit x of ", shape_text(x),
                    " with padding ", in_parentheses(padding));
    expected.push_back(room / stride[i] + 1);
  }
  check_shape(kOp, "out", out, expected);
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
      STD_TORCH_CHECK(false, kOp, ": the dtype must be float32, float16, bfloat16 or float64, not ", dtype_text(x));
  }
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_max_pool2d", TORCH_BOX(&fused_resnet::max_pool2d));
}
