// Arithmetic of f32 and f64 (PTX ISA 9.7.3).
//
// add, sub, mul, fma, div.rn, rcp.rn and sqrt.rn are rounded once, in the direction asked for. Where PTX bounds an
// error only (.approx, .full), the result here is the exact one, rounded to nearest: hardware may differ by that bound.
// A NaN of f32 is the canonical one, 0x7fffffff.
#include <cfenv>

#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

enum Operation : int { kAdd, kSub, kMul, kFma, kDiv, kSqrt };

float canonical(float value) {
  return std::isnan(value) ? canonical_nan() : value;
}
double canonical(double value) {
  return value;
}
float flushed(float value, bool flushes) {
  return flushes ? flush(value) : value;
}
double flushed(double value, bool) {  // f64 has no .ftz
  return value;
}

// To nearest even, which the host's own operations do: the forms that compilers emit most.
template <Operation operation, class T>
T nearest(T a, T b) {
  return canonical(operation == kAdd ? a + b : operation == kSub ? a - b : operation == kMul ? a * b : a / b);
}
template <class T>
T nearest_fma(T a, T b, T c) {
  return canonical(std::fma(a, b, c));
}
template <class T>
T nearest_sqrt(T a) {
  return canonical(std::sqrt(a));
}
template <class T>
T nearest_rcp(T a) {
  return canonical(T(1) / a);
}

// A quotient to 53 bits and to odd; the remainder is exact, because the operands have 24 bits.
double quotient_to_odd(double a, double b) {
  const double quotient = a / b;
  if (!std::isfinite(quotient) || !std::isfinite(b)) return quotient;
  return with_odd_rest(quotient, std::fma(-quotient, b, a) * (b < 0 ? -1 : 1));
}
double root_to_odd(double a) {
  const double root = std::sqrt(a);
  return std::isfinite(root) ? with_odd_rest(root, std::fma(-root, root, a)) : root;
}

// An exact zero is negative only of negative zeros, or if it is rounded down and its terms have different signs.
double sum_to_odd(double a, double b, Rounding rounding) {
  const double sum = add_to_odd(a, b);
  return sum == 0 && rounding == Rounding::kDown && std::signbit(a) != std::signbit(b) ? -0.0 : sum;
}

// f32 operands are 24 bits: products are exact in fp64, and what is not is rounded to odd.
double to_odd(Operation operation, double a, double b, double c, Rounding rounding) {
  switch (operation) {
    case kAdd:
      return sum_to_odd(a, b, rounding);
    case kSub:
      return sum_to_odd(a, -b, rounding);
    case kMul:
      return a * b;
    case kFma:
      return sum_to_odd(a * b, c, rounding);
    case kDiv:
      return quotient_to_odd(a, b);
    case kSqrt:
      return root_to_odd(a);
  }
  return 0;
}

// .sat: to [0, 1]; a NaN becomes +0.
template <class T>
T saturated(T value) {
  return value > 0 ? std::fmin(value, T(1)) : T(0);
}

struct Sources {
  u64 rooms[3][kLanes];
  const u64* of[3] = {};
  Sources(Machine& machine, Warp& warp, const Instruction& instruction) {
    for (int k = 1; k < instruction.num_operands(); ++k)
      of[k - 1] = read(machine, warp, instruction.at(k), rooms[k - 1]);
  }
  u64 at(int k, int lane) const { return of[k] == nullptr ? 0 : of[k][lane]; }
};

float in_direction(Operation operation, Rounding rounding, float a, float b, float c) {
  return as<float>(rounded(kF32, to_odd(operation, a, b, c, rounding), rounding));
}
// Roundings of f64 are the host's. The operands and the result are volatile, so that nothing moves out of between.
double in_direction(Operation operation, Rounding rounding, double a, double b, double c) {
  static const int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  volatile double x = a, y = b, z = c, result = 0;
  std::fesetround(kModes[static_cast<int>(rounding)]);
  switch (operation) {
    case kAdd:
      result = x + y;
      break;
    case kSub:
      result = x - y;
      break;
    case kMul:
      result = x * y;
      break;
    case kFma:
      result = std::fma(x, y, z);
      break;
    case kDiv:
      result = x / y;
      break;
    case kSqrt:
      result = std::sqrt(x);
      break;
  }
  std::fesetround(FE_TONEAREST);
  return result;
}

// All forms that are not the plain ones. `a`: the operation, `b`: the rounding, `c`: .sat, `d`: a reciprocal.
template <class T>
void general(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const Sources sources(machine, warp, instruction);
  const auto operation = static_cast<Operation>(instruction.a);
  const auto rounding = static_cast<Rounding>(instruction.b);
  u64 sink[kLanes];
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    T x[3];
    for (int k = 0; k < 3; ++k) x[k] = flushed(as<T>(sources.at(k, l)), instruction.flush);
    if (instruction.d) x[1] = x[0], x[0] = 1;
    const T result = flushed(in_direction(operation, rounding, x[0], x[1], x[2]), instruction.flush);
    return bits(instruction.c ? saturated(result) : result);
  });
}

// 9.7.3.9, 9.7.3.10. The sign only, of NaNs too.
template <bool flushes>
struct Absolute {
  template <class T>
  static T apply(T a) {
    return flushed(std::fabs(a), flushes);
  }
};
template <bool flushes>
struct Negative {
  template <class T>
  static T apply(T a) {
    return flushed(std::copysign(a, std::signbit(a) ? T(1) : T(-1)), flushes);
  }
};
template <template <bool> class F>
Handler sign_of(Modifiers& modifiers, Type type) {
  const bool flushes = type == kF32 && modifiers.take("ftz");
  return flushes ? handler_of<F<true>, float>(type) : handler_of<F<false>, float, double>(type);
}
struct CopySign {  // 9.7.3.2
  template <class T>
  static T apply(T sign, T magnitude) {
    return std::copysign(magnitude, sign);
  }
};

// 9.7.3.11, 9.7.3.12. `a`: the largest, `b`: .NaN, `c`: .xorsign.abs.
template <class T>
void run_extremum(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const Sources sources(machine, warp, instruction);
  u64 sink[kLanes];
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    const T a = flushed(as<T>(sources.at(0, l)), instruction.flush);
    const T b = flushed(as<T>(sources.at(1, l)), instruction.flush);
    return bits(instruction.c ? extremum_of_magnitudes(a, b, instruction.a, instruction.b)
                              : extremum(a, b, instruction.a, instruction.b));
  });
}
void decode_extremum(Modifiers& modifiers, Instruction& instruction, Type type) {
  instruction.a = modifiers.name() == "max";
  instruction.handler = type == kF64 ? run_extremum<double> : run_extremum<float>;
  if (type == kF64) return;
  instruction.b = modifiers.take("NaN");
  instruction.c = take_xorsign(modifiers);
  instruction.flush = modifiers.take("ftz");
}

// 9.7.3.8: div.approx is a * (1 / b), and 1 / b is too small for it if |b| is above 2^126.
template <bool flushes>
float div_approx(float a, float b) {
  a = flushed(a, flushes), b = flushed(b, flushes);
  if (std::isfinite(b) && std::fabs(b) > 0x1p126f) {
    if (std::isinf(a) || std::isnan(a)) return canonical_nan();
    return std::copysign(0.0f, std::signbit(a) == std::signbit(b) ? 1.0f : -1.0f);
  }
  return flushed(canonical(a / b), flushes);
}
template <bool flushes>
float div_full(float a, float b) {
  return flushed(canonical(flushed(a, flushes) / flushed(b, flushes)), flushes);
}

// 9.7.3.13 to 9.7.3.22
double reciprocal(double a) {
  return 1 / a;
}
double reciprocal_root(double a) {
  return 1 / std::sqrt(a);
}
template <double (*function)(double), bool flushes>
float approximate(float a) {
  return flushed(canonical(static_cast<float>(function(flushed(a, flushes)))), flushes);
}
template <double (*function)(double)>
Handler approximate_of(Modifiers& modifiers) {
  return modifiers.take("ftz") ? Lanewise<approximate<function, true>>::run
                               : Lanewise<approximate<function, false>>::run;
}
// 9.7.3.14, 9.7.3.17: the upper 32 bits only; subnormal operands and results are zero.
template <double (*function)(double)>
double gross(double a) {
  const auto flush_f64 = [](double x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0, x) : x; };
  return as<double>(bits(flush_f64(function(flush_f64(a)))) >> 32 << 32);
}

bool decode_approximate(Modifiers& modifiers, Instruction& instruction, Type type) {
  const std::string& name = modifiers.name();
  if (!modifiers.take("approx")) return false;
  Handler& handler = instruction.handler;
  if (type == kF64) {
    const bool flushes = modifiers.take("ftz");
    if (name == "rcp" && flushes) handler = Lanewise<gross<reciprocal>>::run;
    if (name == "rsqrt") handler = flushes ? Lanewise<gross<reciprocal_root>>::run : Lanewise<reciprocal_root>::run;
    return true;
  }
  if (name == "rcp") handler = approximate_of<reciprocal>(modifiers);
  if (name == "sqrt") handler = approximate_of<std::sqrt>(modifiers);
  if (name == "rsqrt") handler = approximate_of<reciprocal_root>(modifiers);
  if (name == "sin") handler = approximate_of<std::sin>(modifiers);
  if (name == "cos") handler = approximate_of<std::cos>(modifiers);
  if (name == "lg2") handler = approximate_of<std::log2>(modifiers);
  if (name == "ex2") handler = approximate_of<std::exp2>(modifiers);
  if (name == "tanh") handler = Lanewise<approximate<std::tanh, false>>::run;
  if (name == "div")
    handler = modifiers.take("ftz") ? Lanewise<div_approx<true>>::run : Lanewise<div_approx<false>>::run;
  return true;
}

// The plain form of an operation: to nearest, nothing flushed or saturated.
template <class T>
Handler nearest_of(Operation operation, bool reciprocal) {
  switch (operation) {
    case kAdd:
      return Lanewise<nearest<kAdd, T>>::run;
    case kSub:
      return Lanewise<nearest<kSub, T>>::run;
    case kMul:
      return Lanewise<nearest<kMul, T>>::run;
    case kFma:
      return Lanewise<nearest_fma<T>>::run;
    case kDiv:
      return reciprocal ? Lanewise<nearest_rcp<T>>::run : Lanewise<nearest<kDiv, T>>::run;
    case kSqrt:
      return Lanewise<nearest_sqrt<T>>::run;
  }
  return nullptr;
}

int operation_of(const std::string& name) {
  if (name == "add") return kAdd;
  if (name == "sub") return kSub;
  if (name == "mul") return kMul;
  if (name == "fma" || name == "mad") return kFma;
  if (name == "div" || name == "rcp") return kDiv;
  return name == "sqrt" ? kSqrt : -1;
}

void decode_rounded(Modifiers& modifiers, Instruction& instruction, Type type) {
  const int operation = operation_of(modifiers.name()), rounding = modifiers.any({"rn", "rz", "rm", "rp"});
  const bool can_saturate = operation <= kFma && type == kF32;
  if (operation < 0 || (rounding < 0 && operation >= kFma)) modifiers.refuse("no rounding");
  instruction.a = operation;
  instruction.b = rounding < 0 ? 0 : rounding;
  instruction.flush = type == kF32 && modifiers.take("ftz");
  instruction.c = can_saturate && modifiers.take("sat");
  instruction.d = modifiers.name() == "rcp";
  const bool plain = instruction.b == 0 && !instruction.flush && !instruction.c;
  const auto which = static_cast<Operation>(operation);
  if (type == kF32)
    instruction.handler = plain ? nearest_of<float>(which, instruction.d) : general<float>;
  else
    instruction.handler = plain ? nearest_of<double>(which, instruction.d) : general<double>;
}

}  // namespace

void decode_floating(Modifiers& modifiers, Instruction& instruction, Type type) {
  const std::string& name = modifiers.name();
  instruction.type = type;
  if (instruction.counted != Class::kSpecialFunction)
    instruction.counted = name == "div" ? Class::kSpecialFunction : Class::kFloating;
  Handler& handler = instruction.handler;
  if (decode_approximate(modifiers, instruction, type)) return;
  if (name == "abs") {
    handler = sign_of<Absolute>(modifiers, type);
  } else if (name == "neg") {
    handler = sign_of<Negative>(modifiers, type);
  } else if (name == "copysign") {
    handler = handler_of<CopySign, float, double>(type);
  } else if (name == "min" || name == "max") {
    decode_extremum(modifiers, instruction, type);
  } else if (name == "div" && type == kF32 && modifiers.take("full")) {
    handler = modifiers.take("ftz") ? Lanewise<div_full<true>>::run : Lanewise<div_full<false>>::run;
  } else {
    decode_rounded(modifiers, instruction, type);
  }
}

}  // namespace fused_resnet::ptx
