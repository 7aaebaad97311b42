// The arguments of the convolution kernel, as the launcher fills them.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "cuda/conv_shape.h"

namespace fused_resnet {

// One value per output channel, or null.
struct ChannelVector {
  const void* data;
  Dtype dtype;
};

struct EpilogueArguments {
  ChannelVector bn_weight, bn_bias, bn_mean, bn_var, bias;
  float eps;
  Activation activation;
  const void* residual;  // the output's dtype and layout, or null
  // Of bytes, whose multiplier is bn_weight and whose bias is bn_bias; the activation is in the limits.
  float residual_scale = 1.0f, low = 0.0f, high = 0.0f;
  uint32_t residual_sign = 0;  // the bit that makes a byte of the residual negative: 0x80 in s8, none in u8
};

struct ConvArguments {
  ConvShape shape;
  EpilogueArguments epilogue;
  const void* x;             // N H W C
  const void* weight;        // K R S C/groups
  void* out;                 // N P Q K
  bool has_vector_rows;      // K, K / groups, out and residual allow 16-byte accesses
  int splits = 1;            // parts of the reduction, each summed by blocks of its own
  void* partials = nullptr;  // their sums, splits x N P Q K, where there is more than one: fp32, of bytes int32
};

inline bool has_vector_rows(const ConvArguments& args, int element_bytes) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const uintptr_t accessed = address(args.out) | address(args.epilogue.residual) | address(args.partials);
  return args.shape.group_filters % (16 / element_bytes) == 0 && accessed % 16 == 0;
}

}  // namespace fused_resnet
