// Logic, shifts and bit fields (PTX ISA 9.7.1.14 to 9.7.1.24, 9.7.8, 9.7.9.7).
#include <algorithm>
#include <type_traits>

#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

template <class T>
constexpr u32 kWidth = 8 * sizeof(T);

struct And {
  template <class T>
  static T apply(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct Cnot {  // 9.7.8.5
  template <class T>
  static T apply(T a) {
    return a == 0;
  }
};

// 9.7.8.8, 9.7.8.9: amounts are 32 bits, unsigned; those beyond the width are taken as the width.
struct Shl {
  template <class T>
  static T apply(T a, u32 amount) {
    return amount >= kWidth<T> ? T(0) : static_cast<T>(u64(a) << amount);
  }
};
struct Shr {
  template <class T>
  static T apply(T a, u32 amount) {
    return amount >= kWidth<T> ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> amount);
  }
};

// 9.7.8.7: 64 bits, `low` and `high`, shifted; the half that remains.
template <bool right, bool clamp>
u32 funnel_shift(u32 low, u32 high, u32 amount) {
  const u64 both = low | u64(high) << 32;
  const u32 n = clamp ? std::min(amount, 32u) : amount & 31;
  return static_cast<u32>(right ? both >> n : (both << n) >> 32);
}

struct Popc {  // 9.7.1.14
  template <class T>
  static u32 apply(T a) {
    return __builtin_popcountll(a);
  }
};
struct Clz {  // 9.7.1.15
  template <class T>
  static u32 apply(T a) {
    return a == 0 ? kWidth<T> : __builtin_clzll(a) - (64 - kWidth<T>);
  }
};

// 9.7.1.16: the highest bit that differs from the sign; all ones if none does.
template <bool shift_amount>
struct Bfind {
  template <class T>
  static u32 apply(T a) {
    using Unsigned = std::make_unsigned_t<T>;
    const Unsigned value = static_cast<Unsigned>(a < 0 ? ~a : a);
    if (value == 0) return ~0u;
    return shift_amount ? Clz::apply(value) : kWidth<T> - 1 - Clz::apply(value);
  }
};

// 9.7.1.17: from bit `base`, the n-th set bit of the mask, upwards if n > 0, downwards if n < 0; n = 0: only `base`.
u32 fns(u32 mask, u32 base, s32 n) {
  if (base > 31) return ~0u;
  if (n == 0) return mask >> base & 1 ? base : ~0u;
  const int step = n > 0 ? 1 : -1;
  s32 remaining = n > 0 ? n : -n;
  for (int position = static_cast<int>(base); position >= 0 && position < 32; position += step)
    if (mask >> position & 1 && --remaining == 0) return position;
  return ~0u;
}

struct Brev {  // 9.7.1.18
  template <class T>
  static T apply(T a) {
    T reversed = 0;
    for (u32 i = 0; i < kWidth<T>; ++i) reversed |= static_cast<T>(a >> i & 1) << (kWidth<T> - 1 - i);
    return reversed;
  }
};

// 9.7.1.19: position and length are the low 8 bits. A field that reaches beyond the top is filled with its sign bit,
// which then is the top bit; an empty field is 0.
struct Bfe {
  template <class T>
  static T apply(T a, u32 position, u32 length) {
    using Unsigned = std::make_unsigned_t<T>;
    const u32 top = kWidth<T> - 1;
    position &= 255;
    length &= 255;
    if (length == 0) return 0;
    const u64 value = static_cast<Unsigned>(a);
    const bool negative = std::is_signed_v<T> && (value >> std::min(position + length - 1, top) & 1);
    const u64 field = position > top ? 0 : value >> position;
    const u32 filled = position > top ? 0 : std::min(length, top + 1 - position);
    const u64 keep = filled >= 64 ? ~u64(0) : (u64(1) << filled) - 1;
    return static_cast<T>((field & keep) | (negative ? ~keep : 0));
  }
};

// 9.7.1.20
struct Bfi {
  template <class T>
  static T apply(T field, T into, u32 position, u32 length) {
    position &= 255;
    length = std::min(length & 255, kWidth<T>);
    if (length == 0 || position >= kWidth<T>) return into;
    const u64 mask = (length >= 64 ? ~u64(0) : (u64(1) << length) - 1) << position;
    return static_cast<T>((into & ~mask) | ((u64(field) << position) & mask));
  }
};

// 9.7.1.23, 9.7.1.24. Bytes are u8 or s8; the sum wraps.
template <class A, class B>
u32 dp4a(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 32; i += 8) c += u32(s32(static_cast<A>(a >> i)) * s32(static_cast<B>(b >> i)));
  return c;
}
template <class A, class B, int first>
u32 dp2a(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 2; ++i) c += u32(s32(static_cast<A>(a >> 16 * i)) * s32(static_cast<B>(b >> (first + 8 * i))));
  return c;
}

// 9.7.9.7, the default mode: each of four selectors names a byte, or its sign bit eight times.
u32 prmt(u32 a, u32 b, u32 selectors) {
  const u64 both = a | u64(b) << 32;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 selector = selectors >> (4 * k) & 15;
    u32 byte = both >> (8 * (selector & 7)) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * k);
  }
  return result;
}

// 9.7.9.7, the modes: which bytes each of the four values of the two low selector bits takes, from byte 0 on.
template <int mode>
u32 prmt_mode(u32 a, u32 b, u32 selector) {
  static constexpr u32 kBytes[6][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543},  // f4e
      {0x5670, 0x6701, 0x7012, 0x0123},  // b4e
      {0x0000, 0x1111, 0x2222, 0x3333},  // rc8
      {0x3210, 0x3211, 0x3222, 0x3333},  // ecl
      {0x0000, 0x1110, 0x2210, 0x3210},  // ecr
      {0x1010, 0x3232, 0x1010, 0x3232},  // rc16
  };
  return prmt(a, b, kBytes[mode][selector & 3]);
}

// 9.7.8.6: any function of three bits, by its truth table.
u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int row = 0; row < 8; ++row)
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}

Handler funnel_of(Modifiers& modifiers, Type type) {
  const int direction = modifiers.any({"l", "r"}), mode = modifiers.any({"clamp", "wrap"});
  if (type != kB32 || direction < 0 || mode < 0) return nullptr;
  if (direction == 0)
    return mode == 0 ? Lanewise<funnel_shift<false, true>>::run : Lanewise<funnel_shift<false, false>>::run;
  return mode == 0 ? Lanewise<funnel_shift<true, true>>::run : Lanewise<funnel_shift<true, false>>::run;
}

template <class A, class B>
Handler dot_of(bool is_dp4a, int half) {
  if (is_dp4a) return Lanewise<dp4a<A, B>>::run;
  return half == 0 ? Lanewise<dp2a<std::conditional_t<std::is_signed_v<A>, s16, u16>, B, 0>>::run
                   : Lanewise<dp2a<std::conditional_t<std::is_signed_v<A>, s16, u16>, B, 16>>::run;
}

void decode_dot(Modifiers& modifiers, Instruction& instruction) {
  const bool is_dp4a = modifiers.name() == "dp4a";
  const int half = is_dp4a ? 0 : modifiers.any({"lo", "hi"});
  const std::vector<Type> types = modifiers.types();
  const auto is_word = [](Type type) { return type == kU32 || type == kS32; };
  if (types.size() != 2 || !is_word(types[0]) || !is_word(types[1]) || half < 0) modifiers.refuse("types");
  if (types[0] == kU32)
    instruction.handler = types[1] == kU32 ? dot_of<u8, u8>(is_dp4a, half) : dot_of<u8, s8>(is_dp4a, half);
  else
    instruction.handler = types[1] == kU32 ? dot_of<s8, u8>(is_dp4a, half) : dot_of<s8, s8>(is_dp4a, half);
}

Handler prmt_of(Modifiers& modifiers) {
  switch (modifiers.any({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})) {
    case 0:
      return Lanewise<prmt_mode<0>>::run;
    case 1:
      return Lanewise<prmt_mode<1>>::run;
    case 2:
      return Lanewise<prmt_mode<2>>::run;
    case 3:
      return Lanewise<prmt_mode<3>>::run;
    case 4:
      return Lanewise<prmt_mode<4>>::run;
    case 5:
      return Lanewise<prmt_mode<5>>::run;
    default:
      return Lanewise<prmt>::run;
  }
}

}  // namespace

bool decode_bits(Modifiers& modifiers, Instruction& instruction) {
  static const char* const kNames[] = {"and",  "or",  "xor", "not",   "cnot", "shl",  "shr",  "shf",  "popc", "clz",
                                       "brev", "bfe", "bfi", "bfind", "fns",  "dp4a", "dp2a", "prmt", "lop3"};
  const std::string& name = modifiers.name();
  if (std::find(std::begin(kNames), std::end(kNames), name) == std::end(kNames)) return false;
  if (name == "dp4a" || name == "dp2a") {
    decode_dot(modifiers, instruction);
    return true;
  }
  const Type type = instruction.type = modifiers.type();
  Handler& handler = instruction.handler;
  if (name == "and") handler = for_bits<And>(type);
  if (name == "or") handler = for_bits<Or>(type);
  if (name == "xor") handler = for_bits<Xor>(type);
  if (name == "not") handler = for_bits<Not>(type);
  if (name == "cnot") handler = for_bits<Cnot>(type);
  if (name == "shl") handler = for_bits<Shl>(type);
  if (name == "shr") handler = for_integers<Shr>(unsigned_of_bits(type) == kNoType ? type : unsigned_of_bits(type));
  if (name == "shf") handler = funnel_of(modifiers, type);
  if (name == "popc") handler = for_wide_bits<Popc>(type);
  if (name == "clz") handler = for_wide_bits<Clz>(type);
  if (name == "brev") handler = for_wide_bits<Brev>(type);
  if (name == "bfe") handler = for_wide_integers<Bfe>(type);
  if (name == "bfi") handler = for_wide_bits<Bfi>(type);
  if (name == "bfind")
    handler = modifiers.take("shiftamt") ? for_wide_integers<Bfind<true>>(type) : for_wide_integers<Bfind<false>>(type);
  if (name == "fns" && type == kB32) handler = Lanewise<fns>::run;
  if (name == "prmt" && type == kB32) handler = prmt_of(modifiers);
  if (name == "lop3" && type == kB32) {
    expect_operands(modifiers, instruction, "dsssi");
    if (u64(instruction.at(4).value) > 255) modifiers.refuse("a table of more than 8 bits");
    handler = Lanewise<lop3>::run;
  }
  return true;
}

}  // namespace fused_resnet::ptx
