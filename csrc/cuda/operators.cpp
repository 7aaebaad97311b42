// The operators of _C_cuda.so: tensors and schemas in, pointers and shapes out.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "cuda/conv_arguments.h"
#include "cuda/launchers.h"

FUSED_RESNET_EMBED_DIGEST("cuda")

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16, not ", dtype_text(t));
  }
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), op, ": ", name,
                  " is on another device than the first tensor: ", t.is_cuda() ? "GPU " : "no GPU ",
                  t.get_device_index(), " instead of ", first.get_device_index());
}

void add_relu(Tensor a, Tensor b, Tensor out) {
  const char* op = "cuda_add_relu";
  check_pointwise(op, a, b, out);
  check_device(op, "b", b, a);
  check_device(op, "out", out, a);
  const DeviceGuard guard(a.get_device_index());
  launch_add_relu(a.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr(), a.numel(), dtype_of(op, "a", a),
                  current_stream(a));
}

void add_relu_backward(Tensor grad, Tensor out, Tensor grad_input) {
  const char* op = "cuda_add_relu_backward";
  check_pointwise(op, grad, out, grad_input);
  check_device(op, "out", out, grad);
  check_device(op, "grad_input", grad_input, grad);
  const DeviceGuard guard(grad.get_device_index());
  launch_add_relu_backward(grad.const_data_ptr(), out.const_data_ptr(), grad_input.mutable_data_ptr(), grad.numel(),
                           dtype_of(op, "grad", grad), current_stream(grad));
}

constexpr const char* kConv = "cuda_conv_bn_act";

int32_t as_int32(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, kConv, ": ", name, " is ", value, ", out of range");
  return static_cast<int32_t>(value);
}

using Sizes = std::vector<int64_t>;

Sizes sizes_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

ConvSizes conv_sizes(const Sizes& x, const Sizes& weight, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.size() == 4 && weight.size() == 4, kConv, ": x and weight must have 4 dimensions, not ",
                  in_parentheses(x), " and ", in_parentheses(weight));
  check_pair(kConv, "stride", stride);
  check_pair(kConv, "padding", padding);
  check_pair(kConv, "dilation", dilation);
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && groups > 0, kConv,
                  ": stride, dilation and groups must be positive, not ", in_parentheses(stride), ", ",
                  in_parentheses(dilation), " and ", groups);
  STD_TORCH_CHECK(
      *std::min_element(weight.begin(), weight.end()) > 0 && x[1] == weight[1] * groups && weight[0] % groups == 0,
      kConv, ": the channels of x ", in_parentheses(x), " and weight ", in_parentheses(weight), " do not fit ", groups,
      " groups");
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0, kConv, ": padding must be at least 0, not ",
                  in_parentheses(padding));
  return {x[0],      x[1],      x[2],       x[3],       weight[0],   weight[2],   weight[3],
          stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
}

ConvShape shape_of(const ConvSizes& sizes) {
  ConvShape shape{};
  const std::string reason = derive(sizes, &shape);
  STD_TORCH_CHECK(reason.empty(), kConv, ": ", reason);
  return shape;
}

ChannelVector channel_vector(const char* name, const std::optional<Tensor>& v, const Tensor& x, int64_t K) {
  if (!v.has_value()) return {nullptr, Dtype::kFloat32};
  STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == K && (K == 1 || v->stride(0) == 1), kConv, ": ", name,
                  " must be a contiguous vector with one value for each of ", K, " output channels, not ",
                  layout_text(*v));
  check_device(kConv, name, *v, x);
  return {v->const_data_ptr(), dtype_of(kConv, name, *v)};
}

// What a convolution computes from and into, and that all of it is as the kernel reads it.
void set_tensors(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& partials, ScalarType sum, Tensor& out, ConvArguments* args) {
  const ConvShape& s = args->shape;
  check_shape(kConv, "out", out, {s.N, s.K, s.P, s.Q});
  if (residual.has_value()) check_shape(kConv, "residual", *residual, {s.N, s.K, s.P, s.Q});
  const std::pair<const char*, const Tensor*> activations[] = {
      {"x", &x}, {"weight", &weight}, {"out", &out}, {"residual", residual.has_value() ? &*residual : &x}};
  for (const auto& [name, tensor] : activations) {
    check_channels_last(kConv, name, *tensor);
    check_device(kConv, name, *tensor, x);
  }
  if (residual.has_value()) args->epilogue.residual = residual->const_data_ptr();
  args->x = x.const_data_ptr();
  args->weight = weight.const_data_ptr();
  args->out = out.mutable_data_ptr();
  if (partials.has_value()) {
    const char* type = sum == ScalarType::Int ? "int32" : "float32";
    STD_TORCH_CHECK(partials->dim() == 2 && partials->size(0) > 1 && partials->size(1) == out.numel() &&
                        partials->is_contiguous() && partials->scalar_type() == sum,
                    kConv, ": partials must be a contiguous ", type, " matrix, two rows or more of ", out.numel(),
                    " values, not ", layout_text(*partials), " of ", dtype_text(*partials));
    check_device(kConv, "partials", *partials, x);
    args->splits = as_int32("splits", partials->size(0));
    args->partials = partials->mutable_data_ptr();
  }
}

void check_tile(int64_t tile) {
  STD_TORCH_CHECK((tile >= 0 && tile < kNumTiles) || grouped::is_tile(tile) || sm90::is_tile(tile), kConv,
                  ": there is no tile ", tile, " among ", kNumTiles, " from 0, ", grouped::kNumTiles, " from ",
                  grouped::kFirstTile, " and ", sm90::kNumTiles, " from ", sm90::kFirstTile);
}

void conv_bn_act(Tensor x, Tensor weight, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                 std::optional<Tensor> bn_mean, std::optional<Tensor> bn_var, double eps, std::optional<Tensor> bias,
                 std::optional<Tensor> residual, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                 std::string activation, bool allow_tf32, int64_t tile, std::optional<Tensor> partials, Tensor out) {
  check_tile(tile);
  ConvArguments args{};
  args.shape = shape_of(conv_sizes(sizes_of(x), sizes_of(weight), stride, padding, dilation, groups));
  const ConvShape& s = args.shape;
  const std::pair<const char*, const Tensor*> activations[] = {
      {"weight", &weight}, {"out", &out}, {"residual", residual.has_value() ? &*residual : &x}};
  for (const auto& [name, tensor] : activations) {
    STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), kConv, ": ", name, " must have the dtype of x, ",
                    dtype_text(x), ", not ", dtype_text(*tensor));
  }
  const Dtype dtype = dtype_of(kConv, "x", x);
  STD_TORCH_CHECK(dtype != Dtype::kFloat32 || allow_tf32, kConv,
                  ": in float32 it multiplies in TF32, which is not allowed");

  set_tensors(x, weight, residual, partials, ScalarType::Float, out, &args);
  args.epilogue = {channel_vector("bn_weight", bn_weight, x, s.K),
                   channel_vector("bn_bias", bn_bias, x, s.K),
                   channel_vector("bn_mean", bn_mean, x, s.K),
                   channel_vector("bn_var", bn_var, x, s.K),
                   channel_vector("bias", bias, x, s.K),
                   static_cast<float>(eps),
                   parse_activation(kConv, activation, Activation::kSilu),
                   args.epilogue.residual};
  const DeviceGuard guard(x.get_device_index());
  launch_conv_bn_act(args, static_cast<int>(tile), dtype, x.get_device_index(), current_stream(x));
}

bool is_signed_byte(const char* name, const Tensor& t) {
  const bool is_signed = t.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(is_signed || t.scalar_type() == ScalarType::Byte, kConv, ": ", name, " must be uint8 or int8, not ",
                  dtype_text(t));
  return is_signed;
}

void conv_int8(Tensor x, Tensor weight, Tensor multiplier, Tensor bias, std::optional<Tensor> residual,
               double residual_scale, double low, double high, Sizes stride, Sizes padding, Sizes dilation,
               int64_t groups, int64_t tile, std::optional<Tensor> partials, Tensor out) {
  check_tile(tile);
  ConvArguments args{};
  args.shape = shape_of(conv_sizes(sizes_of(x), sizes_of(weight), stride, padding, dilation, groups));
  const bool is_signed = is_signed_byte("x", x);
  is_signed_byte("out", out);
  const bool is_skip_signed = residual.has_value() && is_signed_byte("residual", *residual);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, kConv, ": weight must be int8, not ", dtype_text(weight));
  for (const auto& [name, vector] : {std::pair{"multiplier", &multiplier}, std::pair{"bias", &bias}}) {
    STD_TORCH_CHECK(vector->scalar_type() == ScalarType::Float, kConv, ": ", name, " must be float32, not ",
                    dtype_text(*vector));
  }
  set_tensors(x, weight, residual, partials, ScalarType::Int, out, &args);
  EpilogueArguments& e = args.epilogue;
  e.bn_weight = channel_vector("multiplier", multiplier, x, args.shape.K);
  e.bn_bias = channel_vector("bias", bias, x, args.shape.K);
  e.residual_scale = static_cast<float>(residual_scale);
  e.low = static_cast<float>(low), e.high = static_cast<float>(high);
  e.residual_sign = is_skip_signed ? 0x80 : 0;
  const DeviceGuard guard(x.get_device_index());
  launch_conv_int8(args, static_cast<int>(tile), is_signed, x.get_device_index(), current_stream(x));
}

void check_element_bytes(int64_t element_bytes) {
  STD_TORCH_CHECK(element_bytes == 1 || element_bytes == 2 || element_bytes == 4, kConv,
                  ": elements have 1, 2 or 4 bytes, not ", element_bytes);
}

// Empty where the kernel can index the problem.
std::string why_not(Sizes x, Sizes weight, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                    int64_t element_bytes) {
  check_element_bytes(element_bytes);
  return conv_why_not(conv_sizes(x, weight, stride, padding, dilation, groups), static_cast<int>(element_bytes));
}

// tile, splits, tile, splits, ...
std::vector<int64_t> conv_configs(Sizes x, Sizes weight, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                                  int64_t element_bytes, bool is_aligned, int64_t device) {
  const ConvShape shape = shape_of(conv_sizes(x, weight, stride, padding, dilation, groups));
  check_element_bytes(element_bytes);
  std::vector<int64_t> flat;
  for (const ConvConfig& config :
       conv_bn_act_configs(shape, static_cast<int>(element_bytes), is_aligned, as_int32("device", device))) {
    flat.insert(flat.end(), {config.tile, config.splits});
  }
  return flat;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m) {
  m.impl("cuda_conv_configs", TORCH_BOX(&fused_resnet::conv_configs));
  m.impl("cuda_conv_why_not", TORCH_BOX(&fused_resnet::why_not));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("cuda_add_relu", TORCH_BOX(&fused_resnet::add_relu));
  m.impl("cuda_add_relu_backward", TORCH_BOX(&fused_resnet::add_relu_backward));
  m.impl("cuda_conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
  m.impl("cuda_conv_int8", TORCH_BOX(&fused_resnet::conv_int8));
}
