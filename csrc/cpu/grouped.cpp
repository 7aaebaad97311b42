// cpu_grouped_conv: a grouped 3x3 convolution with bias, residual and activation in one pass.
#include "cpu/grouped.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/operator.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "cpu_grouped_conv";
constexpr int64_t kGrainProducts = 1 << 18;  // a few microseconds of arithmetic for each thread at least

template <class T>
using RunRows = void (*)(const grouped::Shape&, const T*, const float*, const Epilogue<T>&, int64_t, int64_t, float*,
                         T*);

grouped::Shape shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const Tensor& out) {
  check_input(kOp, x, padding, out);
  check_pair(kOp, "stride", stride);
  for (const int64_t step : stride) STD_TORCH_CHECK(step == 1 || step == 2, kOp, ": stride must be 1 or 2, not ", step);
  const int64_t C = x.size(1), width = weight.dim() == 5 ? weight.size(2) : 0;
  STD_TORCH_CHECK(
      width > 0 && weight.is_contiguous() && weight.size(0) == (C + grouped::kPanel - 1) / grouped::kPanel &&
          weight.size(1) == grouped::kTaps && weight.size(3) == grouped::kTaps && weight.size(4) == grouped::kPanel,
      kOp, ": weight must be packed as (C/16, 3, C/groups, 3, 16) for C = ", C, ", not ", layout_text(weight));
  STD_TORCH_CHECK(width == 4 || width == 8 || width % grouped::kPanel == 0, kOp,
                  ": a group must have 4 or 8 channels, or a multiple of 16, not ", width);
  STD_TORCH_CHECK(C % width == 0, kOp, ": x's ", C, " channels must be whole groups of ", width);
  const int64_t room_h = x.size(2) + 2 * padding[0] - grouped::kTaps;
  const int64_t room_w = x.size(3) + 2 * padding[1] - grouped::kTaps;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, kOp, ": the output would be empty: x is ", shape_text(x),
                  ", the padding ", in_parentheses(padding));
  const grouped::Shape s{
      x.size(0), x.size(2), x.size(3),  C,         width, room_h / stride[0] + 1, room_w / stride[1] + 1,
      stride[0], stride[1], padding[0], padding[1]};
  check_shape(kOp, "out", out, {s.N, s.C, s.P, s.Q});
  return s;
}

template <class T>
void run(const grouped::Shape& s, const Tensor& x, const Tensor& weight, const Epilogue<T>& epilogue,
         const Tensor& out) {
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const float* panels = static_cast<const float*>(weight.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  static const auto run_rows =
      best_of<RunRows<T>>(grouped::run_rows_anywhere<T>, grouped::run_rows_avx2<T>, grouped::run_rows_avx512<T>);
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / s.row_products());
  torch::stable::parallel_for(0, s.rows(), grain, [&](int64_t begin, int64_t end) {
    run_rows(s, from, panels, epilogue, begin, end, scratch(kOp, grouped::scratch_floats(s)), to);
  });
}

void grouped_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::string activation, Tensor out) {
  check_float(kOp, weight, "weight");
  const grouped::Shape s = shape_of(x, weight, stride, padding, out);
  with_epilogue(kOp, bias, residual, activation, out, [&](const auto& epilogue) { run(s, x, weight, epilogue, out); });
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_grouped_conv", TORCH_BOX(&fused_resnet::grouped_conv));
}
