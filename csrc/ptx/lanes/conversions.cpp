// cvt (PTX ISA 9.7.9.21): every value is rounded once, from what it is exactly.
#include <algorithm>
#include <limits>

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

// `type`: the destination's, `from`: the source's. `a`: Rounding of a floating result, `b`: an Integral.
// `c`: kSaturates, kRelu and kSaturatesFinite. `flush`: .ftz.
enum Integral : int { kNotRounded, kNearestIntegral, kTruncated, kFloor, kCeiling };  // .rni .rzi .rmi .rpi
enum Clamp : int { kSaturates = 1, kRelu = 2, kSaturatesFinite = 4 };

// The integer's value to 53 bits and to odd: a later rounding to f32 or less is right.
double to_odd(u64 magnitude, bool negative) {
  const int excess = magnitude >> 53 ? 11 - __builtin_clzll(magnitude) : 0;
  const u64 lost = magnitude & ((u64(1) << excess) - 1);
  const u64 kept = (magnitude >> excess | (lost != 0)) << excess;
  return negative ? -static_cast<double>(kept) : static_cast<double>(kept);
}

// The integer's value in f64, in any direction: of the two neighbours, the one asked for.
double to_f64(u64 magnitude, bool negative, Rounding rounding) {
  const double nearest = static_cast<double>(magnitude);
  const bool is_above = nearest >= 0x1p64 || static_cast<u64>(nearest) > magnitude;
  const bool is_below = nearest < 0x1p64 && static_cast<u64>(nearest) < magnitude;
  const Rounding away = negative ? Rounding::kDown : Rounding::kUp;
  double value = nearest;
  if (is_above && rounding != Rounding::kNearestEven && rounding != away) value = std::nextafter(nearest, 0);
  if (is_below && rounding == away) value = std::nextafter(nearest, INFINITY);
  return negative ? -value : value;
}

double integral(double value, Integral rounding) {
  switch (rounding) {
    case kNotRounded:
      return value;
    case kNearestIntegral:
      return std::nearbyint(value);
    case kTruncated:
      return std::trunc(value);
    case kFloor:
      return std::floor(value);
    case kCeiling:
      return std::ceil(value);
  }
  return value;
}

// A float to an integer clamps. A NaN becomes 0, but the sign bit alone if either type has 64 bits.
u64 integer_of(const Instruction& instruction, double value) {
  const Type type = instruction.type;
  const int width = 8 * size_of(type);
  if (std::isnan(value)) return width == 64 || instruction.from == kF64 ? u64(1) << (width - 1) : 0;
  value = integral(value, static_cast<Integral>(instruction.b));
  if (!is_signed(type)) {
    if (value <= 0) return 0;
    return value >= std::ldexp(1.0, width) ? ~u64(0) >> (64 - width) : static_cast<u64>(value);
  }
  const double limit = std::ldexp(1.0, width - 1);
  if (value >= limit) return (u64(1) << (width - 1)) - 1;
  return value <= -limit ? ~u64(0) << (width - 1) : static_cast<u64>(static_cast<s64>(value));
}

double unit(double value) {  // .sat of floats; a NaN becomes +0
  return value > 0 ? std::fmin(value, 1) : 0;
}

u64 rounded_to(const Instruction& instruction, double value) {
  const int clamps = instruction.c;
  if (clamps & kSaturates) value = unit(value);
  if ((clamps & kRelu) && !(value > 0) && !std::isnan(value)) value = 0;
  return rounded(instruction.type, value, static_cast<Rounding>(instruction.a), clamps & kSaturatesFinite);
}

u64 floating_of(const Instruction& instruction, double value) {
  value = integral(value, static_cast<Integral>(instruction.b));
  if (instruction.type == kF64) {
    if (instruction.c & kSaturates) value = unit(value);
    return bits(value);
  }
  const u64 code = rounded_to(instruction, value);
  return instruction.flush && instruction.type == kF32 ? bits(flush(as<float>(code))) : code;
}

double value_of(const Instruction& instruction, u64 source) {
  if (instruction.from == kF64) return as<double>(source);
  if (instruction.from != kF32) return float_of(instruction.from, static_cast<u32>(source));
  const float value = as<float>(source);
  return instruction.flush ? flush(value) : value;
}

u64 from_integer(const Instruction& instruction, u64 source) {
  const Type type = instruction.type;
  const u64 value = extended(instruction.from, source);
  const bool negative = is_signed(instruction.from) && s64(value) < 0;
  const u64 magnitude = negative ? -value : value;
  if (is_float(type)) {
    if (type == kF64) {
      const double exact = to_f64(magnitude, negative, static_cast<Rounding>(instruction.a));
      return bits(instruction.c & kSaturates ? unit(exact) : exact);
    }
    return rounded_to(instruction, to_odd(magnitude, negative));
  }
  // .sat; without it, resize() does it
  const u64 largest = ~u64(0) >> (64 - 8 * size_of(type) + is_signed(type));
  if (!negative) return std::min(magnitude, largest);
  if (!is_signed(type)) return 0;
  return magnitude <= largest ? value : ~largest;
}

void convert(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const u64* source = read(machine, warp, instruction.at(1), room);
  u64* to = destination(warp, instruction.at(0), sink);
  if (!is_float(instruction.from)) {
    store(to, mask, [&](int l) { return from_integer(instruction, source[l]); });
  } else if (is_float(instruction.type)) {
    store(to, mask, [&](int l) { return floating_of(instruction, value_of(instruction, source[l])); });
  } else {
    store(to, mask,
          [&](int l) { return extended(instruction.type, integer_of(instruction, value_of(instruction, source[l]))); });
  }
}

// From f16 or bf16 to f32: exact, but which NaN a NaN becomes is not said, hence any.
void widen_half(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const u64* source = read(machine, warp, instruction.at(1), room);
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    const float value = float_of(instruction.from, static_cast<u32>(source[l]));
    if (std::isnan(value)) return u64(0x7fc00000u | (machine.random() & 0x803fffffu));
    if (instruction.c & kSaturates) return bits(value > 0 ? std::fmin(value, 1.0f) : 0.0f);
    return bits(instruction.flush ? flush(value) : value);
  });
}

// Integers of one size or another, without .sat: the most frequent form by far.
void resize(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const u64* source = read(machine, warp, instruction.at(1), room);
  const int from = 64 - 8 * size_of(instruction.from), to = 64 - 8 * size_of(instruction.type);
  const bool from_signed = is_signed(instruction.from), to_signed = is_signed(instruction.type);
  store(destination(warp, instruction.at(0), sink), mask, [=](int l) {
    u64 value = source[l] << from;
    value = (from_signed ? u64(s64(value) >> from) : value >> from) << to;
    return to_signed ? u64(s64(value) >> to) : value >> to;
  });
}

// Two f32 into a pair: the first source into the upper half.
void pack(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[2][kLanes], sink[kLanes];
  const u64* high = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* low = read(machine, warp, instruction.at(2), rooms[1]);
  const int width = 4 * size_of(instruction.type);
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    return rounded_to(instruction, as<float>(high[l])) << width | rounded_to(instruction, as<float>(low[l]));
  });
}

// A pair into a pair of another type: f16x2 and the pairs of 8 bits.
void convert_pair(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes], sink[kLanes];
  const u64* source = read(machine, warp, instruction.at(1), room);
  const int from = 4 * size_of(instruction.from), to = 4 * size_of(instruction.type);
  const auto half = [&](u64 value) { return rounded_to(instruction, float_of(instruction.from, value)); };
  store(destination(warp, instruction.at(0), sink), mask,
        [&](int l) { return half(source[l] >> from) << to | half(source[l] & ((1u << from) - 1)); });
}

bool is_byte_pair(Type type) {
  return type == kE4M3x2 || type == kE5M2x2;
}
bool is_half(Type type) {
  return type == kF16 || type == kBF16;
}
bool is_scalar(Type type) {
  switch (type) {
    case kU8:
    case kS8:
    case kU16:
    case kS16:
    case kU32:
    case kS32:
    case kU64:
    case kS64:
    case kF16:
    case kBF16:
    case kF32:
    case kF64:
      return true;
    default:
      return false;
  }
}

// Into f16x2, bf16x2, tf32 and the 8-bit pairs, which have forms of their own.
Handler packed_form(Modifiers& modifiers, Instruction& instruction, int rounding) {
  const Type to = instruction.type, from = instruction.from;
  const bool to_nearest = rounding == int(Rounding::kNearestEven);
  const bool to_nearest_or_zero = to_nearest || rounding == int(Rounding::kToZero);
  const bool relu = modifiers.take("relu"), finite = modifiers.take("satfinite");
  instruction.c = (relu ? kRelu : 0) | (finite ? kSaturatesFinite : 0);
  instruction.a = rounding;
  if (to == kTF32 && from == kF32) {
    const bool away = rounding == int(Rounding::kNearestAway) && !relu;
    expect_operands(modifiers, instruction, "ds");
    return away || to_nearest_or_zero ? convert : nullptr;
  }
  if ((to == kF16x2 || to == kBF16x2) && from == kF32) {
    expect_operands(modifiers, instruction, "dss");
    return to_nearest_or_zero ? pack : nullptr;
  }
  if (is_byte_pair(to) && (from == kF32 || from == kF16x2)) {
    expect_operands(modifiers, instruction, from == kF32 ? "dss" : "ds");
    if (!finite) modifiers.refuse("without .satfinite");
    return !to_nearest ? nullptr : from == kF32 ? pack : convert_pair;
  }
  if (to == kF16x2 && is_byte_pair(from)) {
    expect_operands(modifiers, instruction, "ds");
    return to_nearest && !finite ? convert_pair : nullptr;
  }
  return nullptr;
}

// Rounding is demanded where something may be lost, and allowed nowhere else.
void check_rounding(const Modifiers& modifiers, const Instruction& instruction, int rounding, int integral_rounding) {
  const Type to = instruction.type, from = instruction.from;
  const bool floats = is_float(to) && is_float(from), same = to == from;
  const bool loses = floats ? !same && size_of(to) <= size_of(from) : is_float(to);
  const bool may_be_integral = is_float(from) && (!is_float(to) || same);
  const bool must_be_integral = is_float(from) && !is_float(to);
  if (loses != (rounding >= 0) || rounding == int(Rounding::kNearestAway)) modifiers.refuse("rounding");
  if ((integral_rounding >= 0 && !may_be_integral) || (integral_rounding < 0 && must_be_integral))
    modifiers.refuse("rounding to integers");
}

Handler scalar_form(Modifiers& modifiers, Instruction& instruction, int rounding, int integral_rounding) {
  const Type to = instruction.type, from = instruction.from;
  if (!is_scalar(to) || !is_scalar(from)) return nullptr;
  expect_operands(modifiers, instruction, "ds");
  check_rounding(modifiers, instruction, rounding, integral_rounding);
  instruction.a = rounding < 0 ? 0 : rounding;
  instruction.b = 1 + integral_rounding;
  if (to == kF32 || from == kF32) instruction.flush = modifiers.take("ftz");
  if (to != kBF16 && modifiers.take("sat")) instruction.c = kSaturates;
  const bool has_limits = is_half(to) && from == kF32 && rounding <= int(Rounding::kToZero) && instruction.c == 0;
  if (has_limits && modifiers.take("relu")) instruction.c |= kRelu;
  if (has_limits && modifiers.take("satfinite")) instruction.c |= kSaturatesFinite;
  if (to == kF32 && is_half(from)) return widen_half;
  return is_float(to) || is_float(from) || instruction.c ? convert : resize;
}

}  // namespace

void decode_conversion(Modifiers& modifiers, Instruction& instruction) {
  const int integral_rounding = modifiers.any({"rni", "rzi", "rmi", "rpi"});
  const int rounding = modifiers.any({"rn", "rz", "rm", "rp", "rna"});
  const std::vector<Type> types = modifiers.types();
  if (types.size() != 2) modifiers.refuse("two types are needed");
  instruction.type = types[0];
  instruction.from = types[1];
  instruction.handler = scalar_form(modifiers, instruction, rounding, integral_rounding);
  if (instruction.handler == nullptr && integral_rounding < 0)
    instruction.handler = packed_form(modifiers, instruction, rounding);
}

}  // namespace fused_resnet::ptx
