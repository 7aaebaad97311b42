// The one epilogue: act(acc * scale + shift + residual) in fp32.
//   scale = bn_weight / sqrt(bn_var + eps), shift = (bias - bn_mean) * scale + bn_bias; a null vector drops out.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "conv_arguments.h"

namespace fused_resnet {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// Sixteen bytes as they travel, and as the elements they hold.
struct alignas(16) Chunk {
  uint32_t words[4];
};

template <class Element>
union Packed {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(Element));
  Chunk chunk;
  Element elements[kCount];

  FUSED_RESNET_HD Packed() : chunk{} {}
  FUSED_RESNET_HD float get(int i) const { return static_cast<float>(elements[i]); }
  FUSED_RESNET_HD void put(int i, float v) { elements[i] = static_cast<Element>(v); }
  // zero for null
  FUSED_RESNET_HD void load(int i, const Element* source) {
    elements[i] = source != nullptr ? *source : static_cast<Element>(0.0f);
  }
};

struct ScaleShift {
  float scale, shift;
};

FUSED_RESNET_HD float load_channel(const ChannelVector& v, int k, float missing) {
  if (v.data == nullptr) return missing;
  switch (v.dtype) {
    case Dtype::kFloat16:
      return static_cast<float>(static_cast<const Half*>(v.data)[k]);
    case Dtype::kBFloat16:
      return static_cast<float>(static_cast<const BFloat16*>(v.data)[k]);
    default:
      return static_cast<const float*>(v.data)[k];
  }
}

FUSED_RESNET_HD ScaleShift scale_and_shift(const EpilogueArguments& e, int k) {
  float scale = load_channel(e.bn_weight, k, 1.0f);
  if (e.bn_var.data != nullptr) scale /= sqrtf(load_channel(e.bn_var, k, 0.0f) + e.eps);
  const float centre = load_channel(e.bias, k, 0.0f) - load_channel(e.bn_mean, k, 0.0f);
  return {scale, fmaf(centre, scale, load_channel(e.bn_bias, k, 0.0f))};
}

// The comparisons let NaN through, as torch does, and give +0 for -0, as torch does on CUDA.
FUSED_RESNET_HD float relu(float v) {
  return v <= 0.0f ? 0.0f : v;
}

FUSED_RESNET_HD float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return relu(v);
    case Activation::kRelu6:
      return v > 6.0f ? 6.0f : relu(v);
    case Activation::kSilu:
      return v / (1.0f + expf(-v));
    default:
      return v;
  }
}

}  // namespace fused_resnet
