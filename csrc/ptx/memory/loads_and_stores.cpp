// Loads, stores and prefetches (PTX ISA 9.7.9.8 to 9.7.9.16).
#include "ptx/memory/places.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kMaxElements = 8, kMaxBytes = 32;

Strength strength_of(const Instruction& instruction) {
  return Strength(static_cast<Scope>(instruction.scope), size_of(instruction.type));
}

// `a`: Space, `b`: Order, `c`: .nc, `d`: elements. `type`: of an element.
void load(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const Type type = instruction.type;
  const int elements = instruction.d, size = size_of(type);
  const u32 bytes = elements * size;
  const Strength strength = strength_of(instruction);
  u64 values[kMaxElements][kLanes], sink[kLanes];
  Request request;
  FOR_ACTIVE(mask) {
    const u64 from = address(warp, instruction.at(1), l);
    const Place place = locate(machine, warp, l, static_cast<Space>(instruction.a), from, bytes);
    const u8* data = access(machine, warp, l, place, bytes, false, strength);
    if (instruction.c && machine.is_written_by_grid(warp, place.address, bytes))
      machine.report("ld.nc", format("lane %d reads, as if it were constant, what the grid has written", l));
    request.add(place, l);
    for (int k = 0; k < elements; ++k) {
      u64 value = 0;
      std::memcpy(&value, data + k * size, size);
      values[k][l] = extended(type, value);
    }
    if (!strength.is_weak())
      machine.read_strongly(warp, l, location_key(place), strength.scope(), instruction.b == kAcquire);
  }
  for (int k = 0; k < elements; ++k)
    store(destination(warp, instruction.at(0, k), sink), mask, [&](int l) { return values[k][l]; });
  request.count(machine, bytes, false);
  if (!strength.is_weak()) machine.yields = true;  // it may be polling
}

void store_to_memory(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  const int elements = instruction.d, size = size_of(instruction.type);
  const u32 bytes = elements * size;
  const Strength strength = strength_of(instruction);
  u64 rooms[kMaxElements][kLanes];
  const u64* values[kMaxElements];
  for (int k = 0; k < elements; ++k) values[k] = read(machine, warp, instruction.at(1, k), rooms[k]);
  Request request;
  FOR_ACTIVE(mask) {
    u8 data[kMaxBytes];
    for (int k = 0; k < elements; ++k) std::memcpy(data + k * size, &values[k][l], size);
    const u64 to = address(warp, instruction.at(0), l);
    const Place place = locate(machine, warp, l, static_cast<Space>(instruction.a), to, bytes);
    if (!strength.is_weak())
      machine.write_strongly(warp, l, location_key(place), strength.scope(), instruction.b == kRelease, false);
    std::memcpy(access(machine, warp, l, place, bytes, true, strength, data), data, bytes);
    request.add(place, l);
  }
  request.count(machine, bytes, true);
}

void nothing(Machine&, Warp&, const Instruction&, Lanes) {}

enum Kind : int { kNone = -1, kWeakly, kVolatile, kRelaxedly, kInOrder };

// .weak, .volatile, .relaxed, .acquire and .release, with a scope where one is due (9.7.9.8).
Kind take_order(Modifiers& modifiers, Instruction& instruction, bool is_load) {
  const auto kind = static_cast<Kind>(modifiers.any({"weak", "volatile", "relaxed", is_load ? "acquire" : "release"}));
  instruction.b = kind <= kWeakly ? kWeak : kind != kInOrder ? kRelaxed : is_load ? kAcquire : kRelease;
  Scope scope = kind == kVolatile ? Scope::kGpu : Scope::kWeak;
  if (kind >= kRelaxedly) scope = take_scope(modifiers);
  if (kind >= kRelaxedly && scope == Scope::kWeak) modifiers.refuse("no scope");
  instruction.scope = static_cast<u8>(scope);
  return kind;
}

bool is_memory_type(Type type) {
  switch (type) {
    case kPred:
    case kE4M3:
    case kE5M2:
    case kE4M3x2:
    case kE5M2x2:
    case kTF32:
    case kF16:
    case kBF16:
    case kF16x2:
    case kBF16x2:
    case kU16x2:
    case kS16x2:
    case kB128:  // registers here have 64 bits
    case kNoType:
      return false;
    default:
      return true;
  }
}

// Vectors have at most 16 bytes; 32 in global memory, of words of 32 or 64 bits.
void check_vector(const Modifiers& modifiers, const Instruction& instruction) {
  const int size = size_of(instruction.type), bytes = instruction.d * size;
  const bool wide = bytes == 32 && size >= 4 && (instruction.a == kGlobal || instruction.a == kGeneric);
  if (bytes > 16 && !wide) modifiers.refuse(format("%d bytes a lane", bytes));
  if (instruction.d == 8 && !wide) modifiers.refuse(".v8 of this type");
}

void decode_load_or_store(Modifiers& modifiers, Instruction& instruction) {
  const bool is_uniform = modifiers.name() == "ldu", is_load = modifiers.name() != "st";
  const bool is_of_system = modifiers.peek("sys"), is_mmio = modifiers.take("mmio");
  const Kind kind = take_order(modifiers, instruction, is_load);
  if (is_mmio && (kind != kRelaxedly || !is_of_system)) modifiers.refuse(".mmio without .relaxed.sys");
  instruction.a = take_space(modifiers);
  instruction.c = is_uniform || (is_load && modifiers.take("nc"));
  const int cache = is_load ? modifiers.any({"ca", "cg", "cs", "lu", "cv"}) : modifiers.any({"wb", "cg", "cs", "wt"});
  const Hints hints = take_hints(modifiers);
  instruction.d = take_vector(modifiers);
  instruction.type = modifiers.type();
  const bool in_global = instruction.a == kGlobal || instruction.a == kGeneric;
  const bool is_memory = in_global || instruction.a == kShared;
  if (kind == kVolatile && instruction.a == kLocal) {  // PTX ISA 9.1: no other thread sees it
    instruction.b = kWeak;
    instruction.scope = 0;
  }
  if ((hints.has_policy || hints.prefetches) && !in_global) modifiers.refuse(".L2 hints are for .global");
  if (hints.evicts && (kind == kVolatile || cache >= 0)) modifiers.refuse("two hints of how to cache");
  if (is_mmio && (!in_global || instruction.d > 1 || hints.has_any())) modifiers.refuse("such a form of .mmio");
  if (hints.evicts_from_l2 && instruction.d * size_of(instruction.type) != kMaxBytes)
    modifiers.refuse(".L2 eviction is of 32 bytes a lane");
  if (!is_memory_type(instruction.type)) modifiers.refuse(std::string("type .") + name_of(instruction.type));
  if (instruction.b != kWeak && (!is_memory || cache >= 0 || instruction.c)) modifiers.refuse("no such strong access");
  if (instruction.c && !is_uniform && instruction.a != kGlobal) modifiers.refuse(".nc is for .global");
  if (!is_load && (instruction.a == kParam || instruction.a == kConst)) modifiers.refuse("a store to this space");
  check_vector(modifiers, instruction);
  expect_operands(modifiers, instruction, (std::string(is_load ? "Dm" : "mS") + (hints.has_policy ? "s" : "")).c_str());
  if (instruction.count(is_load ? 0 : 1) != instruction.d) modifiers.refuse("number of registers");
  instruction.handler = is_load ? load : store_to_memory;
}

// Hints: nothing is moved. `discard`, which may lose data, is not known here.
void decode_prefetch(Modifiers& modifiers, Instruction& instruction) {
  take_space(modifiers);
  if (modifiers.name() == "applypriority") {
    if (!modifiers.take("L2::evict_normal")) modifiers.refuse();
    expect_operands(modifiers, instruction, "mi");
  } else {
    if (modifiers.any({"L1", "L2", "L2::evict_last", "L2::evict_normal", "tensormap"}) < 0)
      modifiers.refuse("no level");
    expect_operands(modifiers, instruction, "m");
  }
  instruction.handler = nothing;
}

}  // namespace

void decode_memory(Modifiers& modifiers, Instruction& instruction) {
  const std::string& name = modifiers.name();
  if ((name == "st" || name == "red") && modifiers.take("async")) return decode_async_store(modifiers, instruction);
  if (name == "ld" || name == "ldu" || name == "st") return decode_load_or_store(modifiers, instruction);
  if (name == "atom" || name == "red") return decode_atomic(modifiers, instruction);
  if (name == "prefetch" || name == "prefetchu" || name == "applypriority") decode_prefetch(modifiers, instruction);
}

}  // namespace fused_resnet::ptx
