// Arithmetic of integers (PTX ISA 9.7.1), with the carry flag too (9.7.2).
#include <limits>

#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

template <class T>
struct Doubled;
template <>
struct Doubled<u16> {
  using type = u32;
};
template <>
struct Doubled<s16> {
  using type = s32;
};
template <>
struct Doubled<u32> {
  using type = u64;
};
template <>
struct Doubled<s32> {
  using type = s64;
};
template <>
struct Doubled<u64> {
  __extension__ using type = unsigned __int128;
};
template <>
struct Doubled<s64> {
  __extension__ using type = __int128;
};
template <class T>
using Twice = typename Doubled<T>::type;

// 9.7.1.1, 9.7.1.2. Unsigned, because signed overflow wraps here and is undefined in C++.
struct Add {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(u64(a) + u64(b));
  }
};
struct Sub {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(u64(a) - u64(b));
  }
};

s32 clamped(s64 value) {
  constexpr s64 low = std::numeric_limits<s32>::min(), high = std::numeric_limits<s32>::max();
  return static_cast<s32>(value < low ? low : value > high ? high : value);
}
s32 add_sat(s32 a, s32 b) {
  return clamped(s64(a) + b);
}
s32 sub_sat(s32 a, s32 b) {
  return clamped(s64(a) - b);
}

// 9.7.1.3
struct MulLo {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(u64(a) * u64(b));
  }
};
struct MulHi {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>((Twice<T>(a) * b) >> (8 * sizeof(T)));
  }
};
struct MulWide {
  template <class T>
  static Twice<T> apply(T a, T b) {
    return Twice<T>(a) * b;
  }
};

// 9.7.1.4
struct MadLo {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(MulLo::apply<T>(a, b), c);
  }
};
struct MadHi {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(MulHi::apply<T>(a, b), c);
  }
};
struct MadWide {
  template <class T>
  static Twice<T> apply(T a, T b, Twice<T> c) {
    return Add::apply<Twice<T>>(MulWide::apply<T>(a, b), c);
  }
};
s32 mad_hi_sat(s32 a, s32 b, s32 c) {
  return clamped(s64(MulHi::apply<s32>(a, b)) + c);
}

// 9.7.1.5, 9.7.1.6: the low 24 bits of both, and of the product's 48 bits the upper or lower 32.
s64 low_24(s32 value) {
  return s64(u64(value) << 40) >> 40;
}
u64 low_24(u32 value) {
  return value & 0xffffff;
}
struct Mul24Lo {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(low_24(a) * low_24(b));
  }
};
struct Mul24Hi {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>((low_24(a) * low_24(b)) >> 16);
  }
};
struct Mad24Lo {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(Mul24Lo::apply<T>(a, b), c);
  }
};
struct Mad24Hi {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(Mul24Hi::apply<T>(a, b), c);
  }
};

struct Sad {  // 9.7.1.7
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(c, a < b ? Sub::apply<T>(b, a) : Sub::apply<T>(a, b));
  }
};
struct Abs {  // 9.7.1.10
  template <class T>
  static T apply(T a) {
    return a < 0 ? static_cast<T>(-u64(a)) : a;
  }
};
struct Neg {  // 9.7.1.11
  template <class T>
  static T apply(T a) {
    return static_cast<T>(-u64(a));
  }
};
struct Min {  // 9.7.1.12
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {  // 9.7.1.13
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
s32 min_relu(s32 a, s32 b) {
  return Max::apply<s32>(Min::apply<s32>(a, b), 0);
}
s32 max_relu(s32 a, s32 b) {
  return Max::apply<s32>(Max::apply<s32>(a, b), 0);
}

template <class F, class T, bool relu>
u32 pairwise(u32 a, u32 b) {
  T low = F::template apply<T>(static_cast<T>(a), static_cast<T>(b));
  T high = F::template apply<T>(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
  if (relu) low = low > 0 ? low : 0, high = high > 0 ? high : 0;
  return u32(u16(low)) | u32(u16(high)) << 16;
}

// 9.7.1.8, 9.7.1.9. The smallest number divided by -1 wraps. Dividing by zero gives an unspecified value: any.
template <class T, bool remainder>
void divide(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[2][kLanes], sink[kLanes];
  const u64* a = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* b = read(machine, warp, instruction.at(2), rooms[1]);
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) -> u64 {
    const T x = as<T>(a[l]), y = as<T>(b[l]);
    if (y == 0) return bits(static_cast<T>(u64(machine.random()) << 32 | machine.random()));
    if (std::numeric_limits<T>::is_signed && y == static_cast<T>(-1)) return remainder ? 0 : bits(Neg::apply<T>(x));
    return bits(static_cast<T>(remainder ? x % y : x / y));
  });
}
template <bool remainder>
Handler divide_of(Type type) {
  switch (type) {
    case kU16:
      return divide<u16, remainder>;
    case kS16:
      return divide<s16, remainder>;
    case kU32:
      return divide<u32, remainder>;
    case kS32:
      return divide<s32, remainder>;
    case kU64:
      return divide<u64, remainder>;
    case kS64:
      return divide<s64, remainder>;
    default:
      return nullptr;
  }
}

// 9.7.2. `a`: 0 the sum a + b, 1 the difference a - b, 2 mad.lo, 3 mad.hi. `b`: whether CC.CF goes in, `c`: out.
template <class T>
void with_carry(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  using Unsigned = std::make_unsigned_t<T>;
  u64 rooms[3][kLanes], sink[kLanes];
  const u64* sources[3] = {};
  for (int k = 1; k < instruction.num_operands(); ++k)
    sources[k - 1] = read(machine, warp, instruction.at(k), rooms[k - 1]);
  u64* to = destination(warp, instruction.at(0), sink);
  Lanes carry = 0;
  FOR_ACTIVE(mask) {
    T x = as<T>(sources[0][l]), y = as<T>(sources[1][l]);
    if (instruction.a >= 2) {
      x = instruction.a == 2 ? MulLo::apply<T>(x, y) : MulHi::apply<T>(x, y);
      y = as<T>(sources[2][l]);
    }
    const Twice<Unsigned> left = static_cast<Unsigned>(x), right = static_cast<Unsigned>(y),
                          in = instruction.b ? warp.carry >> l & 1 : 0;
    const Twice<Unsigned> result = instruction.a == 1 ? left - right - in : left + right + in;
    carry |= static_cast<Lanes>(result >> (8 * sizeof(T)) & 1) << l;
    to[l] = bits(static_cast<Unsigned>(result));
  }
  if (instruction.c) warp.carry = (warp.carry & ~mask) | carry;
}

Handler multiply_of(Modifiers& modifiers, Type type) {
  switch (modifiers.any({"lo", "hi", "wide"})) {
    case 0:
      return for_integers<MulLo>(type);
    case 1:
      return for_integers<MulHi>(type);
    case 2:
      return for_narrow_integers<MulWide>(type);
    default:
      return nullptr;
  }
}

Handler multiply_add_of(Modifiers& modifiers, Type type) {
  switch (modifiers.any({"lo", "hi", "wide"})) {
    case 0:
      return for_integers<MadLo>(type);
    case 1:
      if (modifiers.take("sat")) return type == kS32 ? Lanewise<mad_hi_sat>::run : nullptr;
      return for_integers<MadHi>(type);
    case 2:
      return for_narrow_integers<MadWide>(type);
    default:
      return nullptr;
  }
}

template <class Low, class High>
Handler product_24(Modifiers& modifiers, Type type) {
  const int part = modifiers.any({"lo", "hi"});
  if (part < 0) return nullptr;
  if (type == kU32)
    return part == 0 ? Lanewise<&Low::template apply<u32>>::run : Lanewise<&High::template apply<u32>>::run;
  if (type == kS32)
    return part == 0 ? Lanewise<&Low::template apply<s32>>::run : Lanewise<&High::template apply<s32>>::run;
  return nullptr;
}

template <class F>
Handler extremum(Modifiers& modifiers, Type type, Handler relu_of_s32) {
  const bool relu = modifiers.take("relu");
  if (type == kS16x2) return relu ? Lanewise<pairwise<F, s16, true>>::run : Lanewise<pairwise<F, s16, false>>::run;
  if (relu) return type == kS32 ? relu_of_s32 : nullptr;
  if (type == kU16x2) return Lanewise<pairwise<F, u16, false>>::run;
  return for_integers<F>(type);
}

template <class F>
Handler sum(Modifiers& modifiers, Type type, Handler saturated) {
  if (modifiers.take("sat")) return type == kS32 ? saturated : nullptr;
  return for_integers<F>(type);
}

}  // namespace

void decode_integer(Modifiers& modifiers, Instruction& instruction, Type type) {
  const std::string& name = modifiers.name();
  instruction.type = type;
  instruction.counted = Class::kInteger;
  Handler& handler = instruction.handler;
  if (name == "add") {
    const bool paired = type == kU16x2 || type == kS16x2;
    handler = paired ? Lanewise<pairwise<Add, u16, false>>::run : sum<Add>(modifiers, type, Lanewise<add_sat>::run);
  } else if (name == "sub") {
    handler = sum<Sub>(modifiers, type, Lanewise<sub_sat>::run);
  } else if (name == "mul") {
    handler = multiply_of(modifiers, type);
  } else if (name == "mad") {
    handler = multiply_add_of(modifiers, type);
  } else if (name == "mul24") {
    handler = product_24<Mul24Lo, Mul24Hi>(modifiers, type);
  } else if (name == "mad24") {
    handler = product_24<Mad24Lo, Mad24Hi>(modifiers, type);
  } else if (name == "sad") {
    handler = for_integers<Sad>(type);
  } else if (name == "div") {
    handler = divide_of<false>(type);
  } else if (name == "rem") {
    handler = divide_of<true>(type);
  } else if (name == "abs") {
    handler = for_signed<Abs>(type);
  } else if (name == "neg") {
    handler = for_signed<Neg>(type);
  } else if (name == "min") {
    handler = extremum<Min>(modifiers, type, Lanewise<min_relu>::run);
  } else if (name == "max") {
    handler = extremum<Max>(modifiers, type, Lanewise<max_relu>::run);
  }
}

void decode_carry(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  instruction.c = modifiers.take("cc");
  instruction.b = name == "addc" || name == "subc" || name == "madc";
  instruction.a = name[0] == 'a' ? 0 : name[0] == 's' ? 1 : 2;
  if (instruction.a == 2) {
    const int part = modifiers.any({"lo", "hi"});
    if (part < 0) modifiers.refuse();
    instruction.a += part;
  }
  switch (instruction.type = modifiers.type()) {
    case kU32:
      instruction.handler = with_carry<u32>;
      break;
    case kS32:
      instruction.handler = with_carry<s32>;
      break;
    case kU64:
      instruction.handler = with_carry<u64>;
      break;
    case kS64:
      instruction.handler = with_carry<s64>;
      break;
    default:
      break;
  }
}

}  // namespace fused_resnet::ptx
