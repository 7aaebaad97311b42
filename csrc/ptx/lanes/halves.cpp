// Arithmetic of f16, bf16 and pairs of them (PTX ISA 9.7.4).
//
// Sums, products and fma are exact, or rounded to odd, in fp64, then rounded once. ex2 and tanh, which PTX only bounds,
// are the exact values rounded to nearest. A NaN is the canonical one, 0x7fff.
#include "ptx/lanes/lanewise.h"

namespace fused_resnet::ptx {
namespace {

enum Operation : int { kAdd, kSub, kMul, kFma, kMin, kMax, kMinNan, kMaxNan, kNeg, kAbs, kEx2, kTanh };

// `d`: .xorsign.abs.
float extremum_of(const Instruction& instruction, Operation operation, float a, float b) {
  const bool largest = operation == kMax || operation == kMaxNan, nan = operation == kMinNan || operation == kMaxNan;
  return instruction.d ? extremum_of_magnitudes(a, b, largest, nan) : extremum(a, b, largest, nan);
}

double evaluate(const Instruction& instruction, float a, float b, float c) {
  const auto operation = static_cast<Operation>(instruction.a);
  switch (operation) {
    case kAdd:
      return add_to_odd(a, b);
    case kSub:
      return add_to_odd(a, -b);
    case kMul:
      return double(a) * b;
    case kFma:
      return fma_to_odd(a, b, c);
    case kMin:
    case kMax:
    case kMinNan:
    case kMaxNan:
      return extremum_of(instruction, operation, a, b);
    case kEx2:
      return std::exp2(double(a));
    case kTanh:
      return std::tanh(double(a));
    default:
      return 0;
  }
}

u16 flushed(Type type, u16 value) {
  return (value & (type == kF16 ? 0x7c00 : 0x7f80)) == 0 ? value & 0x8000 : value;
}

// `type`: of one element, `third`: as written. `a`: the operation, `b`: .sat, `c`: .relu.
u16 of_element(const Instruction& instruction, u16 a, u16 b, u16 c) {
  const Type type = instruction.type;
  const auto operation = static_cast<Operation>(instruction.a);
  if (instruction.flush) a = flushed(type, a), b = flushed(type, b), c = flushed(type, c);
  if (operation == kNeg) return a ^ 0x8000;
  if (operation == kAbs) return a & 0x7fff;
  double value = evaluate(instruction, float_of(type, a), float_of(type, b), float_of(type, c));
  if (instruction.b) value = value > 0 ? std::fmin(value, 1) : 0;
  u16 result = static_cast<u16>(rounded(type, value));
  if (instruction.c && (result & 0x8000)) result = 0;  // a NaN, which is positive here, stays
  return instruction.flush ? flushed(type, result) : result;
}

template <int count>
void elements(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  u64 rooms[3][kLanes], sink[kLanes];
  const u64* sources[3];
  for (int k = 0; k < 3; ++k)  // what is not there is read, and not used
    sources[k] = read(machine, warp, instruction.at(std::min(k + 1, instruction.num_operands() - 1)), rooms[k]);
  store(destination(warp, instruction.at(0), sink), mask, [&](int l) {
    u64 result = 0;
    for (int shift = 0; shift < 16 * count; shift += 16)
      result |= u64(of_element(instruction, static_cast<u16>(sources[0][l] >> shift),
                               static_cast<u16>(sources[1][l] >> shift), static_cast<u16>(sources[2][l] >> shift)))
                << shift;
    return result;
  });
}

int take_extremum(Modifiers& modifiers, bool largest) {
  const bool nan = modifiers.take("NaN");
  return largest ? (nan ? kMaxNan : kMax) : (nan ? kMinNan : kMin);
}

int operation_of(Modifiers& modifiers) {
  const std::string& name = modifiers.name();
  if (name == "add") return kAdd;
  if (name == "sub") return kSub;
  if (name == "mul") return kMul;
  if (name == "fma") return kFma;
  if (name == "min" || name == "max") return take_extremum(modifiers, name == "max");
  if (name == "neg") return kNeg;
  if (name == "abs") return kAbs;
  if (!modifiers.take("approx")) return -1;
  return name == "ex2" ? kEx2 : name == "tanh" ? kTanh : -1;
}

}  // namespace

void decode_half(Modifiers& modifiers, Instruction& instruction, Type type) {
  const bool paired = type == kF16x2 || type == kBF16x2, is_bf16 = type == kBF16 || type == kBF16x2;
  instruction.type = is_bf16 ? kBF16 : kF16;
  instruction.third = type;
  if (instruction.counted != Class::kSpecialFunction) instruction.counted = Class::kHalf;
  const int operation = instruction.a = operation_of(modifiers);
  if (operation < 0) return;
  const bool rounds = operation <= kFma;
  const bool has_rounding = rounds && modifiers.take("rn");
  if (operation == kFma && !has_rounding) modifiers.refuse("no rounding");
  if (operation == kEx2 && is_bf16) {
    instruction.flush = modifiers.take("ftz");
    if (!instruction.flush) return;  // 9.7.4.10: bf16 has this form only
  } else if (operation != kEx2 && operation != kTanh && !is_bf16) {
    instruction.flush = modifiers.take("ftz");
  }
  instruction.d = operation >= kMin && operation <= kMaxNan && take_xorsign(modifiers);
  instruction.b = rounds && !is_bf16 && modifiers.take("sat");
  instruction.c = operation == kFma && !instruction.b && modifiers.take("relu");
  instruction.handler = paired ? elements<2> : elements<1>;
}

}  // namespace fused_resnet::ptx
