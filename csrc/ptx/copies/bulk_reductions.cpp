// What cp.reduce.async.bulk does to an element (PTX ISA 9.7.9.25.4.2).
#include <algorithm>
#include <numeric>

#include "ptx/copies/copies.h"

namespace fused_resnet::ptx {
namespace {

template <class T>
T combine(Reduction reduction, T old, T value) {
  switch (reduction) {
    case Reduction::kAdd:
      return T(old + value);
    case Reduction::kMin:
      return std::min(old, value);
    case Reduction::kMax:
      return std::max(old, value);
    case Reduction::kInc:
      return old >= value ? T(0) : T(old + 1);
    case Reduction::kDec:
      return old == 0 || old > value ? value : T(old - 1);
    case Reduction::kAnd:
      return T(old & value);
    case Reduction::kOr:
      return T(old | value);
    default:
      return T(old ^ value);
  }
}

// min and max prefer a number to NaN.
double combine_floats(Reduction reduction, double old, double value) {
  if (reduction == Reduction::kAdd) return old + value;
  return reduction == Reduction::kMin ? std::fmin(old, value) : std::fmax(old, value);
}

float without_subnormals(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

template <class T>
void apply(Reduction reduction, u8* to, const u8* from) {
  T old, value;
  std::memcpy(&old, to, sizeof old);
  std::memcpy(&value, from, sizeof value);
  old = combine<T>(reduction, old, value);
  std::memcpy(to, &old, sizeof old);
}

// The sum of two 16-bit floats, in fp64 without an error, is rounded once; of fp32 subnormals are flushed.
void apply_floats(Reduction reduction, Type type, u8* to, const u8* from) {
  u64 old = 0, value = 0;
  const int size = size_of(type);
  std::memcpy(&old, to, size);
  std::memcpy(&value, from, size);
  if (type == kF64) {
    old = bits(combine_floats(reduction, as<double>(old), as<double>(value)));
  } else if (type == kF32) {
    const float sum = without_subnormals(as<float>(old)) + without_subnormals(as<float>(value));
    old = bits(std::isnan(sum) ? canonical_nan() : without_subnormals(sum));
  } else {
    old = rounded(type, combine_floats(reduction, float_of(type, u32(old)), float_of(type, u32(value))));
  }
  std::memcpy(to, &old, size);
}

void apply_one(Reduction reduction, Type type, u8* to, const u8* from) {
  switch (type) {
    case kS32:
      // a sum wraps around
      return reduction == Reduction::kAdd ? apply<u32>(reduction, to, from) : apply<s32>(reduction, to, from);
    case kU32:
    case kB32:
      return apply<u32>(reduction, to, from);
    case kS64:
      return reduction == Reduction::kAdd ? apply<u64>(reduction, to, from) : apply<s64>(reduction, to, from);
    case kU64:
    case kB64:
      return apply<u64>(reduction, to, from);
    default:
      return apply_floats(reduction, type, to, from);
  }
}

}  // namespace

Reduction take_reduction(Modifiers& modifiers) {
  const int found = modifiers.any({"add", "min", "max", "inc", "dec", "and", "or", "xor"});
  if (found < 0) modifiers.refuse("no reduction");
  return Reduction(found);
}

bool is_known(Reduction reduction, Type t, bool in_global) {
  const bool is_half = in_global && (t == kF16 || t == kBF16);
  switch (reduction) {
    case Reduction::kAdd:
      return t == kU32 || t == kS32 || t == kU64 || (in_global && (t == kF32 || t == kF64)) || is_half;
    case Reduction::kMin:
    case Reduction::kMax:
      return t == kU32 || t == kS32 || (in_global && (t == kU64 || t == kS64)) || is_half;
    case Reduction::kInc:
    case Reduction::kDec:
      return t == kU32;
    default:
      return t == kB32 || (in_global && t == kB64);
  }
}

void reduce(Machine& machine, Reduction reduction, Type type, u8* to, const u8* from, u32 bytes) {
  const u32 size = u32(size_of(type));
  std::vector<u32> order(bytes / size);
  std::iota(order.begin(), order.end(), 0);
  for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[machine.random(u32(k))]);
  for (const u32 k : order) apply_one(reduction, type, to + k * size, from + k * size);
}

}  // namespace fused_resnet::ptx
