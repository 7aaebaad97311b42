// st.async and red.async into the shared memory of a cluster (PTX ISA 9.7.9.12, 9.7.13.7). Their forms for global
// memory need sm_100 and are refused.
//
// A store is in flight until it lands, in any order. Then it counts its bytes at an mbarrier, in whose name it has
// written; a reduction is in its thread's own name. Both are of the generic proxy.
#include "ptx/copies/copies.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kMaxElements = 4;

void check_places(Machine& machine, const Warp& warp, const BulkCopy& store, const Block* of_mbarrier) {
  const Block* block = store.targets[0].block;
  if (block != of_mbarrier) machine.fault("mbarrier", "a store's mbarrier and its destination are in different blocks");
  if (store.reduction == Reduction::kNone && warp.block->cluster->blocks.size() == 1)
    machine.report("st.async", "in a cluster of one block");
  if (store.reduction != Reduction::kNone && block == warp.block)
    machine.report("red.async", "into the block's own shared memory; it must be another's of the cluster");
}

void begin(Machine& machine, Warp& warp, int lane, const BulkCopy& store) {
  const Target& target = store.targets[0];
  Mbarrier& barrier = live_mbarrier(machine, warp, lane, {target.block, target.mbarrier});
  if (target.block != warp.block) barrier.has_remote = true;
  u8* to = target.block->shared.at(target.address, store.bytes);
  if (store.reduction != Reduction::kNone) return;
  target.block->shared.begin_write(warp, lane, target.address, store.bytes, Proxy::kGeneric);
  std::memset(to, 0xff, store.bytes);  // poisoned until it lands
}

// type: of an element, a: elements, b: the space, d: the reduction.
void issue_stores(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  const u32 size = u32(size_of(i.type));
  u64 rooms[kMaxElements][kLanes];
  const u64* values[kMaxElements];
  for (int k = 0; k < i.a; ++k) values[k] = read(machine, warp, i.at(1, k), rooms[k]);
  FOR_ACTIVE(mask) {
    const SharedPlace place = place_of(machine, warp, Space(i.b), address(warp, i.at(0), l));
    const SharedPlace barrier = place_of(machine, warp, Space(i.b), address(warp, i.at(2), l));
    auto store = std::make_shared<BulkCopy>();
    store->route = Route::kFromRegisters;
    store->warp = &warp;
    store->lane = l;
    store->pc = machine.pc;
    store->bytes = u32(i.a) * size;
    store->reduction = Reduction(i.d);
    store->type = i.type;
    store->data.resize(store->bytes);
    for (int k = 0; k < i.a; ++k) std::memcpy(&store->data[u32(k) * size], &values[k][l], size);
    store->targets.push_back({place.block, place.address, barrier.address});
    check_places(machine, warp, *store, barrier.block);
    begin(machine, warp, l, *store);
    machine.pending.push_back(std::move(store));
  }
}

bool is_stored(Type type) {
  switch (type) {
    case kB32:
    case kB64:
    case kU32:
    case kU64:
    case kS32:
    case kS64:
    case kF32:
    case kF64:
      return true;
    default:
      return false;
  }
}

}  // namespace

void land_store(Machine& machine, const BulkCopy& store) {
  const Target& target = store.targets[0];
  if (target.block->has_exited)
    return machine.report("exit", "a store lands in the shared memory of a block that has exited");
  const auto found = target.block->mbarriers.find(target.mbarrier);
  if (found == target.block->mbarriers.end() || !found->second.alive)
    machine.fault("mbarrier", "a store completes on an mbarrier that is gone");
  Mbarrier& barrier = found->second;
  SharedMemory& shared = target.block->shared;
  u8* to = shared.at(target.address, store.bytes);
  if (store.reduction == Reduction::kNone) {
    std::memcpy(to, store.data.data(), store.bytes);
    shared.end_write(target.address, store.bytes, barrier.agent, time_of(barrier), Proxy::kGeneric, store.pc);
  } else {
    const Strength strength(Scope::kCluster, size_of(store.type));
    shared.write(*store.warp, store.lane, target.address, store.bytes, Proxy::kGeneric, strength);
    reduce(machine, store.reduction, store.type, to, store.data.data(), store.bytes);
    barrier.arriving.generic.add(store.warp->agent(store.lane), store.warp->own[store.lane] + 1);
  }
  complete_bytes(machine, barrier, store.bytes);
}

void decode_async_store(Modifiers& m, Instruction& i) {
  const bool is_reduction = m.name() == "red";
  if (!m.take("mbarrier::complete_tx::bytes")) m.refuse("no completion at an mbarrier");
  if (is_reduction && (!m.take("relaxed") || !m.take("cluster"))) m.refuse("without .relaxed.cluster");
  if (!is_reduction) m.take("weak");
  i.b = m.take("shared::cluster") ? kSharedCluster : kGenericSpace;
  i.d = s32(is_reduction ? take_reduction(m) : Reduction::kNone);
  const int vector = is_reduction ? -1 : m.any({"v2", "v4"});
  i.a = vector < 0 ? 1 : 2 << vector;
  i.type = m.type();
  const bool is_legal = is_reduction ? is_known(Reduction(i.d), i.type, false) : is_stored(i.type);
  if (!is_legal || i.a * size_of(i.type) > 16) m.refuse("type");
  i.handler = issue_stores;
  expect_operands(m, i, "mSm");
  if (i.count(1) != i.a) m.refuse("number of registers");
}

}  // namespace fused_resnet::ptx
