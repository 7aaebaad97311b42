// State spaces: from an address to bytes.
#include "ptx/memory/places.h"

namespace fused_resnet::ptx {
namespace {

[[noreturn]] void out_of_bounds(Machine& machine, int lane, const char* space, u64 address, u32 bytes, u64 size) {
  machine.fault("out of bounds",
                format("lane %d: %u bytes at %#llx of %llu bytes of %s", lane, bytes,
                       static_cast<unsigned long long>(address), static_cast<unsigned long long>(size), space));
}

void check_alignment(Machine& machine, int lane, u64 address, u32 bytes) {
  if (address % std::min(bytes, 16u) != 0)
    machine.fault("misaligned",
                  format("lane %d: %u bytes at %#llx", lane, bytes, static_cast<unsigned long long>(address)));
}

Place in_local(Machine& machine, Warp& warp, int lane, u64 address, u32 bytes) {
  const u64 size = warp.block->grid->program->local_bytes;
  if (address >= kLocalWindow) address -= kLocalWindow;
  if (address + bytes > size) out_of_bounds(machine, lane, "local memory", address, bytes, size);
  check_alignment(machine, lane, address, bytes);
  return {kLocal, address};
}

Place in_parameters(Machine& machine, Warp& warp, int lane, u64 address, u32 bytes) {
  const u64 size = warp.block->grid->launch->parameter_bytes,
            base = reinterpret_cast<u64>(warp.block->grid->parameters);
  if (address >= base) address -= base;
  if (address + bytes > size) out_of_bounds(machine, lane, "parameters", address, bytes, size);
  check_alignment(machine, lane, address, bytes);
  return {kParam, address};
}

Place in_shared(Machine& machine, Warp& warp, u32 address) {
  const SharedPlace place = shared_place(machine, warp, address);
  return {kShared, place.address, place.block};
}

}  // namespace

Place locate(Machine& machine, Warp& warp, int lane, Space space, u64 address, u32 bytes) {
  const Grid& grid = *warp.block->grid;
  switch (space) {
    case kShared:
      return in_shared(machine, warp, static_cast<u32>(address));
    case kLocal:
      return in_local(machine, warp, lane, address, bytes);
    case kParam:
      return in_parameters(machine, warp, lane, address, bytes);
    case kGeneric: {  // 6.4.1.1
      const u64 parameters = reinterpret_cast<u64>(grid.parameters);
      if (address >= kSharedWindow && address < kLocalWindow)
        return in_shared(machine, warp, static_cast<u32>(address - kSharedWindow));
      if (address >= kLocalWindow && address < 2 * kLocalWindow) return in_local(machine, warp, lane, address, bytes);
      if (address >= parameters && address - parameters < grid.launch->parameter_bytes)
        return in_parameters(machine, warp, lane, address, bytes);
      return {kGlobal, address};
    }
    default:
      return {kGlobal, address};
  }
}

u64 location_key(const Place& place) {
  if (place.space != kShared) return place.address;
  return kSharedWindow + (u64(place.block->rank + 1) << kRankShift) + place.address;
}

u8* access(Machine& machine, Warp& warp, int lane, const Place& place, u32 bytes, bool is_write, Strength strength,
           const u8* value) {
  switch (place.space) {
    case kShared: {
      SharedMemory& shared = place.block->shared;
      const u32 address = static_cast<u32>(place.address);
      u8* at = shared.at(address, bytes);
      if (is_write)
        shared.write(warp, lane, address, bytes, Proxy::kGeneric, strength, value);
      else
        shared.read(warp, lane, address, bytes, Proxy::kGeneric, strength);
      return at;
    }
    case kLocal:
      return &warp.local[u64(lane) * warp.block->grid->program->local_bytes + place.address];
    case kParam:
      if (is_write) machine.fault("read-only", format("lane %d: write to the parameters", lane));
      return warp.block->grid->parameters + place.address;
    default:
      return machine.global(warp, lane, place.address, bytes, is_write, value, 0, strength);
  }
}

void Request::add(const Place& place, int lane) {
  const Lanes bit = Lanes(1) << lane;
  switch (place.space) {
    case kShared:
      in_shared_ |= bit;
      shared_[lane] = static_cast<u32>(place.address);
      break;
    case kLocal:
      in_local_ |= bit;
      break;
    case kParam:
      in_parameters_ |= bit;
      break;
    default:
      in_global_ |= bit;
      global_[lane] = place.address;
  }
}

void Request::count(Machine& machine, u32 bytes, bool is_write, bool is_atomic) const {
  PtxCounts& counts = machine.counts;
  if (in_global_) machine.count_global(global_, in_global_, bytes, is_write);
  if (in_shared_) machine.count_shared(shared_, in_shared_, bytes, is_write);
  if (is_atomic) {
    ++counts.atomics;
    return;
  }
  if (in_global_) ++(is_write ? counts.global_stores : counts.global_loads);
  if (in_shared_) ++(is_write ? counts.shared_stores : counts.shared_loads);
  if (in_local_) ++counts.local_accesses;
  if (in_parameters_) ++counts.parameter_loads;
}

Space take_space(Modifiers& modifiers) {
  static const Space kSpaces[] = {kGlobal, kShared, kShared, kShared, kLocal, kParam, kParam, kConst};
  const int space =
      modifiers.any({"global", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "const"});
  return space < 0 ? kGeneric : kSpaces[space];
}

Scope take_scope(Modifiers& modifiers) {
  static const Scope kTaken[] = {Scope::kWeak, Scope::kCta, Scope::kCluster, Scope::kGpu, Scope::kGpu};
  return kTaken[1 + modifiers.any({"cta", "cluster", "gpu", "sys"})];
}

Hints take_hints(Modifiers& modifiers) {
  Hints hints{};
  hints.evicts = modifiers.any({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
                                "L1::no_allocate"}) >= 0;
  hints.evicts_from_l2 = modifiers.any({"L2::evict_normal", "L2::evict_first", "L2::evict_last"}) >= 0;
  hints.evicts = hints.evicts || hints.evicts_from_l2;
  hints.prefetches = modifiers.any({"L2::64B", "L2::128B", "L2::256B"}) >= 0;
  hints.has_policy = modifiers.take("L2::cache_hint");
  return hints;
}

int take_vector(Modifiers& modifiers) {
  return 1 << (1 + modifiers.any({"v2", "v4", "v8"}));
}

}  // namespace fused_resnet::ptx
