// The epilogue of every convolution: act(acc * scale + shift + residual) in fp32.
//   scale = bn_weight / sqrt(bn_var + eps), shift = (bias - bn_mean) * scale + bn_bias; a null vector drops out.
// Of bytes: rint(min(max(fma(residual, residual_scale, fma(acc, scale, shift)), low), high)), where NaN gives low. Each
// operation rounds once, so that all kernels give the same bytes.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda/conv_arguments.h"

namespace fused_resnet {

using Half = c10::Half;

// Elements of one byte are u8 or s8, and their sums exact.
template <class Element>
constexpr bool kIsByte = sizeof(Element) == 1;
template <class Element>
using Sum = std::conditional_t<kIsByte<Element>, int32_t, float>;

// The byte whose value is nearest to v, half to even, for v from -128 to 255: the last bit of 1.5 * 2^23 counts ones.
FUSED_RESNET_HD uint8_t nearest_byte(float v) {
  const float shifted = v + 12582912.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return static_cast<uint8_t>(bits);
}

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
  FUSED_RESNET_HD void put(int i, float v) {
    if constexpr (kIsByte<Element>) {
      elements[i] = static_cast<Element>(nearest_byte(v));
    } else {
      elements[i] = static_cast<Element>(v);
    }
  }
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

// The steps of the formula.
template <class Element>
FUSED_RESNET_HD float scaled(Sum<Element> sum, ScaleShift affine) {
  return fmaf(static_cast<float>(sum), affine.scale, affine.shift);
}

template <class Element>
FUSED_RESNET_HD float add_residual(const EpilogueArguments& e, float v, const Packed<Element>& residual, int i) {
  if constexpr (kIsByte<Element>) {  // u8 or s8, whatever x is
    const uint32_t byte = static_cast<uint8_t>(residual.elements[i]);
    const int32_t value = static_cast<int32_t>(byte) - static_cast<int32_t>((byte & e.residual_sign) << 1);
    return fmaf(static_cast<float>(value), e.residual_scale, v);
  } else {
    return v + residual.get(i);
  }
}

// The last step but for the rounding to an element. fmaxf and fminf drop NaN.
template <class Element>
FUSED_RESNET_HD float finished(const EpilogueArguments& e, float v, Activation activation) {
  if constexpr (kIsByte<Element>) {
    return fminf(fmaxf(v, e.low), e.high);
  } else {
    return activate(v, activation);
  }
}

// kCount sums of which num_columns exist, to memory; sixteen bytes at a time if has_vectors.
template <int kCount, class S>
FUSED_RESNET_HD void store_sums(S* to, int num_columns, bool has_vectors, const S* sums) {
  if (has_vectors) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      Packed<S> four;
      for (int e = 0; e < 4; ++e) four.elements[e] = sums[i + e];
      *reinterpret_cast<Chunk*>(to + i) = four.chunk;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < num_columns) to[i] = sums[i];
    }
  }
}

// The sum, in order, of `splits` such stores that lie `distance` sums apart.
template <int kCount, class S>
FUSED_RESNET_HD void add_sums(const S* from, int splits, int64_t distance, int num_columns, bool has_vectors, S* sums) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0;
  if (has_vectors) {
#pragma unroll 4  // as many loads on their way
    for (int split = 0; split < splits; ++split) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        Packed<S> four;
        four.chunk = *reinterpret_cast<const Chunk*>(from + split * distance + i);
        for (int e = 0; e < 4; ++e) sums[i + e] += four.elements[e];
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
                                 const Sum<Element>* sums) {
  constexpr int kChunk = Packed<Element>::kCount;
  const Element* residual = static_cast<const Element*>(args.epilogue.residual);
  Element* out = static_cast<Element*>(args.out);
  Packed<Element> skip, result;
  if (residual != nullptr && args.has_vector_rows) skip.chunk = *reinterpret_cast<const Chunk*>(residual + offset);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    float v = scaled<Element>(sums[e], affine[e]);
    if (residual != nullptr) {
      if (!args.has_vector_rows) skip.load(e, e < num_columns ? residual + offset + e : nullptr);
      v = add_residual(args.epilogue, v, skip, e);
    }
    result.put(e, finished<Element>(args.epilogue, v, args.epilogue.activation));
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
