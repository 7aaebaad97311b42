// Types of PTX, and values of one lane as 64 bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace fused_resnet::ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

// PTX ISA 5.2.1, 5.2.3. The order is that of kTypeNames.
enum Type : u8 {
  kPred,
  kB8,
  kU8,
  kS8,
  kE4M3,
  kE5M2,
  kB16,
  kU16,
  kS16,
  kF16,
  kBF16,
  kE4M3x2,
  kE5M2x2,
  kB32,
  kU32,
  kS32,
  kF32,
  kTF32,
  kF16x2,
  kBF16x2,
  kB64,
  kU64,
  kS64,
  kF64,
  kB128,
  kU16x2,
  kS16x2,
  kNoType,
};

Type type_of(const std::string& name);  // kNoType if it is none
const char* name_of(Type type);
int size_of(Type type);  // bytes; 0 of a predicate
bool is_signed(Type type);
bool is_float(Type type);  // a scalar of any width, 8 bits included

template <class T>
T as(u64 value) {
  T t;
  std::memcpy(&t, &value, sizeof t);
  return t;
}
template <class T>
u64 bits(T value) {
  u64 b = 0;
  std::memcpy(&b, &value, sizeof value);
  return b;
}

inline float canonical_nan() {
  return as<float>(0x7fffffff);
}

// Directions of rounding, .rn .rz .rm .rp .rna (PTX ISA, Rounding Modifiers).
enum class Rounding : u8 { kNearestEven, kToZero, kDown, kUp, kNearestAway };

// Sixteen and eight bits to fp32, exactly, and back, to nearest even. NaN becomes the canonical one.
float float_of(Type type, u32 value);                          // kF16, kBF16, kE4M3, kE5M2, kTF32, kF32
u32 rounded(Type type, double value);                          // once, from an exact value
void widen(Type type, const u16* from, float* to, int count);  // kF16, kBF16, many at once

// As `rounded`, in any direction. What is too large for an 8-bit type becomes its largest value, as .satfinite demands;
// `saturate` asks for the same of the others.
u32 rounded(Type type, double value, Rounding rounding, bool saturate = false);
// a + b, and a * b + c of factors of at most 24 bits, to 53 bits and to odd: may be rounded once more to any narrower
// type as if it were exact.
double add_to_odd(double a, double b);
double fma_to_odd(double a, double b, double c);
// A result to nearest of which the exact one differs by something of the sign of `rest`: the same to odd.
double with_odd_rest(double nearest, double rest);

float flush(float value);  // .ftz: a subnormal becomes a zero of its sign
// The low bytes of a register as the type, extended to 64 bits: by sign of signed types, else by zero.
u64 extended(Type type, u64 value);

}  // namespace fused_resnet::ptx
