// Instructions that are a function of one lane's values.
#pragma once

#include <utility>

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {

template <auto function>
struct Lanewise;

// destination = function(sources...), lane by lane. The function's types say how the sources are read.
template <class Result, class... Sources, Result (*function)(Sources...)>
struct Lanewise<function> {
  static void run(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
    on_sources(machine, warp, instruction, mask, std::index_sequence_for<Sources...>());
  }

 private:
  template <size_t... k>
  static void on_sources(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask,
                         std::index_sequence<k...>) {
    u64 room[sizeof...(Sources)][kLanes], sink[kLanes];
    const u64* sources[] = {read(machine, warp, instruction.at(k + 1), room[k])...};
    store(destination(warp, instruction.at(0), sink), mask,
          [&](int l) { return bits(function(as<Sources>(sources[k][l])...)); });
  }
};

// PTX's name of a type that handlers are made for.
template <class T>
constexpr Type kTypeOf = kNoType;
template <>
inline constexpr Type kTypeOf<u16> = kU16;
template <>
inline constexpr Type kTypeOf<s16> = kS16;
template <>
inline constexpr Type kTypeOf<u32> = kU32;
template <>
inline constexpr Type kTypeOf<s32> = kS32;
template <>
inline constexpr Type kTypeOf<u64> = kU64;
template <>
inline constexpr Type kTypeOf<s64> = kS64;
template <>
inline constexpr Type kTypeOf<float> = kF32;
template <>
inline constexpr Type kTypeOf<double> = kF64;

// The handler of F::apply<T>, a function of values of type T, for the T of this name. Null if it is not among them.
template <class F, class... Ts>
Handler handler_of(Type type) {
  Handler found = nullptr;
  const auto take = [&](Type name, Handler handler) {
    if (name == type) found = handler;
  };
  (take(kTypeOf<Ts>, Lanewise<&F::template apply<Ts>>::run), ...);
  return found;
}

template <class F>
Handler for_integers(Type type) {
  return handler_of<F, u16, s16, u32, s32, u64, s64>(type);
}
template <class F>
Handler for_narrow_integers(Type type) {  // whose doubled type exists
  return handler_of<F, u16, s16, u32, s32>(type);
}
template <class F>
Handler for_wide_integers(Type type) {
  return handler_of<F, u32, s32, u64, s64>(type);
}
template <class F>
Handler for_signed(Type type) {
  return handler_of<F, s16, s32, s64>(type);
}

// Untyped bits are read as unsigned numbers.
inline Type unsigned_of_bits(Type type) {
  return type == kB16 ? kU16 : type == kB32 ? kU32 : type == kB64 ? kU64 : kNoType;
}
template <class F>
Handler for_bits(Type type) {
  return handler_of<F, u16, u32, u64>(unsigned_of_bits(type));
}
template <class F>
Handler for_wide_bits(Type type) {
  return handler_of<F, u32, u64>(unsigned_of_bits(type));
}

// The smaller or larger of two floats (PTX ISA 9.7.3.11, 9.7.3.12, 9.7.4.7, 9.7.4.8): -0 is less than +0, one NaN
// counts only if NaNs propagate, and of two the canonical one results.
template <class T>
T extremum(T a, T b, bool largest, bool propagates_nan) {
  if (std::isnan(a) || std::isnan(b)) {
    if (propagates_nan || (std::isnan(a) && std::isnan(b))) return sizeof(T) == 4 ? canonical_nan() : T(NAN);
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) == largest ? b : a;
  return (a > b) == largest ? a : b;
}

// .xorsign.abs: of the magnitudes, with the product's sign.
template <class T>
T extremum_of_magnitudes(T a, T b, bool largest, bool propagates_nan) {
  const T magnitude = extremum(std::fabs(a), std::fabs(b), largest, propagates_nan);
  return std::isnan(magnitude) || std::signbit(a) == std::signbit(b) ? magnitude : -magnitude;
}
inline bool take_xorsign(Modifiers& modifiers) {
  const bool xorsign = modifiers.take("xorsign");
  if (xorsign && !modifiers.take("abs")) modifiers.refuse(".xorsign without .abs");
  return xorsign;
}

// The parts of decode_arithmetic(). An instruction that none of them gives a handler is refused.
void decode_integer(Modifiers&, Instruction&, Type type);   // integers.cpp
void decode_carry(Modifiers&, Instruction&);                // integers.cpp: with CC.CF
bool decode_bits(Modifiers&, Instruction&);                 // bits.cpp; false if it is no instruction on bits
void decode_floating(Modifiers&, Instruction&, Type type);  // floats.cpp: f32, f64
void decode_half(Modifiers&, Instruction&, Type type);      // halves.cpp: f16, bf16, and pairs of them
void decode_comparison(Modifiers&, Instruction&);           // comparisons.cpp: setp set selp slct testp
void decode_predicate_logic(Modifiers&, Instruction&);      // moves.cpp

}  // namespace fused_resnet::ptx
