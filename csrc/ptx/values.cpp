// Formats of floating point and their single rounding, by integers.
#include "ptx/values.h"

namespace fused_resnet::ptx {
namespace {

struct TypeFacts {
  const char* name;
  int size;
  bool is_signed, is_float;
};
const TypeFacts kTypes[] = {
    {"pred", 0, false, false},   {"b8", 1, false, false},    {"u8", 1, false, false},    {"s8", 1, true, false},
    {"e4m3", 1, false, true},    {"e5m2", 1, false, true},   {"b16", 2, false, false},   {"u16", 2, false, false},
    {"s16", 2, true, false},     {"f16", 2, false, true},    {"bf16", 2, false, true},   {"e4m3x2", 2, false, false},
    {"e5m2x2", 2, false, false}, {"b32", 4, false, false},   {"u32", 4, false, false},   {"s32", 4, true, false},
    {"f32", 4, false, true},     {"tf32", 4, false, true},   {"f16x2", 4, false, false}, {"bf16x2", 4, false, false},
    {"b64", 8, false, false},    {"u64", 8, false, false},   {"s64", 8, true, false},    {"f64", 8, false, true},
    {"b128", 16, false, false},  {"u16x2", 4, false, false}, {"s16x2", 4, false, false}, {"no type", 0, false, false},
};
static_assert(sizeof kTypes / sizeof kTypes[0] == kNoType + 1, "one row a type");

// PTX ISA 5.2.3, Alternate Floating-Point Data Formats. A code is sign, exponent, mantissa, then `unused` zero bits.
struct Format {
  int mantissa, min_exponent;  // bits; the exponent of the smallest normal number
  u32 largest, nan;            // codes
  bool has_infinity;           // its code is that of the largest number, plus one
  int sign_bit, unused;
};

const Format& format_of(Type type) {
  static const Format f16{10, -14, 0x7bff, 0x7fff, true, 15, 0}, bf16{7, -126, 0x7f7f, 0x7fff, true, 15, 0},
      e4m3{3, -6, 0x7e, 0x7f, false, 7, 0}, e5m2{2, -14, 0x7b, 0x7f, true, 7, 0},
      tf32{10, -126, 0x3fbff, 0x3ffff, true, 18, 13}, f32{23, -126, 0x7f7fffff, 0x7fffffff, true, 31, 0};
  switch (type) {
    case kF16:
    case kF16x2:
      return f16;
    case kBF16:
    case kBF16x2:
      return bf16;
    case kE4M3:
    case kE4M3x2:
      return e4m3;
    case kE5M2:
    case kE5M2x2:
      return e5m2;
    case kTF32:
      return tf32;
    default:
      return f32;
  }
}

// Whether |n + rest| becomes n + 1, where 0 <= rest < 1 is `rest / 2^shift`.
bool rounds_up(Rounding rounding, bool negative, u64 n, u64 rest, u64 half) {
  switch (rounding) {
    case Rounding::kNearestEven:
      return rest > half || (rest == half && (n & 1));
    case Rounding::kNearestAway:
      return rest >= half;
    case Rounding::kToZero:
      return false;
    case Rounding::kDown:
      return negative && rest != 0;
    case Rounding::kUp:
      return !negative && rest != 0;
  }
  return false;
}

// Whether a number beyond the largest one becomes infinite, not the largest one.
bool overflows_to_infinity(Rounding rounding, bool negative) {
  return rounding == Rounding::kNearestEven || rounding == Rounding::kNearestAway ||
         rounding == (negative ? Rounding::kDown : Rounding::kUp);
}

// The code of a finite number's magnitude; it may lie beyond the largest one.
u64 round_magnitude(const Format& format, u64 magnitude, bool negative, Rounding rounding) {
  const int biased = static_cast<int>(magnitude >> 52);
  u64 significand = magnitude & ((u64(1) << 52) - 1);
  if (biased > 0) significand |= u64(1) << 52;
  const int exponent = (biased > 0 ? biased : 1) - 1023;
  const int above = exponent > format.min_exponent ? exponent - format.min_exponent : 0;
  const int below = exponent < format.min_exponent ? format.min_exponent - exponent : 0;
  int shift = 52 - format.mantissa + below;
  if (shift > 62) {  // far less than half of the smallest number: keep that it is not zero
    shift = 62;
    significand = significand != 0;
  }
  const u64 n = significand >> shift, rest = significand & ((u64(1) << shift) - 1);
  const u64 code = n + (u64(above) << format.mantissa);
  return code + rounds_up(rounding, negative, n, rest, u64(1) << (shift - 1));
}

float float_of_half(u16 value) {
  // The exponent is rebiased by a multiplication, which makes subnormal numbers normal.
  const float scaled = as<float>(u64(value & 0x7fff) << 13) * as<float>(u64(127 + 112) << 23);
  u32 code = as<u32>(bits(scaled));
  if ((value & 0x7c00) == 0x7c00) code = (value & 0x3ff) ? 0x7fffffff : 0x7f800000;
  return as<float>(code | u64((value & 0x8000) && code != 0x7fffffff) << 31);
}

float canonical(float value) {
  return std::isnan(value) ? canonical_nan() : value;
}

float float_of_byte(const Format& format, u32 value) {
  const u32 magnitude = value & 0x7f;
  if (magnitude > format.largest + format.has_infinity) return canonical_nan();
  const u32 exponent = magnitude >> format.mantissa, fraction = magnitude & ((1u << format.mantissa) - 1);
  float result = format.has_infinity && magnitude > format.largest ? INFINITY
                 : exponent == 0 ? std::ldexp(float(fraction), format.min_exponent - format.mantissa)
                                 : std::ldexp(float(fraction + (1u << format.mantissa)),
                                              int(exponent) - 1 + format.min_exponent - format.mantissa);
  return value & 0x80 ? -result : result;
}

}  // namespace

Type type_of(const std::string& name) {
  for (int type = 0; type < kNoType; ++type)
    if (name == kTypes[type].name) return static_cast<Type>(type);
  return kNoType;
}
const char* name_of(Type type) {
  return kTypes[type].name;
}
int size_of(Type type) {
  return kTypes[type].size;
}
bool is_signed(Type type) {
  return kTypes[type].is_signed;
}
bool is_float(Type type) {
  return kTypes[type].is_float;
}

float float_of(Type type, u32 value) {
  switch (type) {
    case kF16:
    case kF16x2:
      return float_of_half(static_cast<u16>(value));
    case kBF16:
    case kBF16x2:
      return canonical(as<float>(u64(value & 0xffff) << 16));
    case kE4M3:
    case kE4M3x2:
    case kE5M2:
    case kE5M2x2:
      return float_of_byte(format_of(type), value & 0xff);
    case kTF32:
      return canonical(as<float>(value & 0xffffe000u));
    default:
      return canonical(as<float>(value));
  }
}

u32 rounded(Type type, double value, Rounding rounding, bool saturate) {
  const Format& format = format_of(type);
  if (std::isnan(value)) return format.nan << format.unused;
  const u64 code = bits(value), magnitude = code & ~(u64(1) << 63);
  const bool negative = code >> 63, infinite = std::isinf(value);
  u64 result = infinite ? format.largest + u64(1) : round_magnitude(format, magnitude, negative, rounding);
  if (result > format.largest) {
    const bool finite = saturate || format.sign_bit == 7 || (!infinite && !overflows_to_infinity(rounding, negative));
    result = finite ? format.largest : format.largest + 1;
  }
  return static_cast<u32>((result | u64(negative) << format.sign_bit) << format.unused);
}

u32 rounded(Type type, double value) {
  return rounded(type, value, Rounding::kNearestEven);
}

void widen(Type type, const u16* from, float* to, int count) {
  if (type == kBF16 || type == kBF16x2) {
    for (int i = 0; i < count; ++i) to[i] = as<float>(u64(from[i]) << 16);
  } else {
    for (int i = 0; i < count; ++i) to[i] = float_of_half(from[i]);
  }
}

double with_odd_rest(double nearest, double rest) {
  const u64 code = bits(nearest);
  if (rest == 0 || !std::isfinite(nearest) || (code & 1)) return nearest;
  const bool away = (rest > 0) == (nearest > 0);
  return as<double>(away ? code + 1 : code - 1);
}

// The error of a sum is exact in the same format (Knuth 1969, TwoSum); the sum to odd follows from its sign
// (Boldo and Melquiond 2008).
double add_to_odd(double a, double b) {
  const double sum = a + b, part = sum - a;
  return with_odd_rest(sum, (a - (sum - part)) + (b - part));
}

double fma_to_odd(double a, double b, double c) {
  return add_to_odd(a * b, c);
}

float flush(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

u64 extended(Type type, u64 value) {
  const int room = 64 - 8 * size_of(type);
  if (room <= 0 || room == 64) return value;
  return is_signed(type) ? u64(s64(value << room) >> room) : value << room >> room;
}

}  // namespace fused_resnet::ptx
