// atom and red (PTX ISA 9.7.13.5, 9.7.13.6). The lanes of a warp come in any order.
#include "ptx/lanes/lanewise.h"
#include "ptx/memory/places.h"

namespace fused_resnet::ptx {
namespace {

enum Operation : int { kAnd, kOr, kXor, kExchange, kCas, kAdd, kInc, kDec, kMin, kMax };
constexpr int kMaxElements = 8;

template <class T>
u64 integer_result(Operation operation, T old, T b, T c) {
  switch (operation) {
    case kAnd:
      return bits(static_cast<T>(old & b));
    case kOr:
      return bits(static_cast<T>(old | b));
    case kXor:
      return bits(static_cast<T>(old ^ b));
    case kExchange:
      return bits(b);
    case kCas:
      return bits(old == b ? c : old);
    case kAdd:
      return bits(static_cast<T>(u64(old) + u64(b)));
    case kInc:
      return bits(static_cast<T>(old >= b ? 0 : old + 1));
    case kDec:
      return bits(static_cast<T>(old == 0 || old > b ? b : old - 1));
    case kMin:
      return bits(old < b ? old : b);
    case kMax:
      return bits(old > b ? old : b);
  }
  return 0;
}

// An f32 sum in global memory flushes subnormal numbers, one in shared memory does not.
u64 add_f32(float a, float b, bool flushes) {
  if (!flushes) return bits(std::isnan(a + b) ? canonical_nan() : a + b);
  const float sum = flush(flush(a) + flush(b));
  return bits(std::isnan(sum) ? canonical_nan() : sum);
}

u64 half_result(Type type, Operation operation, u64 old, u64 b) {
  const float x = float_of(type, old & 0xffff), y = float_of(type, b & 0xffff);
  if (operation == kAdd) return rounded(type, add_to_odd(x, y));
  return rounded(type, extremum(x, y, operation == kMax, false));
}

u64 result_of(const Instruction& instruction, bool in_shared, u64 old, u64 b, u64 c) {
  const auto operation = static_cast<Operation>(instruction.d);
  switch (const Type type = instruction.type) {
    case kB16:
      return integer_result<u16>(operation, static_cast<u16>(old), static_cast<u16>(b), static_cast<u16>(c));
    case kB32:
    case kU32:
      return integer_result<u32>(operation, static_cast<u32>(old), static_cast<u32>(b), static_cast<u32>(c));
    case kS32:
      return integer_result<s32>(operation, static_cast<s32>(old), static_cast<s32>(b), static_cast<s32>(c));
    case kS64:
      return integer_result<s64>(operation, old, b, c);
    case kF32:
      return add_f32(as<float>(old), as<float>(b), !in_shared);
    case kF64:
      return bits(as<double>(old) + as<double>(b));
    case kF16:
    case kBF16:
      return half_result(type, operation, old, b);
    case kF16x2:
    case kBF16x2:
      return half_result(type, operation, old, b) | half_result(type, operation, old >> 16, b >> 16) << 16;
    default:
      return integer_result<u64>(operation, old, b, c);
  }
}

// Vectors and packed types are atomic by element only.
Strength strength_of(const Instruction& instruction) {
  const Type type = instruction.type;
  const int size = type == kF16x2 || type == kBF16x2 ? 2 : size_of(type);
  return Strength(static_cast<Scope>(instruction.scope), size);
}

// An atomic that leaves what is there writes nothing (PTX ISA 8.4).
bool writes(const Instruction& instruction, const u8* data, u64 expected) {
  if (instruction.d != kCas) return true;
  return std::memcmp(data, &expected, size_of(instruction.type)) == 0;
}

// `a`: Space, `b`: Order, `c`: atom, not red, `d`: Operation.
void atomic_of_lane(Machine& machine, Warp& warp, const Instruction& instruction, int lane, const u64* const* values,
                    const u64* replacement, u64 (*old)[kLanes], Request& request) {
  const int address_at = instruction.c, elements = instruction.count(address_at + 1), size = size_of(instruction.type);
  const Place place = locate(machine, warp, lane, static_cast<Space>(instruction.a),
                             address(warp, instruction.at(address_at), lane), elements * size);
  if (place.space == kLocal || place.space == kParam) machine.fault("atomic", "neither in global nor in shared memory");
  const bool in_shared = place.space == kShared;
  if (in_shared && elements > 1) machine.fault("atomic", "a vector that is not in global memory");
  const int order = instruction.b;
  const Strength strength = strength_of(instruction);
  const u64 key = location_key(place);
  const u8* found = access(machine, warp, lane, place, elements * size, false, strength);
  u8* data = const_cast<u8*>(found);
  if (writes(instruction, found, values[0][lane])) {
    const bool releases = order == kRelease || order == kAcquireRelease;
    machine.write_strongly(warp, lane, key, strength.scope(), releases, true);
    data = access(machine, warp, lane, place, elements * size, true, strength);
  }
  request.add(place, lane);
  for (int k = 0; k < elements; ++k) {
    u64 value = 0;
    std::memcpy(&value, data + k * size, size);
    const u64 result = result_of(instruction, in_shared, value, values[k][lane], replacement[lane]);
    std::memcpy(data + k * size, &result, size);
    old[k][lane] = extended(instruction.type, value);
  }
  const bool acquires = order == kAcquire || order == kAcquireRelease;
  if (instruction.c) machine.read_strongly(warp, lane, key, strength.scope(), acquires);
}

void atomic(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const int source = instruction.c + 1, elements = instruction.count(source);
  u64 rooms[kMaxElements + 1][kLanes], old[kMaxElements][kLanes], sink[kLanes];
  const u64* values[kMaxElements];
  for (int k = 0; k < elements; ++k) values[k] = read(machine, warp, instruction.at(source, k), rooms[k]);
  const bool is_cas = instruction.d == kCas;
  const u64* replacement = is_cas ? read(machine, warp, instruction.at(source + 1), rooms[kMaxElements]) : values[0];
  Request request;
  const int first = machine.random(kLanes), step = machine.chance(2) ? 1 : kLanes - 1;
  for (int n = 0; n < kLanes; ++n) {
    const int lane = (first + n * step) % kLanes;
    if (mask >> lane & 1) atomic_of_lane(machine, warp, instruction, lane, values, replacement, old, request);
  }
  if (instruction.c)
    for (int k = 0; k < elements; ++k)
      store(destination(warp, instruction.at(0, k), sink), mask, [&](int l) { return old[k][l]; });
  request.count(machine, elements * size_of(instruction.type), true, true);
  if (instruction.c) machine.yields = true;  // it may be polling
}

bool is_half(Type type) {
  return type == kF16 || type == kBF16 || type == kF16x2 || type == kBF16x2;
}

bool has_operation(Operation operation, Type type, bool is_vector) {
  const bool is_integer = type == kU32 || type == kS32 || type == kU64 || type == kS64;
  const bool has_sum = type == kU32 || type == kS32 || type == kU64;
  switch (operation) {
    case kAnd:
    case kOr:
    case kXor:
      return type == kB32 || type == kB64;
    case kExchange:
      return type == kB32 || type == kB64;
    case kCas:
      return type == kB16 || type == kB32 || type == kB64;
    case kAdd:
      return has_sum || type == kF32 || type == kF64 || is_half(type);
    case kInc:
    case kDec:
      return type == kU32;
    default:
      return is_integer || (is_vector && is_half(type));
  }
}

Order take_order(Modifiers& modifiers, bool is_atom) {
  switch (modifiers.any({"relaxed", "release", "acquire", "acq_rel"})) {
    case 1:
      return kRelease;
    case 2:
      return is_atom ? kAcquire : kWeak;
    case 3:
      return is_atom ? kAcquireRelease : kWeak;
    default:
      return kRelaxed;
  }
}

void check_atomic_vector(const Modifiers& modifiers, const Instruction& instruction, int elements) {
  if (elements == 1) return;
  const Type type = instruction.type;
  const bool is_narrow = type == kF16 || type == kBF16;
  const bool suits = is_narrow || ((type == kF32 || type == kF16x2 || type == kBF16x2) && elements <= 4);
  if (!suits || (instruction.a != kGlobal && instruction.a != kGeneric)) modifiers.refuse("no such vector");
}

}  // namespace

void decode_atomic(Modifiers& modifiers, Instruction& instruction) {
  const bool is_atom = modifiers.name() == "atom";
  instruction.c = is_atom;
  instruction.b = take_order(modifiers, is_atom);
  if (instruction.b == kWeak) modifiers.refuse("a reduction reads nothing that it could acquire");
  const Scope scope = take_scope(modifiers);  // by default .gpu
  instruction.scope = static_cast<u8>(scope == Scope::kWeak ? Scope::kGpu : scope);
  instruction.a = take_space(modifiers);
  if (instruction.a > kShared) modifiers.refuse("an atomic in this space");
  instruction.d = modifiers.any({"and", "or", "xor", "exch", "cas", "add", "inc", "dec", "min", "max"});
  const bool has_policy = modifiers.take("L2::cache_hint"), keeps_subnormal = modifiers.take("noftz");
  const int elements = take_vector(modifiers);
  const Type type = instruction.type = modifiers.type();
  const auto operation = static_cast<Operation>(instruction.d);
  if (instruction.d < 0 || !has_operation(operation, type, elements > 1)) modifiers.refuse("no such operation");
  if (!is_atom && (operation == kExchange || operation == kCas)) modifiers.refuse("no such reduction");
  if (keeps_subnormal != is_half(type)) modifiers.refuse(".noftz");
  if (has_policy && (operation == kCas || instruction.a == kShared)) modifiers.refuse(".L2::cache_hint");
  check_atomic_vector(modifiers, instruction, elements);
  const std::string shape =
      std::string(is_atom ? "DmS" : "mS") + (operation == kCas ? "s" : "") + (has_policy ? "s" : "");
  expect_operands(modifiers, instruction, shape.c_str());
  if (instruction.count(is_atom + 1) != elements || (is_atom && instruction.count(0) != elements))
    modifiers.refuse("number of registers");
  instruction.handler = atomic;
}

}  // namespace fused_resnet::ptx
