// Batch norm of training with what follows it, y = act((x - mean) * weight / sqrt(var + eps) + bias + residual):
// - cpu_bn_statistics: mean and biased variance per channel, in one pass over x.
// - cpu_bn_act: y, and a bit for each of its elements that lets a gradient through, in one pass.
// - cpu_bn_act_sums: with g the gradient behind the activation, the sums of g and of g * (x - mean), in one pass.
// - cpu_bn_act_backward: the gradients of x and of the residual, in one pass.
//
// Sums over a channel: up to kTerms values in fp32, then fp64, in an order that the shape alone decides. So results are
// the same for any number of threads; they differ between instruction sets.
//
// Variances are sums of squares of x - shift. The shift is the mean of what came before, first the first value. Where
// the mean of m values is off by s from n more, the shift makes the sum of squares larger by n * s^2, and loses eps of
// that. But the variance then has at least m * n / (m + n) * s^2. So with n no larger than m, no data makes it cancel.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "cpu/bits.h"
#include "cpu/dispatch.h"
#include "cpu/operator.h"

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTerms = 512;     // of a sum in fp32, per lane
constexpr int64_t kMostParts = 32;  // that threads may share, of a map in NHWC
constexpr int64_t kFirst = 16;      // terms of the first sum, whose shift is a single value
constexpr int kVectors = 4;         // of channels that are summed at once

// A row is a pixel in NHWC, with a value per channel; in NCHW it is a plane, of one channel. Each has whole bytes of
// the mask.
struct Layout {
  int64_t N, C, pixels;
  bool is_nhwc;

  int64_t rows() const { return is_nhwc ? N * pixels : N * C; }
  int64_t length() const { return is_nhwc ? C : pixels; }
  int64_t mask_bytes() const { return (length() + 7) / 8; }
  int64_t count() const { return N * pixels; }
};

// How the rows of a map in NHWC are summed: in parts of whole chunks, in order.
struct Parts {
  int64_t rows, chunk_rows, chunks, parts;

  explicit Parts(const Layout& s) : rows(s.rows()) {
    chunk_rows = std::min(kTerms, std::max<int64_t>(32, 32768 / s.C));  // a chunk stays in the cache
    chunks = (rows + chunk_rows - 1) / chunk_rows;
    parts = std::max<int64_t>(1, std::min({chunks, kMostParts, rows * s.C / (4 * kGrainSize)}));
  }
  int64_t begin(int64_t part) const { return std::min(rows, part * chunks / parts * chunk_rows); }
};

// ----------------------------------------------------------------------------------------------------- statistics

// Sums of x - shift and of its square, over rows of `count` channels that lie `stride` apart.
template <int kLanes, int kCount, class T>
FUSED_RESNET_INLINE void moments(const T* x, int64_t stride, int64_t rows, int64_t count, const float* shift,
                                 float* sum, float* squares) {
  using V = typename Lanes<kLanes>::Vector;
  V shifts[kCount], sums[kCount] = {}, products[kCount] = {};
  for (int v = 0; v < kCount; ++v) load_some<kLanes>(shift + v * kLanes, count - v * kLanes, &shifts[v]);
  for (int64_t i = 0; i < rows; ++i) {
    for (int v = 0; v < kCount; ++v) {
      V value;
      if (kCount > 1) {
        load<kLanes>(x + i * stride + v * kLanes, &value);
      } else {
        load_some<kLanes>(x + i * stride, count, &value);
      }
      value -= shifts[v];
      sums[v] += value;
      products[v] += value * value;
    }
  }
  for (int v = 0; v < kCount; ++v) {
    store_some<kLanes>(sums[v], count - v * kLanes, sum + v * kLanes);
    store_some<kLanes>(products[v], count - v * kLanes, squares + v * kLanes);
  }
}

// Mean and sum of squared deviations of n values, joined with those of `more` others (Chan, Golub, LeVeque 1979).
FUSED_RESNET_INLINE void join(double n, double more, double other_mean, double other_squares, double* mean,
                              double* squares) {
  const double share = more / (n + more), delta = other_mean - *mean;
  *mean += delta * share;
  *squares += other_squares + delta * delta * n * share;
}

// One part of a map in NHWC: C means, then C sums of squared deviations. floats: 3 * C of them, for shifts and sums.
template <int kLanes, class T>
FUSED_RESNET_INLINE void part_moments(const T* x, const Layout& s, int64_t begin, int64_t end, float* floats,
                                      double* result) {
  const int64_t C = s.C, chunk_rows = Parts(s).chunk_rows;
  double *mean = result, *squares = result + C;
  float *shift = floats, *sum = shift + C, *products = sum + C;
  int64_t rows = 0;
  for (int64_t row = begin; row < end; row += rows) {
    rows = std::min({chunk_rows, end - row, std::max(kFirst, row - begin)});
    const T* from = x + row * C;
    if (row == begin) {
      for (int64_t c = 0; c < C; ++c) shift[c] = static_cast<float>(from[c]);
      std::fill(result, result + 2 * C, 0.0);
    } else {
      for (int64_t c = 0; c < C; ++c) shift[c] = static_cast<float>(mean[c]);
    }
    int64_t c = 0;
    for (; c + kVectors * kLanes <= C; c += kVectors * kLanes) {
      moments<kLanes, kVectors>(from + c, C, rows, C - c, shift + c, sum + c, products + c);
    }
    for (; c < C; c += kLanes) moments<kLanes, 1>(from + c, C, rows, C - c, shift + c, sum + c, products + c);
    const double before = row - begin, more = rows, inverse = 1.0 / more;
    for (c = 0; c < C; ++c) {
      const double off = sum[c] * inverse;
      join(before, more, shift[c] + off, products[c] - sum[c] * off, mean + c, squares + c);
    }
  }
}

// The sums of a channel's planes, in NCHW, over lanes.
template <int kLanes>
struct LaneSums {
  typename Lanes<kLanes>::Vector first = {}, second = {};

  FUSED_RESNET_INLINE void take(double* one, double* other) {
    double total[2] = {0.0, 0.0};
    for (int i = 0; i < kLanes; ++i) total[0] += first[i], total[1] += second[i];
    *one = total[0], *other = total[1];
    first = second = typename Lanes<kLanes>::Vector{};
  }
};

template <int kLanes, class T>
FUSED_RESNET_INLINE void channel_moments(const T* x, const Layout& s, int64_t c, double* mean, double* squares) {
  using V = typename Lanes<kLanes>::Vector;
  *mean = *squares = 0.0;
  float shift = static_cast<float>(x[c * s.pixels]);
  LaneSums<kLanes> sums;
  int64_t before = 0, more = 0, most = kFirst;
  for (int64_t n = 0; n < s.N; ++n) {
    const T* from = x + (n * s.C + c) * s.pixels;
    for (int64_t i = 0; i < s.pixels; i += kLanes) {
      V value;
      load_some<kLanes>(from + i, s.pixels - i, &value);
      value -= shift;
      keep_first<kLanes>(s.pixels - i, &value);
      sums.first += value;
      sums.second += value * value;
      more += std::min<int64_t>(kLanes, s.pixels - i);
      if (more >= most || (n == s.N - 1 && i + kLanes >= s.pixels)) {
        double sum, products;
        sums.take(&sum, &products);
        const double off = sum / static_cast<double>(more);
        join(before, more, shift + off, products - sum * off, mean, squares);
        before += more, more = 0;
        most = std::min(kTerms * kLanes, std::max(kFirst, before));
        shift = static_cast<float>(*mean);
      }
    }
  }
}

// Units [begin, end): parts in NHWC, channels in NCHW. A unit's result is means and sums of squared deviations.
template <int kLanes, class T>
FUSED_RESNET_INLINE void units_moments(const T* x, const Layout& s, float* floats, double* results, int64_t begin,
                                       int64_t end) {
  const Parts parts(s);
  for (int64_t i = begin; i < end; ++i) {
    if (s.is_nhwc) {
      part_moments<kLanes>(x, s, parts.begin(i), parts.begin(i + 1), floats + i * 3 * s.C, results + i * 2 * s.C);
    } else {
      channel_moments<kLanes>(x, s, i, results + 2 * i, results + 2 * i + 1);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ forward

// Values of a channel: one for each lane in NHWC, one for all in NCHW.
template <int kLanes, bool kIsShared>
FUSED_RESNET_INLINE void load_channels(const float* from, int64_t count, typename Lanes<kLanes>::Vector* to) {
  if (kIsShared) {
    *to = typename Lanes<kLanes>::Vector{} + *from;
  } else {
    load_some<kLanes>(from, count, to);
  }
}

template <class T>
struct Forward {
  const T *x, *residual;  // residual may be null
  const float *mean, *scale, *bias;
  Activation activation;
  uint8_t* mask;  // null where it is not wanted
  T* y;
};

template <int kLanes, bool kIsShared, class T>
FUSED_RESNET_INLINE void forward_row(const Forward<T>& f, int64_t at, int64_t c, int64_t count, uint8_t* mask) {
  using V = typename Lanes<kLanes>::Vector;
  V mean, scale, bias, value, residual;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i, channel = kIsShared ? c : i;
    load_channels<kLanes, kIsShared>(f.mean + channel, left, &mean);
    load_channels<kLanes, kIsShared>(f.scale + channel, left, &scale);
    load_channels<kLanes, kIsShared>(f.bias + channel, left, &bias);
    load_some<kLanes>(f.x + at + i, left, &value);
    value = (value - mean) * scale + bias;
    if (f.residual != nullptr) {
      load_some<kLanes>(f.residual + at + i, left, &residual);
      value += residual;
    }
    if (f.activation == Activation::kRelu) {
      // NaN compares false: it passes, as in torch
      if (mask != nullptr) store_bits<kLanes>(~(value <= 0.f), left, mask + i / 8);
      value = value < 0.f ? V{} : value;
    } else if (f.activation == Activation::kRelu6) {
      if (mask != nullptr) store_bits<kLanes>(~((value <= 0.f) | (value >= 6.f)), left, mask + i / 8);
      value = value < 0.f ? V{} : value;
      value = value > 6.f ? V{} + 6.f : value;
    }
    store_some<kLanes>(value, left, f.y + at + i);
  }
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void forward_rows(const Forward<T>& f, const Layout& s, int64_t begin, int64_t end) {
  const int64_t length = s.length(), bytes = s.mask_bytes();
  for (int64_t i = begin; i < end; ++i) {
    uint8_t* mask = f.mask == nullptr ? nullptr : f.mask + i * bytes;
    if (s.is_nhwc) {
      forward_row<kLanes, false>(f, i * length, 0, length, mask);
    } else {
      forward_row<kLanes, true>(f, i * length, i % s.C, length, mask);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- backward

template <class T>
struct Backward {
  const T *grad, *x;
  const float* mean;
  const uint8_t* mask;  // null without an activation
};

// Sums of g and of g * (x - mean), over rows from `row` on and the `count` channels from c on.
template <int kLanes, int kCount, class T>
FUSED_RESNET_INLINE void products(const Backward<T>& b, const Layout& s, int64_t row, int64_t rows, int64_t c,
                                  float* sum, float* dot) {
  using V = typename Lanes<kLanes>::Vector;
  const int64_t bytes = s.mask_bytes(), count = s.C - c;
  V means[kCount], sums[kCount] = {}, dots[kCount] = {};
  for (int v = 0; v < kCount; ++v) load_some<kLanes>(b.mean + c + v * kLanes, count - v * kLanes, &means[v]);
  for (int64_t i = row; i < row + rows; ++i) {
    for (int v = 0; v < kCount; ++v) {
      const int64_t at = i * s.C + c + v * kLanes, left = kCount > 1 ? kLanes : count;
      V g, value;
      load_some<kLanes>(b.grad + at, left, &g);
      load_some<kLanes>(b.x + at, left, &value);
      if (b.mask != nullptr) keep_set<kLanes>(b.mask + i * bytes + (c + v * kLanes) / 8, left, &g);
      sums[v] += g;
      dots[v] += g * (value - means[v]);
    }
  }
  for (int v = 0; v < kCount; ++v) {
    store_some<kLanes>(sums[v], count - v * kLanes, sum + v * kLanes);
    store_some<kLanes>(dots[v], count - v * kLanes, dot + v * kLanes);
  }
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void part_products(const Backward<T>& b, const Layout& s, int64_t begin, int64_t end, float* floats,
                                       double* result) {
  const int64_t C = s.C, chunk_rows = Parts(s).chunk_rows;
  std::fill(result, result + 2 * C, 0.0);
  for (int64_t row = begin; row < end; row += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, end - row);
    int64_t c = 0;
    for (; c + kVectors * kLanes <= C; c += kVectors * kLanes) {
      products<kLanes, kVectors>(b, s, row, rows, c, floats + c, floats + C + c);
    }
    for (; c < C; c += kLanes) products<kLanes, 1>(b, s, row, rows, c, floats + c, floats + C + c);
    for (c = 0; c < 2 * C; ++c) result[c] += floats[c];
  }
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void channel_products(const Backward<T>& b, const Layout& s, int64_t c, double* sum, double* dot) {
  using V = typename Lanes<kLanes>::Vector;
  const int64_t bytes = s.mask_bytes();
  *sum = *dot = 0.0;
  LaneSums<kLanes> sums;
  int64_t terms = 0;
  for (int64_t n = 0; n < s.N; ++n) {
    const int64_t row = n * s.C + c;
    for (int64_t i = 0; i < s.pixels; i += kLanes) {
      const int64_t at = row * s.pixels + i, left = s.pixels - i;
      V g, value;
      load_some<kLanes>(b.grad + at, left, &g);
      load_some<kLanes>(b.x + at, left, &value);
      if (b.mask != nullptr) keep_set<kLanes>(b.mask + row * bytes + i / 8, left, &g);
      value = g * (value - b.mean[c]);
      keep_first<kLanes>(left, &value);
      sums.first += g;
      sums.second += value;
      if (++terms == kTerms || (n == s.N - 1 && i + kLanes >= s.pixels)) {
        double more, dots;
        sums.take(&more, &dots);
        *sum += more, *dot += dots;
        terms = 0;
      }
    }
  }
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void units_products(const Backward<T>& b, const Layout& s, float* floats, double* results,
                                        int64_t begin, int64_t end) {
  const Parts parts(s);
  for (int64_t i = begin; i < end; ++i) {
    if (s.is_nhwc) {
      part_products<kLanes>(b, s, parts.begin(i), parts.begin(i + 1), floats + i * 3 * s.C, results + i * 2 * s.C);
    } else {
      channel_products<kLanes>(b, s, i, results + 2 * i, results + 2 * i + 1);
    }
  }
}

// The gradient of x is by_g * g + by_x * (x - mean) + shift, per channel.
struct Gradient {
  const float *by_g, *by_x, *shift;  // the last two are null where the statistics are constants
};

template <int kLanes, bool kIsShared, class T>
FUSED_RESNET_INLINE void backward_row(const Backward<T>& b, const Gradient& by, int64_t at, int64_t c, int64_t count,
                                      const uint8_t* mask, T* grad_x, T* grad_residual) {
  using V = typename Lanes<kLanes>::Vector;
  V g, value, mean, by_g, by_x, shift;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i, channel = kIsShared ? c : i;
    load_some<kLanes>(b.grad + at + i, left, &g);
    if (mask != nullptr) keep_set<kLanes>(mask + i / 8, left, &g);
    if (grad_residual != nullptr) store_some<kLanes>(g, left, grad_residual + at + i);
    if (grad_x == nullptr) continue;
    load_channels<kLanes, kIsShared>(by.by_g + channel, left, &by_g);
    V to = g * by_g;
    if (by.by_x != nullptr) {
      load_channels<kLanes, kIsShared>(b.mean + channel, left, &mean);
      load_channels<kLanes, kIsShared>(by.by_x + channel, left, &by_x);
      load_channels<kLanes, kIsShared>(by.shift + channel, left, &shift);
      load_some<kLanes>(b.x + at + i, left, &value);
      to += (value - mean) * by_x + shift;
    }
    store_some<kLanes>(to, left, grad_x + at + i);
  }
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void backward_rows(const Backward<T>& b, const Gradient& by, const Layout& s, T* grad_x,
                                       T* grad_residual, int64_t begin, int64_t end) {
  const int64_t length = s.length(), bytes = s.mask_bytes();
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* mask = b.mask == nullptr ? nullptr : b.mask + i * bytes;
    if (s.is_nhwc) {
      backward_row<kLanes, false>(b, by, i * length, 0, length, mask, grad_x, grad_residual);
    } else {
      backward_row<kLanes, true>(b, by, i * length, i % s.C, length, mask, grad_x, grad_residual);
    }
  }
}

// ------------------------------------------------------------------------------- the same for each instruction set

template <class T>
struct Kernels {
  void (*moments)(const T*, const Layout&, float*, double*, int64_t, int64_t);
  void (*forward)(const Forward<T>&, const Layout&, int64_t, int64_t);
  void (*products)(const Backward<T>&, const Layout&, float*, double*, int64_t, int64_t);
  void (*backward)(const Backward<T>&, const Gradient&, const Layout&, T*, T*, int64_t, int64_t);
};

#define FUSED_RESNET_BN_KERNELS(name, target, lanes)                                                                  \
  template <class T>                                                                                                  \
  target void moments_##name(const T* x, const Layout& s, float* floats, double* results, int64_t begin,              \
                             int64_t end) {                                                                           \
    units_moments<lanes>(x, s, floats, results, begin, end);                                                          \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void forward_##name(const Forward<T>& f, const Layout& s, int64_t begin, int64_t end) {                      \
    forward_rows<lanes>(f, s, begin, end);                                                                            \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void products_##name(const Backward<T>& b, const Layout& s, float* floats, double* results, int64_t begin,   \
                              int64_t end) {                                                                          \
    units_products<lanes>(b, s, floats, results, begin, end);                                                         \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  target void backward_##name(const Backward<T>& b, const Gradient& by, const Layout& s, T* grad_x, T* grad_residual, \
                              int64_t begin, int64_t end) {                                                           \
    backward_rows<lanes>(b, by, s, grad_x, grad_residual, begin, end);                                                \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  constexpr Kernels<T> kernels_##name{moments_##name<T>, forward_##name<T>, products_##name<T>, backward_##name<T>};

FUSED_RESNET_BN_KERNELS(anywhere, , 8)
FUSED_RESNET_BN_KERNELS(avx2, FUSED_RESNET_AVX2, 8)
FUSED_RESNET_BN_KERNELS(avx512, FUSED_RESNET_AVX512, 16)

template <class T>
const Kernels<T>& kernels() {
  static const auto* best = best_of(&kernels_anywhere<T>, &kernels_avx2<T>, &kernels_avx512<T>);
  return *best;
}

// ---------------------------------------------------------------------------------------------------------- operators

// NCHW where that is what x is; NHWC else, and of what is both in maps of one pixel.
Layout layout_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, not ", x.dim());
  const int64_t pixels = x.size(2) * x.size(3);
  const bool is_nchw = x.is_contiguous() && pixels != 1;
  if (!is_nchw) check_channels_last(op, "x", x);
  return {x.size(0), x.size(1), pixels, !is_nchw};
}

const float* vector_of(const char* op, const char* name, const Tensor& vector, int64_t channels) {
  check_float(op, vector, name);
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == channels && vector.is_contiguous(), op, ": ", name,
                  " must be a contiguous vector with one value for each of ", channels, " channels, not ",
                  layout_text(vector));
  return static_cast<const float*>(vector.const_data_ptr());
}

float* vector_to(const char* op, const char* name, const Tensor& vector, int64_t channels) {
  vector_of(op, name, vector, channels);
  return static_cast<float*>(vector.mutable_data_ptr());
}

// A map that is walked together with x.
void check_alike(const char* op, const char* name, const Tensor& map, const Tensor& x) {
  STD_TORCH_CHECK(map.scalar_type() == x.scalar_type() && same_layout(map, x), op, ": ", name,
                  " must have x's shape, layout and dtype: ", layout_text(x), " of ", dtype_text(x), ", not ",
                  layout_text(map), " of ", dtype_text(map));
}

void check_mask(const char* op, const std::optional<Tensor>& mask, const Layout& s) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->is_contiguous(), op,
                  ": mask must be contiguous uint8, not ", layout_text(*mask), " of ", dtype_text(*mask));
  check_shape(op, "mask", *mask, {s.rows(), s.mask_bytes()});
}

// Calls run(T()) with the element type of x.
template <class Run>
void with_dtype(const char* op, const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::BFloat16:
      return run(BFloat16());
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32 or bfloat16, not ", dtype_text(x));
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class Rows>
void for_rows(const Layout& s, const Rows& rows) {
  torch::stable::parallel_for(0, s.rows(), std::max<int64_t>(1, kGrainSize / s.length()), rows);
}

// Calls run(floats, results, begin, end) for the units that are summed separately, and returns the results: 2 * C
// values for each part in NHWC, 2 for each channel in NCHW.
template <class Run>
std::vector<double> summed(const char* op, const Layout& s, const Run& run) {
  const int64_t units = s.is_nhwc ? Parts(s).parts : s.C, elements = s.count() * s.C / units;
  std::vector<double> results(units * 2 * (s.is_nhwc ? s.C : 1));
  float* floats = s.is_nhwc ? scratch(op, units * 3 * s.C) : nullptr;
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, elements)),
                              [&](int64_t begin, int64_t end) { run(floats, results.data(), begin, end); });
  return results;
}

void statistics(Tensor x, Tensor mean, Tensor var) {
  constexpr const char* kOp = "cpu_bn_statistics";
  const Layout s = layout_of(kOp, x);
  float *means = vector_to(kOp, "mean", mean, s.C), *vars = vector_to(kOp, "var", var, s.C);
  STD_TORCH_CHECK(x.numel() > 0, kOp, ": x has no values, its shape is ", shape_text(x));
  std::vector<double> results;
  with_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    results = summed(kOp, s, [&](float* floats, double* to, int64_t begin, int64_t end) {
      kernels<T>().moments(data<T>(x), s, floats, to, begin, end);
    });
  });
  const Parts parts(s);
  for (int64_t part = 1; s.is_nhwc && part < parts.parts; ++part) {
    const double before = parts.begin(part), more = parts.begin(part + 1) - parts.begin(part);
    const double* other = results.data() + part * 2 * s.C;
    for (int64_t c = 0; c < s.C; ++c) join(before, more, other[c], other[s.C + c], &results[c], &results[s.C + c]);
  }
  const double count = s.count();
  for (int64_t c = 0; c < s.C; ++c) {
    means[c] = static_cast<float>(s.is_nhwc ? results[c] : results[2 * c]);
    vars[c] = static_cast<float>((s.is_nhwc ? results[s.C + c] : results[2 * c + 1]) / count);
  }
}

void bn_act(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
            std::optional<Tensor> residual, std::string activation, std::optional<Tensor> mask, Tensor y) {
  constexpr const char* kOp = "cpu_bn_act";
  const Activation parsed = parse_activation(kOp, activation, Activation::kRelu6);
  const Layout s = layout_of(kOp, x);
  const float *means = vector_of(kOp, "mean", mean, s.C), *vars = vector_of(kOp, "var", var, s.C);
  const float* weights = weight.has_value() ? vector_of(kOp, "weight", *weight, s.C) : nullptr;
  const float* biases = bias.has_value() ? vector_of(kOp, "bias", *bias, s.C) : nullptr;
  check_alike(kOp, "y", y, x);
  if (residual.has_value()) check_alike(kOp, "residual", *residual, x);
  check_mask(kOp, mask, s);
  STD_TORCH_CHECK(!mask.has_value() || parsed != Activation::kNone, kOp, ": without an activation there is no mask");
  if (x.numel() == 0) return;
  float *scale = scratch(kOp, 2 * s.C), *shift = scale + s.C;
  for (int64_t c = 0; c < s.C; ++c) {
    scale[c] = static_cast<float>((weights == nullptr ? 1.0 : weights[c]) / std::sqrt(vars[c] + eps));
    shift[c] = biases == nullptr ? 0.f : biases[c];
  }
  auto* bits = mask.has_value() ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr;
  with_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> f{data<T>(x), residual.has_value() ? data<T>(*residual) : nullptr,
                       means,      scale,
                       shift,      parsed,
                       bits,       static_cast<T*>(y.mutable_data_ptr())};
    for_rows(s, [&](int64_t begin, int64_t end) { kernels<T>().forward(f, s, begin, end); });
  });
}

void bn_act_sums(Tensor grad, Tensor x, Tensor mean, std::optional<Tensor> mask, Tensor sum, Tensor dot) {
  constexpr const char* kOp = "cpu_bn_act_sums";
  const Layout s = layout_of(kOp, x);
  check_alike(kOp, "grad", grad, x);
  const float* means = vector_of(kOp, "mean", mean, s.C);
  check_mask(kOp, mask, s);
  float *sums = vector_to(kOp, "sum", sum, s.C), *dots = vector_to(kOp, "dot", dot, s.C);
  STD_TORCH_CHECK(x.numel() > 0, kOp, ": x has no values, its shape is ", shape_text(x));
  std::vector<double> results;
  with_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> b{data<T>(grad), data<T>(x), means, mask.has_value() ? data<uint8_t>(*mask) : nullptr};
    results = summed(kOp, s, [&](float* floats, double* to, int64_t begin, int64_t end) {
      kernels<T>().products(b, s, floats, to, begin, end);
    });
  });
  for (int64_t part = 1; s.is_nhwc && part < Parts(s).parts; ++part) {
    for (int64_t i = 0; i < 2 * s.C; ++i) results[i] += results[part * 2 * s.C + i];
  }
  for (int64_t c = 0; c < s.C; ++c) {
    sums[c] = static_cast<float>(s.is_nhwc ? results[c] : results[2 * c]);
    dots[c] = static_cast<float>(s.is_nhwc ? results[s.C + c] : results[2 * c + 1]);
  }
}

void bn_act_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, double eps,
                     std::optional<Tensor> mask, std::optional<Tensor> sum, std::optional<Tensor> dot,
                     std::optional<Tensor> grad_x, std::optional<Tensor> grad_residual) {
  constexpr const char* kOp = "cpu_bn_act_backward";
  const Layout s = layout_of(kOp, x);
  check_alike(kOp, "grad", grad, x);
  const float *means = vector_of(kOp, "mean", mean, s.C), *vars = vector_of(kOp, "var", var, s.C);
  const float* weights = weight.has_value() ? vector_of(kOp, "weight", *weight, s.C) : nullptr;
  check_mask(kOp, mask, s);
  STD_TORCH_CHECK(sum.has_value() == dot.has_value(), kOp, ": sum and dot come together");
  const float* sums = sum.has_value() ? vector_of(kOp, "sum", *sum, s.C) : nullptr;
  const float* dots = dot.has_value() ? vector_of(kOp, "dot", *dot, s.C) : nullptr;
  if (grad_x.has_value()) check_alike(kOp, "grad_x", *grad_x, x);
  if (grad_residual.has_value()) check_alike(kOp, "grad_residual", *grad_residual, x);
  if (x.numel() == 0) return;
  float *by_g = scratch(kOp, 3 * s.C), *by_x = by_g + s.C, *shift = by_x + s.C;
  for (int64_t c = 0; c < s.C; ++c) {
    const double inverse = 1.0 / std::sqrt(vars[c] + eps), scale = (weights == nullptr ? 1.0 : weights[c]) * inverse;
    by_g[c] = static_cast<float>(scale);
    if (sums == nullptr) continue;
    by_x[c] = static_cast<float>(-scale * inverse * inverse * dots[c] / s.count());
    shift[c] = static_cast<float>(-scale * sums[c] / s.count());
  }
  const Gradient by{by_g, sums == nullptr ? nullptr : by_x, shift};
  with_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> b{data<T>(grad), data<T>(x), means, mask.has_value() ? data<uint8_t>(*mask) : nullptr};
    T* to_x = grad_x.has_value() ? static_cast<T*>(grad_x->mutable_data_ptr()) : nullptr;
    T* to_residual = grad_residual.has_value() ? static_cast<T*>(grad_residual->mutable_data_ptr()) : nullptr;
    for_rows(s, [&](int64_t begin, int64_t end) { kernels<T>().backward(b, by, s, to_x, to_residual, begin, end); });
  });
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_bn_statistics", TORCH_BOX(&fused_resnet::statistics));
  m.impl("cpu_bn_act", TORCH_BOX(&fused_resnet::bn_act));
  m.impl("cpu_bn_act_sums", TORCH_BOX(&fused_resnet::bn_act_sums));
  m.impl("cpu_bn_act_backward", TORCH_BOX(&fused_resnet::bn_act_backward));
}
