// Comparison and selection (PTX ISA 9.7.6, 9.7.7; testp: 9.7.3.1).
#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

enum Comparison : int {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan,
  kLo,
  kLs,
  kHi,
  kHs
};
enum Combination : int { kAlone, kAnd, kOr, kXor };

// Ordered comparisons with a NaN are false, kNe too; unordered ones are true.
template <class T>
bool holds(int comparison, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case kEq:
      return a == b;
    case kNe:
      return !unordered && a != b;
    case kLt:
    case kLo:
      return a < b;
    case kLe:
    case kLs:
      return a <= b;
    case kGt:
    case kHi:
      return a > b;
    case kGe:
    case kHs:
      return a >= b;
    case kEqu:
      return unordered || a == b;
    case kNeu:
      return unordered || a != b;
    case kLtu:
      return unordered || a < b;
    case kLeu:
      return unordered || a <= b;
    case kGtu:
      return unordered || a > b;
    case kGeu:
      return unordered || a >= b;
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}

template <class T>
Lanes compare_as(int comparison, const u64* a, const u64* b) {
  Lanes result = 0;
  FOR_LANES result |= Lanes(holds(comparison, as<T>(a[l]), as<T>(b[l]))) << l;
  return result;
}
Lanes compare_halves(const Instruction& instruction, const u64* a, const u64* b, int shift) {
  Lanes result = 0;
  const auto value = [&](u64 source) {
    u32 code = source >> shift & 0xffff;
    if (instruction.flush && (code & 0x7c00) == 0) code &= 0x8000;
    return float_of(instruction.from, code);
  };
  FOR_LANES result |= Lanes(holds(instruction.a, value(a[l]), value(b[l]))) << l;
  return result;
}
Lanes compare_f32(const Instruction& instruction, const u64* a, const u64* b) {
  if (!instruction.flush) return compare_as<float>(instruction.a, a, b);
  Lanes result = 0;
  FOR_LANES result |= Lanes(holds(instruction.a, flush(as<float>(a[l])), flush(as<float>(b[l])))) << l;
  return result;
}

// `from`: the type compared, `type`: of set's result. `a`: Comparison, `b`: Combination. `shift`: of pairs, 0 or 16.
Lanes compare(const Instruction& instruction, const u64* a, const u64* b, int shift) {
  switch (instruction.from) {
    case kU16:
    case kB16:
      return compare_as<u16>(instruction.a, a, b);
    case kS16:
      return compare_as<s16>(instruction.a, a, b);
    case kU32:
    case kB32:
      return compare_as<u32>(instruction.a, a, b);
    case kS32:
      return compare_as<s32>(instruction.a, a, b);
    case kU64:
    case kB64:
      return compare_as<u64>(instruction.a, a, b);
    case kS64:
      return compare_as<s64>(instruction.a, a, b);
    case kF32:
      return compare_f32(instruction, a, b);
    case kF64:
      return compare_as<double>(instruction.a, a, b);
    default:
      return compare_halves(instruction, a, b, shift);
  }
}

Lanes combine(int combination, Lanes value, Lanes with) {
  return combination == kAnd   ? value & with
         : combination == kOr  ? value | with
         : combination == kXor ? value ^ with
                               : value;
}

// 9.7.6.2: p gets the comparison, q its opposite, each combined with c. Of pairs, p gets the low one's and q the high
// one's.
void setp(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[2][kLanes];
  const u64* a = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* b = read(machine, warp, instruction.at(2), rooms[1]);
  const Lanes with = instruction.b ? read_predicate(warp, instruction.at(3)) : 0;
  const bool pairs = instruction.from == kF16x2 || instruction.from == kBF16x2;
  const Lanes first = compare(instruction, a, b, 0), second = pairs ? compare(instruction, a, b, 16) : ~first;
  write_predicate(warp, instruction.at(0, 0), combine(instruction.b, first, with), mask);
  if (instruction.count(0) == 2)
    write_predicate(warp, instruction.at(0, 1), combine(instruction.b, second, with), mask);
}

// What set writes if it holds: all ones, or 1.0.
u64 truth(Type type) {
  switch (type) {
    case kF32:
      return 0x3f800000;
    case kF16:
    case kF16x2:
      return 0x3c00;
    case kBF16:
    case kBF16x2:
      return 0x3f80;
    default:
      return size_of(type) == 2 ? 0xffff : 0xffffffff;
  }
}

// 9.7.6.1, 9.7.7.1
void set(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[2][kLanes], sink[kLanes];
  const u64* a = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* b = read(machine, warp, instruction.at(2), rooms[1]);
  const Lanes with = instruction.b ? read_predicate(warp, instruction.at(3)) : 0;
  const bool pairs = instruction.from == kF16x2 || instruction.from == kBF16x2;
  const Lanes low = combine(instruction.b, compare(instruction, a, b, 0), with);
  const Lanes high = pairs ? combine(instruction.b, compare(instruction, a, b, 16), with) : 0;
  const u64 one = pairs ? truth(instruction.type) & 0xffff : truth(instruction.type);
  store(destination(warp, instruction.at(0), sink), mask,
        [&](int l) { return (low >> l & 1 ? one : 0) | (high >> l & 1 ? one << 16 : 0); });
}

void selp(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.6.3
  u64 rooms[2][kLanes], sink[kLanes];
  const u64* a = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* b = read(machine, warp, instruction.at(2), rooms[1]);
  const Lanes choice = read_predicate(warp, instruction.at(3));
  const u64 keep = ~u64(0) >> (64 - 8 * size_of(instruction.type));
  store(destination(warp, instruction.at(0), sink), mask,
        [&](int l) { return (choice >> l & 1 ? a[l] : b[l]) & keep; });
}

void slct(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {  // 9.7.6.4; not of a NaN
  u64 rooms[3][kLanes], sink[kLanes];
  const u64* a = read(machine, warp, instruction.at(1), rooms[0]);
  const u64* b = read(machine, warp, instruction.at(2), rooms[1]);
  const u64* c = read(machine, warp, instruction.at(3), rooms[2]);
  const u64 keep = ~u64(0) >> (64 - 8 * size_of(instruction.type));
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    const float value = instruction.flush ? flush(as<float>(c[l])) : as<float>(c[l]);
    const bool first = instruction.from == kS32 ? as<s32>(c[l]) >= 0 : value >= 0;
    return (first ? a[l] : b[l]) & keep;
  });
}

bool has_property(int property, double value, bool subnormal) {
  switch (property) {
    case 0:
      return std::isfinite(value);
    case 1:
      return std::isinf(value);
    case 2:
      return !std::isnan(value);
    case 3:
      return std::isnan(value);
    case 4:
      return std::isfinite(value) && !subnormal;  // zeros too
    default:
      return subnormal;
  }
}
void testp(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 room[kLanes];
  const u64* a = read(machine, warp, instruction.at(1), room);
  Lanes result = 0;
  FOR_LANES {
    const bool narrow = instruction.from == kF32;
    const double value = narrow ? as<float>(a[l]) : as<double>(a[l]);
    const int kind = narrow ? std::fpclassify(as<float>(a[l])) : std::fpclassify(value);
    result |= Lanes(has_property(instruction.a, value, kind == FP_SUBNORMAL)) << l;
  }
  write_predicate(warp, instruction.at(0), result, mask);
}

bool is_half(Type type) {
  return type == kF16 || type == kBF16 || type == kF16x2 || type == kBF16x2;
}
bool is_bit_type(Type type) {
  return type == kB16 || type == kB32 || type == kB64;
}
bool is_word(Type type) {  // 16, 32 or 64 bits that are no half
  return size_of(type) >= 2 && size_of(type) <= 8 && !is_half(type) && type != kTF32 && type != kE4M3x2 &&
         type != kE5M2x2 && type != kU16x2 && type != kS16x2;
}

// Which comparisons a type has: bits only eq and ne; lo, ls, hi and hs are for unsigned integers; the rest for floats.
int comparison_of(Modifiers& modifiers, Type type) {
  const int comparison = modifiers.any({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu",
                                        "num", "nan", "lo", "ls", "hi", "hs"});
  const bool floats = is_float(type) || is_half(type);
  const bool ordered = comparison >= kLt && comparison <= kGe;
  if (comparison == kEq || comparison == kNe) return comparison;
  if (comparison >= kLo && (floats || is_signed(type))) return -1;
  if (is_bit_type(type) || (!ordered && comparison < kLo && !floats)) return -1;
  return comparison;
}

void decode_compare(Modifiers& modifiers, Instruction& instruction, Type type) {
  const bool is_setp = modifiers.name() == "setp";
  if (!is_word(type) && !is_half(type)) modifiers.refuse(std::string("type .") + name_of(type));
  instruction.from = type;
  instruction.a = comparison_of(modifiers, type);
  if (instruction.a < 0) modifiers.refuse(std::string("no such comparison of .") + name_of(type));
  instruction.b = 1 + modifiers.any({"and", "or", "xor"});
  instruction.flush = (type == kF32 || type == kF16 || type == kF16x2) && modifiers.take("ftz");
  const bool pairs = type == kF16x2 || type == kBF16x2, two = instruction.count(0) == 2;
  if (pairs && is_setp && !two) modifiers.refuse("one predicate of a pair");
  const std::string combined = instruction.b ? "p" : "";
  expect_operands(modifiers, instruction, ((is_setp ? two ? "(qq)ss" : "qss" : "dss") + combined).c_str());
}

bool suits_set(Type to, Type from) {
  if (from == kF16x2 || from == kBF16x2) return to == from || to == kU32 || to == kS32;
  if (from == kF16 || from == kBF16) return to == from || to == kU16 || to == kS16 || to == kU32 || to == kS32;
  return to == kU32 || to == kS32 || to == kF32 || to == kF16 || to == kBF16;
}

}  // namespace

void decode_comparison(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  const std::vector<Type> types = modifiers.types();
  if (types.size() != (name == "set" || name == "slct" ? 2 : 1)) modifiers.refuse("types");
  instruction.type = types[0];
  if (name == "setp") {
    decode_compare(modifiers, instruction, types[0]);
    instruction.handler = setp;
  } else if (name == "set") {
    decode_compare(modifiers, instruction, types[1]);
    if (suits_set(types[0], types[1])) instruction.handler = set;
  } else if (name == "selp") {
    expect_operands(modifiers, instruction, "dssp");
    if (is_word(types[0])) instruction.handler = selp;
  } else if (name == "slct") {
    expect_operands(modifiers, instruction, "dsss");
    instruction.from = types[1];
    instruction.flush = types[1] == kF32 && modifiers.take("ftz");
    if (is_word(types[0]) && (types[1] == kS32 || types[1] == kF32)) instruction.handler = slct;
  } else if (name == "testp") {
    expect_operands(modifiers, instruction, "qs");
    instruction.from = types[0];
    instruction.a = modifiers.any({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    if (instruction.a >= 0 && (types[0] == kF32 || types[0] == kF64)) instruction.handler = testp;
  }
}

}  // namespace fused_resnet::ptx
