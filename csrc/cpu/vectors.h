// What the CPU's own convolutions are written in: vectors of as many fp32 lanes as an instruction set has, activations
// in fp32 or bf16, and the epilogue act(sum + bias + residual). No torch here.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/inline.h"

namespace fused_resnet {

template <int kLanes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(4 * kLanes)));
  typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
};

template <int kLanes>
FUSED_RESNET_INLINE void load(const float* from, typename Lanes<kLanes>::Vector* to) {
  *to = *reinterpret_cast<const typename Lanes<kLanes>::Unaligned*>(from);
}

template <int kLanes>
FUSED_RESNET_INLINE void load(const BFloat16* from, typename Lanes<kLanes>::Vector* to) {
  using L = Lanes<kLanes>;
  const auto narrow = *reinterpret_cast<const typename L::Narrow*>(from);
  *to = reinterpret_cast<typename L::Vector>(__builtin_convertvector(narrow, typename L::Bits) << 16);
}

template <int kLanes>
FUSED_RESNET_INLINE void store(const typename Lanes<kLanes>::Vector& value, float* to) {
  *reinterpret_cast<typename Lanes<kLanes>::Unaligned*>(to) = value;
}

template <int kLanes>
FUSED_RESNET_INLINE void store(const typename Lanes<kLanes>::Vector& value, BFloat16* to) {
  using L = Lanes<kLanes>;
  typename L::Bits rounded;
  round_to_bfloat16(value, reinterpret_cast<typename L::Bits>(value), &rounded);
  *reinterpret_cast<typename L::Narrow*>(to) = __builtin_convertvector(rounded, typename L::Narrow);
}

// Lanes from `count` on are zero, and their memory is not touched.
template <int kLanes, class T>
FUSED_RESNET_INLINE void load_some(const T* from, int64_t count, typename Lanes<kLanes>::Vector* to) {
  if (count >= kLanes) return load<kLanes>(from, to);
  T some[kLanes] = {};
  if (count > 0) std::memcpy(some, from, sizeof(T) * count);
  load<kLanes>(some, to);
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void store_some(const typename Lanes<kLanes>::Vector& value, int64_t count, T* to) {
  if (count >= kLanes) return store<kLanes>(value, to);
  T some[kLanes];
  store<kLanes>(value, some);
  std::memcpy(to, some, sizeof(T) * count);
}

template <class T>
struct Epilogue {
  const float* bias;      // one value per output channel, or null
  const T* residual;      // as the output, or null; may be the output
  Activation activation;  // not SiLU: it has no vectors here
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
  if (epilogue.activation != Activation::kNone) value = value < 0.f ? V{} : value;
  if (epilogue.activation == Activation::kRelu6) value = value > 6.f ? V{} + 6.f : value;
  store_some<kLanes>(value, count, out + at);
}

}  // namespace fused_resnet
