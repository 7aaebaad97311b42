// The epilogue of every convolution: act(acc * scale + shift + residual) in fp32.
//   scale = bn_weight / sqrt(bn_var + eps), shift = (bias - bn_mean) * scale + bn_bias; a null vector drops out.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "cuda/conv_arguments.h"

namespace fused_resnet {

using Half = c10::Half;

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

// The scales and shifts of Packed<Element>::kCount channels from k on, of which num_columns exist.
template <class Element>
FUSED_RESNET_HD void scale_and_shift_chunk(const EpilogueArguments& e, int k, int num_columns, ScaleShift* affine) {
#pragma unroll
  for (int i = 0; i < Packed<Element>::kCount; ++i) {
    affine[i] = i < num_columns ? scale_and_shift(e, k + i) : ScaleShift{0.0f, 0.0f};
  }
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

// kCount sums of which num_columns exist, to memory; sixteen bytes at a time if has_vectors.
template <int kCount>
FUSED_RESNET_HD void store_sums(float* to, int num_columns, bool has_vectors, const float* sums) {
  if (has_vectors) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      Packed<float> four;
      for (int e = 0; e < 4; ++e) four.put(e, sums[i + e]);
      *reinterpret_cast<Chunk*>(to + i) = four.chunk;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < num_columns) to[i] = sums[i];
    }
  }
}

// The sum, in order, of `splits` such stores that lie `distance` floats apart.
template <int kCount>
FUSED_RESNET_HD void add_sums(const float* from, int splits, int64_t distance, int num_columns, bool has_vectors,
                              float* sums) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
  if (has_vectors) {
#pragma unroll 4  // as many loads on their way
    for (int split = 0; split < splits; ++split) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        Packed<float> four;
        four.chunk = *reinterpret_cast<const Chunk*>(from + split * distance + i);
        for (int e = 0; e < 4; ++e) sums[i + e] += four.get(e);
      }
    }
  } else {
    for (int split = 0; split < splits; ++split) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < num_columns) sums[i] += from[split * distance + i];
      }
    }
  }
}

// Finishes a row's next Packed<Element>::kCount sums, of which num_columns exist, and stores them at `offset` of out.
template <class Element>
FUSED_RESNET_HD void store_chunk(const ConvArguments& args, int64_t offset, int num_columns, const ScaleShift* affine,
                                 const float* sums) {
  constexpr int kChunk = Packed<Element>::kCount;
  const Element* residual = static_cast<const Element*>(args.epilogue.residual);
  Element* out = static_cast<Element*>(args.out);
  Packed<Element> skip, result;
  if (residual != nullptr && args.has_vector_rows) skip.chunk = *reinterpret_cast<const Chunk*>(residual + offset);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    float v = fmaf(sums[e], affine[e].scale, affine[e].shift);
    if (residual != nullptr) {
      if (!args.has_vector_rows) skip.load(e, e < num_columns ? residual + offset + e : nullptr);
      v += skip.get(e);
    }
    result.put(e, activate(v, args.epilogue.activation));
  }
  if (args.has_vector_rows) {
    *reinterpret_cast<Chunk*>(out + offset) = result.chunk;
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (e < num_columns) out[offset + e] = result.elements[e];
    }
  }
}

}  // namespace fused_resnet
