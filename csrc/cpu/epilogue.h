// The epilogue of the CPU's own convolutions, act(sum + bias + residual), vector by vector. No torch here.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/inline.h"
#include "cpu/silu.h"
#include "cpu/vectors.h"

namespace fused_resnet {

template <class T>
struct Epilogue {
  const float* bias;  // one value per output channel, or null
  const T* residual;  // as the output, or null; may be the output
  Activation activation;
};

// Writes act(sum + residual) to out[at], the first `count` lanes; sum has the bias in it. NaN compares false and stays.
template <int kLanes, class T>
FUSED_RESNET_INLINE void finish(const typename Lanes<kLanes>::Vector& sum, const Epilogue<T>& epilogue, int64_t at,
                                int64_t count, T* out) {
  using V = typename Lanes<kLanes>::Vector;
  V value = sum;
  if (epilogue.residual != nullptr) {
    V residual;
    load_some<kLanes>(epilogue.residual + at, count, &residual);
    value += residual;
  }
  if (epilogue.activation == Activation::kSilu) {
    silu<typename Lanes<kLanes>::Bits>(&value);
  } else if (epilogue.activation != Activation::kNone) {
    value = value < 0.f ? V{} : value;
    if (epilogue.activation == Activation::kRelu6) value = value > 6.f ? V{} + 6.f : value;
  }
  store_some<kLanes>(value, count, out + at);
}

}  // namespace fused_resnet
