// Where an address leads: the state spaces of PTX (PTX ISA 5.1) and what an access to each of them checks.
#pragma once

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {

enum Space : int { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

// How an access orders others (PTX ISA 8.4). .volatile is .relaxed.sys.
enum Order : int { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };

struct Place {
  Space space;  // never kGeneric
  u64 address;  // global: the host's; shared, local, parameters: the offset
  Block* block = nullptr;
};
// Out of bounds of a space other than the global and the shared one is a fault.
Place locate(Machine& machine, Warp& warp, int lane, Space space, u64 address, u32 bytes);
u64 location_key(const Place& place);  // for Machine::write_strongly and read_strongly

// The bytes there, after all checks. `value`: what will be written, if known.
u8* access(Machine& machine, Warp& warp, int lane, const Place& place, u32 bytes, bool is_write, Strength strength,
           const u8* value = nullptr);

// One request of a warp: collected lane by lane, then counted.
class Request {
 public:
  void add(const Place& place, int lane);
  void count(Machine& machine, u32 bytes, bool is_write, bool is_atomic = false) const;

 private:
  u64 global_[kLanes];
  u32 shared_[kLanes];
  Lanes in_global_ = 0, in_shared_ = 0, in_local_ = 0, in_parameters_ = 0;
};

// Modifiers that loads, stores and atomics share. All of them are hints or say which space.
Space take_space(Modifiers& modifiers);
Scope take_scope(Modifiers& modifiers);  // kWeak: none
struct Hints {
  bool evicts, evicts_from_l2, prefetches, has_policy;  // the last: an operand with a cache policy follows
  bool has_any() const { return evicts || prefetches || has_policy; }
};
Hints take_hints(Modifiers& modifiers);
int take_vector(Modifiers& modifiers);              // 1, 2, 4 or 8
void decode_atomic(Modifiers&, Instruction&);       // atomics.cpp
void decode_async_store(Modifiers&, Instruction&);  // copies/async_stores.cpp

}  // namespace fused_resnet::ptx
