// AMX's tiles behind one interface, in two implementations: the instructions, and what they mean in C++, for tests on
// any machine. A kernel is a template over them. No torch here.
//
// There are 8 tiles of up to 16 rows x 64 bytes. Whoever makes Tiles gives each its rows, and finds zeros:
//   zero<t>()               tile t = 0
//   load<t>(from, stride)   row m of tile t = the 64 bytes at from + m * stride
//   stream<t>(from, stride) the same, with the hint that they need not stay in the first-level cache
//   store<t>(to, stride)    the other way
//   dot_bf16<c, a, b>()     c[m][n] += sum over k of a[m][k] * b[k][n]: fp32 sums of bf16, b as pairs [k/2][n][2]
//   dot_u8<c, a, b>()       the same: int32 sums of unsigned bytes times signed ones, b as fours [k/4][n][4]
//   dot_s8<c, a, b>()       of signed ones times signed ones
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/inline.h"
#include "cpu/dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define FUSED_RESNET_HAS_TILES 1
#else
#define FUSED_RESNET_HAS_TILES 0
#endif

namespace fused_resnet {
namespace blocked {

constexpr int kNumTiles = 8, kMaxTileRows = 16, kRowBytes = 64;
using TileRows = std::array<uint8_t, kNumTiles>;

// fp32 where it is normal, else a zero of its sign: TDPBF16PS takes and gives denormals so, whatever MXCSR says.
FUSED_RESNET_INLINE float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The number in the upper half of a dword.
FUSED_RESNET_INLINE float upper_bf16(uint32_t dword) {
  const uint32_t bits = dword & 0xffff0000;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

struct EmulatedTile {
  alignas(kRowBytes) uint32_t dwords[kMaxTileRows][kRowBytes / 4];
};

// TDPBF16PS as Intel's manual has it: the products of even and of odd k are summed apart with fused multiply-adds, then
// both together are added to the accumulator.
FUSED_RESNET_INLINE void dot_bf16_rows(const EmulatedTile& a, const EmulatedTile& b, int rows, EmulatedTile* sums) {
  constexpr int kColumns = kRowBytes / 4;
  for (int m = 0; m < rows; ++m) {
    float even[kColumns] = {}, odd[kColumns] = {}, total[kColumns];
    for (int k = 0; k < kMaxTileRows; ++k) {
      const float a_even = upper_bf16(a.dwords[m][k] << 16), a_odd = upper_bf16(a.dwords[m][k]);
      for (int n = 0; n < kColumns; ++n) {
        even[n] = flushed(__builtin_fmaf(a_even, upper_bf16(b.dwords[k][n] << 16), even[n]));
        odd[n] = flushed(__builtin_fmaf(a_odd, upper_bf16(b.dwords[k][n]), odd[n]));
      }
    }
    std::memcpy(total, sums->dwords[m], kRowBytes);
    for (int n = 0; n < kColumns; ++n) total[n] = flushed(flushed(total[n]) + flushed(even[n] + odd[n]));
    std::memcpy(sums->dwords[m], total, kRowBytes);
  }
}

inline void dot_bf16_anywhere(const EmulatedTile& a, const EmulatedTile& b, int rows, EmulatedTile* sums) {
  dot_bf16_rows(a, b, rows, sums);
}

FUSED_RESNET_AVX2 inline void dot_bf16_avx2(const EmulatedTile& a, const EmulatedTile& b, int rows,
                                            EmulatedTile* sums) {
  dot_bf16_rows(a, b, rows, sums);
}

// TDPBUSD, or TDPBSSD where A is signed. Sums wrap around.
template <class A>
FUSED_RESNET_INLINE void dot_byte_rows(const EmulatedTile& a, const EmulatedTile& b, int rows, EmulatedTile* sums) {
  constexpr int kColumns = kRowBytes / 4;
  for (int m = 0; m < rows; ++m) {
    uint32_t total[kColumns];
    std::memcpy(total, sums->dwords[m], kRowBytes);
    for (int k = 0; k < kMaxTileRows; ++k) {
      for (int shift = 0; shift < 32; shift += 8) {
        const int32_t left = static_cast<A>(a.dwords[m][k] >> shift);
        for (int n = 0; n < kColumns; ++n) {
          total[n] += static_cast<uint32_t>(left * static_cast<int8_t>(b.dwords[k][n] >> shift));
        }
      }
    }
    std::memcpy(sums->dwords[m], total, kRowBytes);
  }
}

template <class A>
inline void dot_bytes_anywhere(const EmulatedTile& a, const EmulatedTile& b, int rows, EmulatedTile* sums) {
  dot_byte_rows<A>(a, b, rows, sums);
}

template <class A>
FUSED_RESNET_AVX2 inline void dot_bytes_avx2(const EmulatedTile& a, const EmulatedTile& b, int rows,
                                             EmulatedTile* sums) {
  dot_byte_rows<A>(a, b, rows, sums);
}

class EmulatedTiles {
 public:
  static constexpr bool kStreams = false;  // whether stream is anything but load

  explicit EmulatedTiles(const TileRows& rows) : rows_(rows) { std::memset(tiles_, 0, sizeof tiles_); }
  EmulatedTiles(const EmulatedTiles&) = delete;
  EmulatedTiles& operator=(const EmulatedTiles&) = delete;

  template <int kTile>
  void zero() {
    std::memset(&tiles_[kTile], 0, sizeof(EmulatedTile));
  }

  template <int kTile>
  void load(const void* from, int64_t stride) {
    zero<kTile>();
    for (int m = 0; m < rows_[kTile]; ++m) {
      std::memcpy(tiles_[kTile].dwords[m], static_cast<const char*>(from) + m * stride, kRowBytes);
    }
  }

  template <int kTile>
  void stream(const void* from, int64_t stride) {
    load<kTile>(from, stride);
  }

  template <int kTile>
  void store(void* to, int64_t stride) const {
    for (int m = 0; m < rows_[kTile]; ++m) {
      std::memcpy(static_cast<char*>(to) + m * stride, tiles_[kTile].dwords[m], kRowBytes);
    }
  }

  template <int kSum, int kA, int kB>
  void dot_bf16() {
    using Dot = void (*)(const EmulatedTile&, const EmulatedTile&, int, EmulatedTile*);
    static const Dot dot = best_of<Dot>(dot_bf16_anywhere, dot_bf16_avx2, nullptr);
    dot(tiles_[kA], tiles_[kB], std::min(rows_[kSum], rows_[kA]), &tiles_[kSum]);
  }

  template <int kSum, int kA, int kB>
  void dot_u8() {
    dot_bytes<kSum, kA, kB, uint8_t>();
  }

  template <int kSum, int kA, int kB>
  void dot_s8() {
    dot_bytes<kSum, kA, kB, int8_t>();
  }

 private:
  template <int kSum, int kA, int kB, class A>
  void dot_bytes() {
    using Dot = void (*)(const EmulatedTile&, const EmulatedTile&, int, EmulatedTile*);
    static const Dot dot = best_of<Dot>(dot_bytes_anywhere<A>, dot_bytes_avx2<A>, nullptr);
    dot(tiles_[kA], tiles_[kB], std::min(rows_[kSum], rows_[kA]), &tiles_[kSum]);
  }

  TileRows rows_;
  EmulatedTile tiles_[kNumTiles];
};

#if FUSED_RESNET_HAS_TILES

// The instructions by inline assembly with memory clobbers: GCC 12's intrinsics let stores pass a tile's load. A tile's
// number is part of the instruction, hence %c.
class AmxTiles {
 public:
  static constexpr bool kStreams = true;

  explicit AmxTiles(const TileRows& rows) {
    Config config = {};
    config.palette = 1;
    for (int tile = 0; tile < kNumTiles; ++tile) {
      config.row_bytes[tile] = rows[tile] == 0 ? 0 : kRowBytes;  // both are zero, or neither
      config.rows[tile] = rows[tile];
    }
    asm volatile("ldtilecfg %0" ::"m"(config));  // which also zeroes the tiles
  }
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  FUSED_RESNET_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }

  template <int kTile>
  FUSED_RESNET_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }

  template <int kTile>
  FUSED_RESNET_INLINE void stream(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }

  template <int kTile>
  FUSED_RESNET_INLINE void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }

  template <int kSum, int kA, int kB>
  FUSED_RESNET_INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }

  template <int kSum, int kA, int kB>
  FUSED_RESNET_INLINE void dot_u8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }

  template <int kSum, int kA, int kB>
  FUSED_RESNET_INLINE void dot_s8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
};

// Linux gives a process its tiles when it asks for them; the threads that it starts inherit them.
inline bool ask_for_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Why this process cannot use AMX's int8; null if it can. Asked once.
inline const char* why_no_amx_int8() {
  static const char* const why = [] {
    constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kAmxInt8 | kAmxTile)) != 0) return "this CPU has no AMX";
    return ask_for_tiles() ? nullptr : "the operating system gives no permission to use AMX";
  }();
  return why;
}

// Why this process cannot use AMX's bf16; null if it can. Asked once.
inline const char* why_no_amx() {
  static const char* const why = [] {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kAmxBf16 | kAmxTile)) != 0) return "this CPU has no AMX";
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kAvx512Bf16) == 0) return "this CPU has no AVX-512 for bf16";
    return ask_for_tiles() ? nullptr : "the operating system gives no permission to use AMX";
  }();
  return why;
}

#else

inline const char* why_no_amx_int8() {
  return "AMX is used on x86-64 under Linux";
}

inline const char* why_no_amx() {
  return "AMX is used on x86-64 under Linux";
}

#endif

}  // namespace blocked
}  // namespace fused_resnet
