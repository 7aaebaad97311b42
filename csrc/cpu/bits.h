// A bit of memory for each lane: whether the gradient passes an activation there. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/inline.h"
#include "cpu/vectors.h"

namespace fused_resnet {

// Lane i has the number i, or its bit.
alignas(64) constexpr uint32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr uint32_t kLaneBits[16] = {1,   2,   4,    8,    16,   32,   64,    128,
                                                256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

template <int kLanes>
FUSED_RESNET_INLINE const typename Lanes<kLanes>::Bits& lanes_of(const uint32_t* table) {
  return *reinterpret_cast<const typename Lanes<kLanes>::Bits*>(table);
}

// Lanes from `count` on become zero.
template <int kLanes>
FUSED_RESNET_INLINE void keep_first(int64_t count, typename Lanes<kLanes>::Vector* value) {
  using L = Lanes<kLanes>;
  if (count >= kLanes) return;
  *value = lanes_of<kLanes>(kLaneNumbers) < static_cast<uint32_t>(count) ? *value : typename L::Vector{};
}

// Lanes whose bit is not set become zero. Only the bytes of the first `count` bits are read.
template <int kLanes>
FUSED_RESNET_INLINE void keep_set(const uint8_t* bits, int64_t count, typename Lanes<kLanes>::Vector* value) {
  using L = Lanes<kLanes>;
  uint16_t word = 0;
  if (count >= kLanes) {
    std::memcpy(&word, bits, kLanes / 8);
  } else {
    std::memcpy(&word, bits, (count + 7) / 8);
  }
  const typename L::Bits set = (typename L::Bits{} + word) & lanes_of<kLanes>(kLaneBits);
  *value = set != 0 ? *value : typename L::Vector{};
}

// The bits of the first `count` lanes, by a comparison's -1 and 0; the rest of their last byte is zero.
template <int kLanes, class Compared>
FUSED_RESNET_INLINE void store_bits(const Compared& is_set, int64_t count, uint8_t* bits) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(is_set, Bytes);
  uint64_t eights[kLanes / 8];
  std::memcpy(eights, &bytes, kLanes);
  uint32_t word = 0;
  for (int i = 0; i < kLanes / 8; ++i) {  // byte j keeps bit j, and the product adds them up in the highest byte
    word |= static_cast<uint32_t>((eights[i] & 0x8040201008040201) * 0x0101010101010101 >> 56) << (8 * i);
  }
  if (count >= kLanes) {
    std::memcpy(bits, &word, kLanes / 8);
  } else {
    word &= (1u << count) - 1;
    std::memcpy(bits, &word, (count + 7) / 8);
  }
}

}  // namespace fused_resnet
