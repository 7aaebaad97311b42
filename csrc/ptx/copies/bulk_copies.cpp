// Bulk copies of contiguous bytes, and bulk groups (PTX ISA 9.7.9.25.4).
#include "ptx/copies/copies.h"

namespace fused_resnet::ptx {
namespace {

// Of the instruction, in b. The operand after the mbarrier is the multicast's ranks.
constexpr s32 kMulticast = 1, kOwnBlock = 2;

std::shared_ptr<BulkCopy> made(Machine& machine, Warp& warp, const Instruction& i, int lane, u32 bytes) {
  if (bytes % 16 != 0) machine.fault("misaligned", format("a bulk copy of %u bytes, no multiple of 16", bytes));
  if (bytes == 0) machine.fault("bulk copy", "of no bytes");
  auto copy = std::make_shared<BulkCopy>();
  copy->route = Route(i.a);
  copy->warp = &warp;
  copy->lane = lane;
  copy->pc = machine.pc;
  copy->bytes = bytes;
  copy->reduction = Reduction(i.d);
  copy->type = i.type;
  return copy;
}

void check_alignment(Machine& machine, u64 address, const char* space) {
  if (address % 16 != 0)
    machine.fault("misaligned", format("a bulk copy at %s %#llx, not of 16 bytes", space, (unsigned long long)address));
}

// Of a reduction the text does not say so.
void check_other_block(Machine& machine, const BulkCopy& copy) {
  if (copy.route == Route::kSharedToShared && copy.reduction == Reduction::kNone &&
      copy.targets[0].block == copy.warp->block)
    machine.report("bulk copy", "from a block's shared memory to its own; the destination must be in another block");
}

// 9.7.9.25.4.1, 9.7.9.25.4.2. a: the route, b: whether it is multicast and whose memory it goes to, d: the reduction.
void bulk_copy(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes], rank_room[kLanes];
  const u64* sizes = read(machine, warp, i.at(2), room);
  const u64* ranks = i.b & kMulticast ? read(machine, warp, i.at(4), rank_room) : nullptr;
  FOR_ACTIVE(mask) {
    auto copy = made(machine, warp, i, l, u32(sizes[l]));
    u64 global = 0;
    if (copy->route == Route::kGlobalToShared)
      global = address(warp, i.at(1), l);
    else
      copy->source = place_of(machine, warp, kSharedCta, address(warp, i.at(1), l)).address;
    if (copy->route == Route::kSharedToGlobal) {
      global = address(warp, i.at(0), l);
    } else {
      const u32 blocks = ranks == nullptr ? 0 : u32(ranks[l]) & 0xffff;
      if (ranks != nullptr && blocks == 0) machine.fault("bulk copy", "multicast to no block");
      copy->targets = targets_of(machine, warp, l, i, 0, 3, blocks, i.b & kOwnBlock);
      check_alignment(machine, copy->targets[0].address, "shared");
      check_other_block(machine, *copy);
    }
    check_alignment(machine, global, "global");
    check_alignment(machine, copy->source, "shared");
    copy->pieces.push_back({0, global, copy->bytes});
    issue(machine, std::move(copy));
  }
}

// 9.7.9.25.4.3: all that it changes is time.
void prefetch(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes];
  const u64* sizes = read(machine, warp, i.at(1), room);
  FOR_ACTIVE(mask) {
    check_alignment(machine, address(warp, i.at(0), l), "global");
    if (sizes[l] % 16 != 0) machine.fault("misaligned", "a bulk prefetch, no multiple of 16 bytes");
  }
}

// 9.7.9.25.4.4
void commit(Machine&, Warp& warp, const Instruction&, Lanes mask) {
  FOR_ACTIVE(mask) {
    const int thread = warp.id * kLanes + l;
    warp.block->bulk_groups[thread].push_back(std::move(warp.block->bulk_groups_open[thread]));
    warp.block->bulk_groups_open[thread].clear();
  }
}

// 9.7.9.25.4.5. a: how many groups may stay pending, b: .read.
void wait(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) wait_for_groups(machine, warp, l, size_t(i.a), i.b != 0);
}

void check_reduction(Modifiers& m, const Instruction& i, bool has_noftz) {
  const bool in_global = Route(i.a) == Route::kSharedToGlobal;
  if (!is_known(Reduction(i.d), i.type, in_global)) m.refuse("this reduction of this type");
  const bool is_half_sum = Reduction(i.d) == Reduction::kAdd && (i.type == kF16 || i.type == kBF16);
  if (has_noftz != is_half_sum) m.refuse(".noftz is of .add.f16 and .add.bf16");
}

void decode_copy_of_bytes(Modifiers& m, Instruction& i) {
  i.handler = bulk_copy;
  const bool is_store = m.take("bulk_group");
  const int num_hints = m.take("L2::cache_hint");
  if (is_store) {
    i.a = s32(Route::kSharedToGlobal);
    if (!m.take("global") || !m.take("shared::cta")) m.refuse("not from .shared::cta to .global");
    expect_operands(m, i, num_hints ? "mmss" : "mms");
  } else {
    if (!m.take("mbarrier::complete_tx::bytes")) m.refuse("no mechanism of completion");
    const bool to_cluster = m.take("shared::cluster"), to_block = m.take("shared::cta"), from_global = m.take("global");
    if (from_global == (to_cluster && to_block) || !(to_cluster || to_block)) m.refuse("its spaces");
    i.a = s32(from_global ? Route::kGlobalToShared : Route::kSharedToShared);
    const bool is_multicast = m.take("multicast::cluster");
    if ((is_multicast || num_hints) && !from_global) m.refuse("not from .global");
    if (is_multicast && !to_cluster) m.refuse("multicast is to .shared::cluster");
    i.b = is_multicast ? kMulticast : to_cluster ? 0 : kOwnBlock;
    const std::string more = std::string(is_multicast ? "s" : "") + (num_hints ? "s" : "");
    expect_operands(m, i, ("mmsm" + more).c_str());
  }
  if (Reduction(i.d) == Reduction::kNone) return;
  if (Route(i.a) == Route::kGlobalToShared) m.refuse("a reduction from .global");
  const bool has_noftz = m.take("noftz");
  i.type = m.type();
  check_reduction(m, i, has_noftz);
}

}  // namespace

void decode_bulk_copy(Modifiers& m, Instruction& i) {
  if (m.take("prefetch")) {
    if (m.take("tensor")) return decode_tensor_copy(m, i);
    if (!m.take("L2") || !m.take("global")) m.refuse();
    i.handler = prefetch;
    return expect_operands(m, i, m.take("L2::cache_hint") ? "mss" : "ms");
  }
  if (m.take("commit_group")) {
    i.handler = commit;
    i.counted = Class::kWait;
    return expect_operands(m, i, "");
  }
  if (m.take("wait_group")) {
    i.handler = wait;
    i.counted = Class::kWait;
    i.b = m.take("read");
    expect_operands(m, i, "i");
    i.a = s32(i.at(0).value);
    if (i.a < 0) m.refuse("a negative number of groups");
    return;
  }
  decode_copy_of_bytes(m, i);
}

}  // namespace fused_resnet::ptx
