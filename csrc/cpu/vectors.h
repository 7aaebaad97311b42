// What the CPU's own convolutions are written in: vectors of as many fp32 lanes as an instruction set has, in memory as
// fp32 or bf16. No torch here.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace fused_resnet
