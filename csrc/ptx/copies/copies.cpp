// What bulk and tensor copies have in common: how they begin, land and end (PTX ISA 9.7.9.25.4, 9.7.9.27).
//
// A copy is a list of pieces between global and shared memory. It begins with all checks of its places; from then on
// its destination is poisoned and in flight, and its source is in flight for reading. When it lands, in any order among
// those that are pending, the data move. A load then counts its bytes at an mbarrier, in whose name it has written. A
// store stays in flight until its thread's wait_group.
#include "ptx/copies/copies.h"

#include <algorithm>

#include "ptx/copies/tensor_maps.h"

namespace fused_resnet::ptx {
namespace {

// A copy lands while some other instruction runs; what it meets is reported where it was issued.
class Issuer {
 public:
  Issuer(Machine& machine, const BulkCopy& copy) : machine_(machine), pc_(machine.pc), warp_(machine.warp) {
    machine.pc = copy.pc;
    machine.warp = copy.warp;
  }
  ~Issuer() {
    machine_.pc = pc_;
    machine_.warp = warp_;
  }

 private:
  Machine& machine_;
  int pc_;
  Warp* warp_;
};

// Calls f(address, at, bytes) for the parts of [address, address + bytes) that stay together under the swizzle.
template <class F>
void for_chunks(u32 address, u32 bytes, int span, F f) {
  if (span == 0) return f(address, 0, bytes);
  for (u32 at = 0; at < bytes;) {
    const u32 chunk = std::min(bytes - at, 16 - (address + at) % 16);
    f(swizzled(address + at, span), at, chunk);
    at += chunk;
  }
}

bool is_load(const BulkCopy& copy) {
  return copy.route == Route::kGlobalToShared;
}

void fill(u8* to, u32 bytes, const BulkCopy& copy) {
  for (u32 k = 0; k < bytes; k += copy.fill_bytes) std::memcpy(to + k, &copy.fill, copy.fill_bytes);
}

// From global memory, or from what was taken from shared memory, into one block's shared memory.
void put_into_shared(Machine& machine, const BulkCopy& copy, const Target& target) {
  u8* base = target.block->shared.at(target.address, copy.bytes, 16);
  for (const Piece& piece : copy.pieces) {
    const u8* from = is_load(copy) ? reinterpret_cast<const u8*>(piece.global) : copy.data.data() + piece.offset;
    for_chunks(target.address + piece.offset, piece.bytes, copy.swizzle, [&](u32 address, u32 at, u32 bytes) {
      u8* to = base + (address - target.address);
      if (from == nullptr)
        fill(to, bytes, copy);
      else if (copy.reduction != Reduction::kNone)
        reduce(machine, copy.reduction, copy.type, to, from + at, bytes);
      else
        std::memcpy(to, from + at, bytes);
    });
  }
}

// The source's bytes, out of the swizzle; from now on the source may be written.
void take(BulkCopy& copy) {
  if (copy.is_taken || is_load(copy)) return;
  const u8* base = copy.warp->block->shared.at(copy.source, copy.bytes, 16);
  copy.data.resize(copy.bytes);
  for (const Piece& piece : copy.pieces)
    for_chunks(copy.source + piece.offset, piece.bytes, copy.swizzle, [&](u32 address, u32 at, u32 bytes) {
      std::memcpy(copy.data.data() + piece.offset + at, base + (address - copy.source), bytes);
    });
  copy.is_taken = true;
}

// 9.7.9.25.4.2: a reduction is relaxed at the scope of the GPU, element by element.
void put_into_global(Machine& machine, const BulkCopy& copy) {
  const bool is_reduction = copy.reduction != Reduction::kNone;
  const int in_flight = std::exchange(machine.copies_in_global, 0);  // its own destination is, of course
  for (const Piece& piece : copy.pieces) {
    if (piece.global == 0) continue;
    const u8* from = copy.data.data() + piece.offset;
    u8* to = machine.global(*copy.warp, copy.lane, piece.global, piece.bytes, true, is_reduction ? nullptr : from, 1,
                            is_reduction, Proxy::kAsync);
    if (is_reduction)
      reduce(machine, copy.reduction, copy.type, to, from, piece.bytes);
    else
      std::memcpy(to, from, piece.bytes);
  }
  machine.copies_in_global = in_flight;
}

void mark_pieces(Machine& machine, const BulkCopy& copy, int change) {
  for (const Piece& piece : copy.pieces)
    if (piece.global != 0) mark_in_global(machine, piece.global, piece.bytes, !is_load(copy), change);
}

void mark_map(Machine& machine, BulkCopy& copy, int change) {
  if (copy.map != 0) mark_in_global(machine, copy.map, kMapBytes, false, change);
  if (change < 0) copy.map = 0;
}

// The sectors of a copy, 32 pieces of one size at a time.
void count_sectors(Machine& machine, const BulkCopy& copy) {
  u64 addresses[kLanes];
  int n = 0;
  const auto flush = [&](u32 bytes) {
    if (n > 0) machine.count_global(addresses, n == kLanes ? kAllLanes : (1u << n) - 1, bytes, !is_load(copy));
    n = 0;
  };
  u32 bytes = 0;
  for (const Piece& piece : copy.pieces) {
    if (piece.global == 0) continue;
    if (n == kLanes || piece.bytes != bytes) flush(bytes);
    bytes = piece.bytes;
    addresses[n++] = piece.global;
  }
  flush(bytes);
}

void begin_load(Machine& machine, BulkCopy& copy) {
  for (const Piece& piece : copy.pieces)
    if (piece.global != 0)
      machine.global(*copy.warp, copy.lane, piece.global, piece.bytes, false, nullptr, 1, false, Proxy::kAsync);
}

// Whether another lane issues the same store in the same instruction, as all of a warp do in CUTLASS's epilogues.
bool is_repeated(const BulkCopy& copy) {
  const auto* open = &copy.warp->block->bulk_groups_open[copy.warp->id * kLanes];
  const auto same_place = [](const Piece& a, const Piece& b) { return a.global == b.global && a.bytes == b.bytes; };
  for (int lane = 0; lane < kLanes; ++lane)
    for (const auto& other : open[lane])
      if (lane != copy.lane && other->pc == copy.pc && other->source == copy.source &&
          std::equal(copy.pieces.begin(), copy.pieces.end(), other->pieces.begin(), other->pieces.end(), same_place))
        return true;
  return false;
}

void begin_store(Machine& machine, BulkCopy& copy) {
  const bool is_excepted = machine.copies_in_global == 0 || (machine.options.races < 2 && is_repeated(copy));
  for (const Piece& piece : copy.pieces) {
    if (piece.global == 0) continue;
    const Region* region = machine.region_of(piece.global, piece.bytes);
    if (region == nullptr)
      machine.fault("out of bounds",
                    format("a bulk copy of %u bytes to global %#llx", piece.bytes, (unsigned long long)piece.global));
    if (!region->writable) machine.fault("read-only", "a bulk copy to " + region->name);
    if (copy.reduction != Reduction::kNone) continue;
    if (!is_excepted) check_copies_in_global(machine, piece.global, piece.bytes, true);
    std::memset(reinterpret_cast<void*>(piece.global), 0xff, piece.bytes);
  }
}

void begin_target(Machine& machine, BulkCopy& copy, const Target& target) {
  Mbarrier& barrier = live_mbarrier(machine, *copy.warp, copy.lane, {target.block, target.mbarrier});
  if (copy.bytes > kMaxMbarrierCount)
    machine.fault("mbarrier count", format("a copy of %u bytes, more than an mbarrier counts", copy.bytes));
  if (target.block != copy.warp->block) barrier.has_remote = true;
  SharedMemory& shared = target.block->shared;
  u8* to = shared.at(target.address, copy.bytes, 16);
  if (copy.reduction != Reduction::kNone) return;
  shared.begin_write(*copy.warp, copy.lane, target.address, copy.bytes, Proxy::kAsync);
  std::memset(to, 0xff, copy.bytes);
}

Mbarrier& mbarrier_of(Machine& machine, const Target& target) {
  const auto found = target.block->mbarriers.find(target.mbarrier);
  if (found == target.block->mbarriers.end() || !found->second.alive)
    machine.fault("mbarrier", "a copy completes on an mbarrier that is gone");
  return found->second;
}

void land_in_shared(Machine& machine, BulkCopy& copy) {
  take(copy);
  if (copy.route == Route::kSharedToShared)
    copy.warp->block->shared.end_read(*copy.warp, copy.lane, copy.source, copy.bytes);
  else
    mark_pieces(machine, copy, -1);
  mark_map(machine, copy, -1);
  for (const Target& target : copy.targets) {
    if (target.block->has_exited) {
      machine.report("exit", "a copy lands in the shared memory of a block that has exited");
      continue;
    }
    Mbarrier& barrier = mbarrier_of(machine, target);
    if (copy.reduction != Reduction::kNone)
      target.block->shared.write(*copy.warp, copy.lane, target.address, copy.bytes, Proxy::kAsync, true);
    put_into_shared(machine, copy, target);
    if (copy.reduction == Reduction::kNone)
      target.block->shared.end_write(target.address, copy.bytes, barrier.agent, time_of(barrier), Proxy::kAsync,
                                     copy.pc);
    else  // reductions of several threads are in their own names
      barrier.arriving.generic.add(copy.warp->agent(copy.lane), copy.warp->own[copy.lane] + 1);
    complete_bytes(machine, barrier, copy.bytes);
  }
}

int thread_of(const BulkCopy& copy) {
  return copy.warp->id * kLanes + copy.lane;
}

// A wait for the source, .read or not, came true.
void free_source(Machine& machine, BulkCopy& copy) {
  take(copy);
  mark_map(machine, copy, -1);
  if (!copy.is_free) copy.warp->block->shared.end_read(*copy.warp, copy.lane, copy.source, copy.bytes);
  copy.is_free = true;
}

void finish_store(Machine& machine, BulkCopy& copy) {
  if (!copy.has_landed) {
    auto& pending = machine.pending;
    const auto found = std::find_if(pending.begin(), pending.end(), [&](const auto& p) { return p.get() == &copy; });
    const auto kept = *found;
    pending.erase(found);
    land(machine, copy);
  }
  mark_pieces(machine, copy, -1);
}

// The destination's space comes before the source's (the syntax in 9.7.9.25.4, 9.7.9.27.1).
void expect_direction(const Modifiers& m) {
  const bool is_store = m.peek("bulk_group");
  for (const char* space : {"shared::cluster", "shared::cta"})
    if (m.peek("global") && m.peek(space) && m.precedes("global", space) != is_store)
      m.refuse("the destination's space comes first");
  if (m.precedes("shared::cta", "shared::cluster")) m.refuse("the destination's space comes first");
}

}  // namespace

u32 swizzled(u32 address, int span) {
  const u32 mask = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

void issue(Machine& machine, std::shared_ptr<BulkCopy> copy) {
  SharedMemory& own = copy->warp->block->shared;
  if (copy->route != Route::kGlobalToShared) {
    own.at(copy->source, copy->bytes, 16);
    own.begin_read(*copy->warp, copy->lane, copy->source, copy->bytes, Proxy::kAsync);
  }
  for (const Target& target : copy->targets) begin_target(machine, *copy, target);
  if (copy->route == Route::kGlobalToShared) begin_load(machine, *copy);
  if (copy->route == Route::kSharedToGlobal) begin_store(machine, *copy);
  if (copy->route != Route::kSharedToShared) {
    mark_pieces(machine, *copy, 1);
    mark_map(machine, *copy, 1);
    count_sectors(machine, *copy);
    machine.counts.bulk_bytes += copy->bytes;
  }
  if (copy->route == Route::kSharedToGlobal) copy->warp->block->bulk_groups_open[thread_of(*copy)].push_back(copy);
  machine.pending.push_back(std::move(copy));
}

void land(Machine& machine, BulkCopy& copy) {
  const Issuer issuer(machine, copy);
  copy.has_landed = true;
  switch (copy.route) {
    case Route::kArrival:
      return land_arrival(machine, copy);
    case Route::kFromRegisters:
      return land_store(machine, copy);
    case Route::kSharedToGlobal:
      take(copy);
      return put_into_global(machine, copy);
    default:
      return land_in_shared(machine, copy);
  }
}

void wait_for_groups(Machine& machine, Warp& warp, int lane, size_t may_stay, bool only_read) {
  auto& groups = warp.block->bulk_groups[warp.id * kLanes + lane];
  const size_t over = groups.size() > may_stay ? groups.size() - may_stay : 0;
  for (size_t k = 0; k < over; ++k)
    for (auto& copy : groups[k]) {
      free_source(machine, *copy);
      if (!only_read) finish_store(machine, *copy);
    }
  if (!only_read) groups.erase(groups.begin(), groups.begin() + over);
}

void finish_copies(Machine& machine, Cluster& cluster) {
  const auto is_here = [&](const std::shared_ptr<BulkCopy>& copy) { return copy->warp->block->cluster == &cluster; };
  const auto first = std::stable_partition(machine.pending.begin(), machine.pending.end(),
                                           [&](const auto& copy) { return !is_here(copy); });
  const std::vector<std::shared_ptr<BulkCopy>> left(first, machine.pending.end());
  machine.pending.erase(first, machine.pending.end());
  for (const auto& copy : left) {
    const Issuer issuer(machine, *copy);
    if (copy->route == Route::kSharedToGlobal) {
      land(machine, *copy);
    } else if (copy->route != Route::kArrival || has_copies_in_flight(*copy)) {
      machine.report("exit", "the block ends with copies that nobody has waited for");
      if (is_load(*copy)) mark_pieces(machine, *copy, -1);
      mark_map(machine, *copy, -1);
    }
  }
  for (const auto& block : cluster.blocks)
    for (int thread = 0; thread < block->num_threads; ++thread) {
      for (const auto& copy : block->bulk_groups_open[thread]) mark_pieces(machine, *copy, -1);
      for (const auto& group : block->bulk_groups[thread])
        for (const auto& copy : group) mark_pieces(machine, *copy, -1);
    }
}

void mark_in_global(Machine& machine, u64 address, u32 bytes, bool is_write, int change) {
  if (machine.options.races == 0) return;
  Region* region = machine.region_of(address, bytes);
  if (region == nullptr || !region->writable) return;
  auto& marks = is_write ? region->writes_in_flight : region->reads_in_flight;
  if (marks.empty()) marks.resize(region->size);
  for (u64 k = address - region->base; k < address - region->base + bytes; ++k) marks[k] += change;
  machine.copies_in_global += change;
}

void check_copies_in_global(Machine& machine, u64 address, u32 bytes, bool is_write) {
  const Region* region = machine.region_of(address, bytes);
  if (region == nullptr) return;
  const u64 begin = address - region->base;
  for (u64 k = begin; k < begin + bytes; ++k) {
    if (!region->writes_in_flight.empty() && region->writes_in_flight[k] > 0)
      return machine.report("copy in flight",
                            format("%s %s+%llu, which a bulk copy is writing: no wait_group yet",
                                   is_write ? "writes" : "reads", region->name.c_str(), (unsigned long long)k));
    if (is_write && !region->reads_in_flight.empty() && region->reads_in_flight[k] > 0)
      return machine.report("copy in flight", format("writes %s+%llu, which an asynchronous copy is reading",
                                                     region->name.c_str(), (unsigned long long)k));
  }
}

// A source that is still to be read would go with the block. That the data arrive is the grid's end to see to.
void check_copies_at_exit(Machine& machine, Warp& warp, Lanes exiting) {
  check_cp_async_at_exit(machine, warp, exiting);
  FOR_ACTIVE(exiting) {
    const int thread = warp.id * kLanes + l;
    if (!warp.block->bulk_groups_open[thread].empty())
      return machine.report("exit", "a thread ends with bulk copies from shared memory in no group");
    for (const auto& group : warp.block->bulk_groups[thread])
      for (const auto& copy : group)
        if (!copy->is_free || machine.options.races > 1)
          return machine.report("exit", "a thread ends with bulk copies from shared memory that it has not waited for");
  }
}

std::vector<Target> targets_of(Machine& machine, Warp& warp, int lane, const Instruction& i, int to, int mbarrier,
                               u32 ranks, bool own) {
  const SharedPlace place = place_of(machine, warp, kSharedCluster, address(warp, i.at(to), lane));
  const SharedPlace barrier = place_of(machine, warp, kSharedCluster, address(warp, i.at(mbarrier), lane));
  if (own && place.block != warp.block)
    machine.fault("out of bounds", "a destination in .shared::cta lies in another block of the cluster");
  if (ranks == 0) {
    if (place.block != barrier.block)
      machine.fault("mbarrier", "a copy's mbarrier and its destination are in different blocks");
    return {{place.block, place.address, barrier.address}};
  }
  std::vector<Target> targets;
  for (u32 rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block* block = machine.block_of_rank(warp, rank);
    if (block == nullptr) machine.fault("out of bounds", format("multicast to a block of rank %u", rank));
    targets.push_back({block, place.address, barrier.address});
  }
  return targets;
}

void decode_copy(Modifiers& m, Instruction& i) {
  if (m.name() != "cp") m.refuse();
  const bool is_reduction = m.take("reduce");
  if (!m.take("async")) m.refuse();
  if (!m.take("bulk")) {
    if (is_reduction) m.refuse();
    return decode_cp_async(m, i);
  }
  expect_direction(m);
  i.counted = Class::kBulkCopy;
  i.d = s32(is_reduction ? take_reduction(m) : Reduction::kNone);
  if (m.take("tensor")) return decode_tensor_copy(m, i);
  decode_bulk_copy(m, i);
}

}  // namespace fused_resnet::ptx
