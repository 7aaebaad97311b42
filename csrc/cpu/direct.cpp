// cpu_direct_conv: a convolution of one group with bias, residual and activation in one pass.
#include "cpu/direct.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/operator.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "cpu_direct_conv";

template <class T>
using RunBlock = void (*)(const direct::Shape&, const T*, const float*, const Epilogue<T>&, const direct::Block&,
                          const direct::Room&, T*);

int64_t outputs(int64_t size, int64_t padding, int64_t window, int64_t dilation, int64_t stride) {
  const int64_t room = size + 2 * padding - dilation * (window - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

direct::Shape shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const Tensor& out) {
  check_input(kOp, x, padding, out);
  check_pair(kOp, "stride", stride);
  check_pair(kOp, "dilation", dilation);
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(stride[i] >= 1 && stride[i] <= INT32_MAX && dilation[i] >= 1 && dilation[i] <= INT32_MAX, kOp,
                    ": stride and dilation must be at least 1 and below 2^31, not ", in_parentheses(stride), " and ",
                    in_parentheses(dilation));
  }
  const int64_t K = out.size(1), panels = (K + direct::kPanel - 1) / direct::kPanel;
  STD_TORCH_CHECK(weight.dim() == 5 && weight.is_contiguous() && weight.size(0) == panels && weight.size(1) > 0 &&
                      weight.size(2) > 0 && weight.size(3) == x.size(1) && weight.size(4) == direct::kPanel,
                  kOp, ": weight must be packed as (K/16, R, S, C, 16) for K = ", K, " and C = ", x.size(1), ", not ",
                  layout_text(weight));
  STD_TORCH_CHECK(K > 0 && x.size(1) > 0, kOp, ": there must be channels, not ", x.size(1), " and ", K);
  const int64_t R = weight.size(1), S = weight.size(2);
  STD_TORCH_CHECK(R <= INT32_MAX && S <= INT32_MAX, kOp, ": the window must be smaller than 2^31, not ", R, "x", S);
  const direct::Shape s{x.size(0),
                        x.size(2),
                        x.size(3),
                        x.size(1),
                        K,
                        R,
                        S,
                        outputs(x.size(2), padding[0], R, dilation[0], stride[0]),
                        outputs(x.size(3), padding[1], S, dilation[1], stride[1]),
                        stride[0],
                        stride[1],
                        padding[0],
                        padding[1],
                        dilation[0],
                        dilation[1]};
  STD_TORCH_CHECK(s.P > 0 && s.Q > 0, kOp, ": the output would be empty: x is ", shape_text(x), ", the window ", R, "x",
                  S, ", the padding ", in_parentheses(padding));
  check_shape(kOp, "out", out, {s.N, s.K, s.P, s.Q});
  return s;
}

template <class T>
void run(const direct::Shape& s, const Tensor& x, const Tensor& weight, const Epilogue<T>& epilogue,
         const Tensor& out) {
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const float* panels = static_cast<const float*>(weight.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  static const auto run_block =
      best_of<RunBlock<T>>(direct::run_block_anywhere<T>, direct::run_block_avx2<T>, direct::run_block_avx512<T>);
  const direct::Blocks blocks(s, torch::stable::get_num_threads());
  const int64_t widened = sizeof(T) == sizeof(float) ? 0 : direct::most_input_pixels(s, blocks);
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const direct::Room room(s, blocks, scratch(kOp, direct::Room::floats(s, blocks, widened)));
    for (int64_t index = begin; index < end; ++index) {
      run_block(s, from, panels, epilogue, blocks.at(s, index), room, to);
    }
  });
}

void direct_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                 std::string activation, Tensor out) {
  check_float(kOp, weight, "weight");
  const direct::Shape s = shape_of(x, weight, stride, padding, dilation, out);
  with_epilogue(kOp, bias, residual, activation, out, [&](const auto& epilogue) { run(s, x, weight, epilogue, out); });
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_direct_conv", TORCH_BOX(&fused_resnet::direct_conv));
}
