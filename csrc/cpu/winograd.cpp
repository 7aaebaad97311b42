// cpu_winograd: a 3x3 stride-1 convolution with bias, residual and activation in one pass, by Winograd's F(4x4, 3x3).
#include "cpu/winograd.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/operator.h"
#include "cpu/winograd_run.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "cpu_winograd";

winograd::Shape shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& padding,
                         const Tensor& out) {
  check_input(kOp, x, padding, out);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.size(0) == winograd::kPoints &&
                      weight.size(2) == x.size(1) && weight.size(3) == winograd::kPanel,
                  kOp, ": weight must be packed as (36, K/16, C, 16) for C = ", x.size(1), ", not ",
                  layout_text(weight));
  winograd::Shape s{x.size(0),
                    x.size(2),
                    x.size(3),
                    x.size(1),
                    weight.size(1) * winograd::kPanel,
                    x.size(2) + 2 * padding[0] - 2,
                    x.size(3) + 2 * padding[1] - 2,
                    padding[0],
                    padding[1],
                    {},
                    {}};
  s.in = winograd::Strides::of_nhwc(s.H, s.W, s.C);
  s.out = winograd::Strides::of_nhwc(s.P, s.Q, s.K);
  STD_TORCH_CHECK(s.C % winograd::kPanel == 0 && s.C > 0 && s.K > 0, kOp, ": channels must be multiples of 16, not ",
                  s.C, " and ", s.K);
  STD_TORCH_CHECK(s.P > 0 && s.Q > 0, kOp, ": the output would be empty: ", s.P, "x", s.Q);
  check_shape(kOp, "out", out, {s.N, s.K, s.P, s.Q});
  return s;
}

template <class T>
void run(const winograd::Shape& s, const Tensor& x, const Tensor& weight, const Epilogue<T>& epilogue,
         const Tensor& out) {
  winograd::run(kOp, s, static_cast<const T*>(x.const_data_ptr()), static_cast<const float*>(weight.const_data_ptr()),
                epilogue, static_cast<T*>(out.mutable_data_ptr()));
}

void winograd_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                   std::vector<int64_t> padding, std::string activation, Tensor out) {
  check_float(kOp, weight, "weight");
  const winograd::Shape s = shape_of(x, weight, padding, out);
  with_epilogue(kOp, bias, residual, activation, out, [&](const auto& epilogue) { run(s, x, weight, epilogue, out); });
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_winograd", TORCH_BOX(&fused_resnet::winograd_conv));
}
