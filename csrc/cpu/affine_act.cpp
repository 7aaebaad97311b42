// cpu_affine_act: y = act((y - mean) * weight / sqrt(var + eps) + bias + residual), in place: what follows a
// convolution, in one pass over memory. ATen takes one for batch_norm, one for the addition and one for the activation.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/operator.h"

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "cpu_affine_act";

// y as (outer, channels, inner) in memory: inner is 1 in NHWC, and outer N in NCHW.
struct Layout {
  int64_t outer, channels, inner;
};

// Where all elements of a row of `count` have scales and shifts of their own (NHWC), or one for all (NCHW).
template <int kLanes, bool kIsShared, class T>
FUSED_RESNET_INLINE void row(T* y, const float* scale, const float* shift, int64_t at, int64_t count,
                             const Epilogue<T>& epilogue) {
  typename Lanes<kLanes>::Vector value, scales, shifts;
  if (kIsShared) {
    scales = typename Lanes<kLanes>::Vector{} + *scale;
    shifts = typename Lanes<kLanes>::Vector{} + *shift;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    load_some<kLanes>(y + at + i, count - i, &value);
    if (!kIsShared) {
      load_some<kLanes>(scale + i, count - i, &scales);
      load_some<kLanes>(shift + i, count - i, &shifts);
    }
    const typename Lanes<kLanes>::Vector sum = value * scales + shifts;
    finish<kLanes>(sum, epilogue, at + i, count - i, y);
  }
}

// Rows [begin, end): of pixels in NHWC, of planes in NCHW. scale: the channels' scales, then their shifts.
template <int kLanes, class T>
FUSED_RESNET_INLINE void rows(T* y, const float* scale, const Layout& s, const Epilogue<T>& epilogue, int64_t begin,
                              int64_t end) {
  const float* shift = scale + s.channels;
  for (int64_t i = begin; i < end; ++i) {
    if (s.inner == 1) {
      row<kLanes, false>(y, scale, shift, i * s.channels, s.channels, epilogue);
    } else {
      const int64_t c = i % s.channels;
      row<kLanes, true>(y, scale + c, shift + c, i * s.inner, s.inner, epilogue);
    }
  }
}

// The same rows compiled for each instruction set.
template <class T>
void rows_anywhere(T* y, const float* scale, const Layout& s, const Epilogue<T>& e, int64_t begin, int64_t end) {
  rows<4>(y, scale, s, e, begin, end);
}

template <class T>
FUSED_RESNET_AVX2 void rows_avx2(T* y, const float* scale, const Layout& s, const Epilogue<T>& e, int64_t begin,
                                 int64_t end) {
  rows<8>(y, scale, s, e, begin, end);
}

template <class T>
FUSED_RESNET_AVX512 void rows_avx512(T* y, const float* scale, const Layout& s, const Epilogue<T>& e, int64_t begin,
                                     int64_t end) {
  rows<16>(y, scale, s, e, begin, end);
}

template <class T>
void run(const Tensor& y, const float* scale, const Layout& s, const Epilogue<T>& epilogue) {
  using Rows = void (*)(T*, const float*, const Layout&, const Epilogue<T>&, int64_t, int64_t);
  static const auto run_rows = best_of<Rows>(rows_anywhere<T>, rows_avx2<T>, rows_avx512<T>);
  T* to = static_cast<T*>(y.mutable_data_ptr());
  const bool is_nhwc = s.inner == 1;
  const int64_t count = is_nhwc ? s.outer : s.outer * s.channels, length = is_nhwc ? s.channels : s.inner;
  const int64_t grain = std::max<int64_t>(1, kGrainSize / length);
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { run_rows(to, scale, s, epilogue, begin, end); });
}

// NHWC where that is what y alone is; NCHW else.
Layout layout_of(const Tensor& y) {
  STD_TORCH_CHECK(y.dim() == 4, kOp, ": y must have 4 dimensions, not ", y.dim());
  const int64_t N = y.size(0), C = y.size(1), pixels = y.size(2) * y.size(3);
  if (y.is_contiguous() && pixels > 1) return {N, C, pixels};
  check_channels_last(kOp, "y", y);
  return {N * pixels, C, 1};
}

// A vector of the epilogue as fp32, into `to`; `missing` where there is none.
void read(const char* name, const std::optional<Tensor>& vector, float missing, int64_t channels, float* to) {
  if (!vector.has_value()) {
    std::fill(to, to + channels, missing);
    return;
  }
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous(), kOp, ": ", name,
                  " must be a contiguous vector with one value for each of ", channels, " channels, not ",
                  layout_text(*vector));
  const void* from = vector->const_data_ptr();
  if (vector->scalar_type() == ScalarType::BFloat16) {
    const auto* values = static_cast<const BFloat16*>(from);
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(values[c]);
    return;
  }
  check_float(kOp, *vector, name);
  std::copy_n(static_cast<const float*>(from), channels, to);
}

// Scales and shifts as ATen's batch_norm computes them.
const float* read_affine(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps,
                         int64_t channels) {
  float* scale = scratch(kOp, 4 * channels);
  float *shift = scale + channels, *means = shift + channels, *vars = means + channels;
  read("weight", weight, 1.f, channels, scale);
  read("bias", bias, 0.f, channels, shift);
  read("mean", mean, 0.f, channels, means);
  if (var.has_value()) {
    read("var", var, 1.f, channels, vars);
    for (int64_t c = 0; c < channels; ++c) scale[c] *= 1.f / std::sqrt(vars[c] + static_cast<float>(eps));
  }
  for (int64_t c = 0; c < channels; ++c) shift[c] -= means[c] * scale[c];
  return scale;
}

void affine_act(Tensor y, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> mean,
                std::optional<Tensor> var, double eps, std::optional<Tensor> residual, std::string activation) {
  const Activation parsed = parse_activation(kOp, activation, Activation::kSilu);
  const Layout s = layout_of(y);
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->scalar_type() == y.scalar_type() && same_layout(*residual, y), kOp,
                    ": residual must have y's shape, layout and dtype: ", layout_text(y), " of ", dtype_text(y),
                    ", not ", layout_text(*residual), " of ", dtype_text(*residual));
  }
  if (y.numel() == 0) return;
  const float* scale = read_affine(weight, bias, mean, var, eps, s.channels);
  switch (y.scalar_type()) {
    case ScalarType::Float:
      return run(y, scale, s, epilogue_of<float>(std::nullopt, residual, parsed));
    case ScalarType::BFloat16:
      return run(y, scale, s, epilogue_of<BFloat16>(std::nullopt, residual, parsed));
    default:
      STD_TORCH_CHECK(false, kOp, ": the dtype must be float32 or bfloat16, not ", dtype_text(y));
  }
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_affine_act", TORCH_BOX(&fused_resnet::affine_act));
}
