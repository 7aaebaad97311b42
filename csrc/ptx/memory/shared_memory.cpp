// Accesses to shared memory: bounds, alignment, races, proxies, and what is in flight.
#include <algorithm>

#include "ptx/machine/operands.h"
#include "ptx/memory/shadow.h"

namespace fused_resnet::ptx {
namespace {

using Cell = Shadow::Cell;
using Reader = Shadow::Reader;
using Entry = Shadow::Entry;

// Who accesses: a lane, or all lanes of a warp, each of which must have seen what came before.
struct Accessor {
  Machine& machine;
  Warp& warp;
  Lanes lanes;
  Proxy proxy;
  Strength strength;
  bool is_strict;
  const Block& owner;
  const u8* value;  // what is written, or null
  const u8* bytes;  // of the memory, from address 0

  bool is_remote() const { return warp.block != &owner; }
  // Whether it may meet an access by the agent, unordered (PTX ISA 8.7).
  bool may_meet(Agent agent, Strength other, Proxy other_proxy) const {
    const Block& own = *warp.block;
    const bool is_near = agent >= own.first_agent && agent - own.first_agent < u32(own.num_warps) * kLanes;
    return proxy == other_proxy && are_morally_strong(strength, other, is_near ? Scope::kCta : Scope::kCluster);
  }

  bool has_seen(Agent agent, Time time) const {
    const View* last = nullptr;
    for (Lanes left = lanes; left != 0; left &= left - 1) {
      const int l = __builtin_ctz(left);
      const View& view = warp.views[l].generic;
      if (agent == warp.agent(l) || (last != nullptr && last->is_same(view))) continue;
      if (!view.has_seen(agent, time)) return false;
      last = &view;
    }
    return true;
  }
  // Whether a fence.proxy.async lies between what the agent did through the generic proxy and us (PTX ISA 8.9.1.1).
  bool is_fenced(Agent agent, Time time) const {
    const View* last = nullptr;
    for (Lanes left = lanes; left != 0; left &= left - 1) {
      const View& view = warp.views[__builtin_ctz(left)].async;
      if (last != nullptr && last->is_same(view)) continue;
      if (!view.has_seen(agent, time)) return false;
      last = &view;
    }
    return true;
  }
  // Whether the bytes are there already: whoever comes first, nobody sees a difference.
  bool is_same(const Entry& entry) const {
    return value != nullptr && !is_strict && std::memcmp(bytes + entry.address, value, entry.bytes) == 0;
  }
  std::string name() const {
    const std::string whose = is_remote() ? format("of block %u ", owner.index) : "";
    return lanes == (lanes & -lanes) ? format("lane %d, shared %s", __builtin_ctz(lanes), whose.c_str())
                                     : "the warp, shared " + whose;
  }
};

bool same_warp(const Accessor& who, Agent agent) {
  const Agent first = who.warp.agent(0);
  return agent >= first && agent < first + kLanes;
}

std::string writer_of(const Accessor& who, const Cell& cell) {
  const auto& program = who.warp.block->grid->program->instructions;
  const int line = cell.pc >= 0 && cell.pc < static_cast<int>(program.size()) ? program[cell.pc].line : -1;
  return who.machine.name_of(cell.agent) + format(" (line %d)", line);
}

void report_race(const Accessor& who, Agent agent, const std::string& what) {
  who.machine.report(same_warp(who, agent) ? "intra-warp race" : "race", what);
}

void report_in_flight(const Accessor& who, const Entry& entry, const char* kind, const char* what) {
  who.machine.report(kind, who.name() + format("%u ", entry.address) + what +
                               (entry.cell.writes_in_flight > 0 ? ": " + who.machine.where(entry.cell.pc) : ""));
}

void check_guard(const Accessor& who, const Entry& entry) {
  if (entry.cell.has(Shadow::kGuarded))
    who.machine.report("mbarrier", who.name() + format("%u is part of an mbarrier: only mbarrier operations may access "
                                                       "it (PTX ISA 9.7.13.15.1)",
                                                       entry.address));
}

void check_read(const Accessor& who, const Entry& entry) {
  const Cell& cell = entry.cell;
  check_guard(who, entry);
  if (cell.writes_in_flight > 0) {
    report_in_flight(who, entry, "read in flight", "is read while an asynchronous write to it has not been waited for");
  } else if (cell.agent == kNobody) {
    who.machine.report("uninitialised", who.name() + format("%u is read, which nobody wrote", entry.address));
  } else if (who.may_meet(cell.agent, cell.strength, cell.proxy)) {
    return;
  } else if (!who.has_seen(cell.agent, cell.time)) {
    report_race(who, cell.agent,
                who.name() + format("%u is read without synchronisation with its write by ", entry.address) +
                    writer_of(who, cell));
  } else if (who.proxy == Proxy::kAsync && cell.proxy == Proxy::kGeneric && !who.is_fenced(cell.agent, cell.time)) {
    who.machine.report("proxy", who.name() +
                                    format("%u is read through the async proxy, without fence.proxy.async after "
                                           "the write by ",
                                           entry.address) +
                                    writer_of(who, cell));
  }
}

void check_writer(const Accessor& who, const Entry& entry) {
  const Cell& cell = entry.cell;
  if (cell.agent == kNobody || who.may_meet(cell.agent, cell.strength, cell.proxy)) return;
  if (!who.has_seen(cell.agent, cell.time)) {
    const bool is_same =
        who.value != nullptr && !who.is_strict && std::memcmp(who.bytes + entry.address, who.value, entry.bytes) == 0;
    if (!is_same)
      report_race(who, cell.agent,
                  who.name() + format("%u is overwritten without synchronisation with its write by ", entry.address) +
                      writer_of(who, cell));
  } else if (who.proxy == Proxy::kAsync && cell.proxy == Proxy::kGeneric && !who.is_fenced(cell.agent, cell.time)) {
    who.machine.report("proxy", who.name() +
                                    format("%u is overwritten through the async proxy, without "
                                           "fence.proxy.async after the write by ",
                                           entry.address) +
                                    writer_of(who, cell));
  }
}

void check_reader(const Accessor& who, u32 address, Agent agent, Time time, Proxy proxy, Strength strength) {
  if (who.may_meet(agent, strength, proxy)) return;
  if (!who.has_seen(agent, time))
    report_race(who, agent,
                who.name() + format("%u is overwritten, which may not have been read yet by ", address) +
                    who.machine.name_of(agent));
  else if (who.is_strict && who.proxy == Proxy::kAsync && proxy == Proxy::kGeneric && !who.is_fenced(agent, time))
    who.machine.report("proxy", who.name() +
                                    format("%u is overwritten through the async proxy, without "
                                           "fence.proxy.async after the read by ",
                                           address) +
                                    who.machine.name_of(agent));
}

// `known`: slots of a neighbour that have just been checked, or null.
void check_readers(const Accessor& who, Shadow& shadow, const Entry& entry, const Reader* known) {
  if (!entry.cell.has(Shadow::kWasRead)) return;
  for (int slot = 0; slot < shadow.slots(); ++slot) {
    const Reader& reader = entry.readers[slot];
    if (reader.time == 0 || (known != nullptr && known[slot] == reader)) continue;
    if (slot >= shadow.warps()) {
      check_reader(who, entry.address, who.owner.warpgroup_agents[slot - shadow.warps()], reader.time, reader.proxy,
                   reader.strength);
      continue;
    }
    const Warp& warp = *who.owner.warps[slot];
    for (Lanes left = reader.lanes; left != 0; left &= left - 1)
      check_reader(who, entry.address, warp.agent(__builtin_ctz(left)), reader.time, reader.proxy, reader.strength);
  }
  if (entry.cell.has(Shadow::kHasMoreReaders))
    for (const auto& other : shadow.others(entry))
      check_reader(who, entry.address, other.agent, other.time, other.proxy, other.strength);
}

void check_write(Accessor who, Shadow& shadow, u32 address, u32 bytes) {
  const u8* value = who.value;
  const Cell* last = nullptr;
  const Reader* known = nullptr;
  shadow.visit(address, bytes, [&](const Entry& entry) {
    const Cell& cell = entry.cell;
    if (value != nullptr) who.value = value + (entry.address - address);
    if (last == nullptr || !last->is_written_like(cell)) {
      check_guard(who, entry);
      if (cell.writes_in_flight > 0)
        report_in_flight(who, entry, "write in flight", "is written while an asynchronous write to it is under way");
      if (cell.reads_in_flight > 0)
        report_in_flight(who, entry, "overwritten in flight",
                         "is overwritten while asynchronous work that reads it has not been waited for");
      if (cell.writes_in_flight == 0) check_writer(who, entry);
    }
    check_readers(who, shadow, entry, known);
    // what was let pass for its value says nothing of the next
    last = who.is_same(entry) ? nullptr : &cell;
    known = cell.has(Shadow::kWasRead) ? entry.readers : nullptr;
  });
}

void check_reads(const Accessor& who, Shadow& shadow, u32 address, u32 bytes) {
  const Cell* last = nullptr;
  shadow.visit(address, bytes, [&](const Entry& entry) {
    if (last == nullptr || !last->is_written_like(entry.cell)) check_read(who, entry);
    last = &entry.cell;
  });
}

void add_other(Shadow& shadow, const Entry& entry, const Shadow::OtherReader& reader) {
  entry.cell.flags |= Shadow::kHasMoreReaders;
  auto& others = shadow.others(entry);
  for (auto& known : others) {
    if (known.agent != reader.agent || known.strength != reader.strength) continue;
    known = reader;
    return;
  }
  others.push_back(reader);
}

bool all_seen(const Warp& warp, int lane, const Reader& reader) {
  for (Lanes left = reader.lanes & ~(1u << lane); left != 0; left &= left - 1)
    if (!warp.views[lane].generic.has_seen(warp.agent(__builtin_ctz(left)), reader.time)) return false;
  return true;
}

// The slot of a warp holds one time, and the lanes that read at it. A read that is ordered after them takes their
// place, unless they race with more writes than it does.
void mark_read(Shadow& shadow, const Entry& entry, Warp& warp, int lane, const Reader& mark, bool is_remote) {
  entry.cell.flags |= Shadow::kWasRead;
  if (!is_remote) {
    Reader& slot = entry.readers[warp.id];
    const bool is_like = slot.strength == mark.strength;
    if (is_like && slot.time == mark.time && slot.proxy == mark.proxy) {
      slot.lanes |= mark.lanes;
      return;
    }
    if (slot.time == 0 || ((is_like || mark.strength.is_weak()) && all_seen(warp, lane, slot))) {
      slot = mark;
      return;
    }
  }
  add_other(shadow, entry, {warp.agent(lane), mark.time, mark.proxy, mark.strength});
}

Accessor accessor(Machine& machine, Warp& warp, int lane, const Block& owner, Proxy proxy, Strength strength = {},
                  const u8* value = nullptr, const u8* bytes = nullptr) {
  const Lanes lanes = lane < 0 ? warp.alive : 1u << lane;
  return {machine, warp, lanes, proxy, strength, machine.options.races > 1, owner, value, bytes};
}

}  // namespace

SharedMemory::SharedMemory() = default;
SharedMemory::~SharedMemory() = default;

void SharedMemory::reset(Machine& machine, Block& block, u32 bytes, int warps) {
  machine_ = &machine;
  block_ = &block;
  end_ = kSharedBase + bytes;
  is_gone_ = false;
  bytes_.assign(end_ + 16, 0xff);
  if (machine.options.landing == 2)  // not only NaN: anything may be there
    for (u8& byte : bytes_) byte = static_cast<u8>(machine.random());
  if (machine.options.races > 0) shadow_ = std::make_unique<Shadow>(end_, warps);
}

u8* SharedMemory::at(u32 address, u32 bytes, u32 alignment) {
  if (address < kSharedBase || address > end_ || bytes > end_ - address) {
    const std::string which = format("%u bytes at shared %u, ", bytes, address);
    machine_->fault("out of bounds",
                    which + (end_ == kSharedBase
                                 ? "but the block has no shared memory; shared_bytes= gives that of extern __shared__"
                                 : format("of which %u to %u are the block's", kSharedBase, end_ - 1)));
  }
  if (alignment == 0) alignment = std::min(bytes, 16u);
  if (alignment > 1 && address % alignment != 0)
    machine_->fault("misaligned",
                    format("%u bytes at shared %u, which is no multiple of %u", bytes, address, alignment));
  if (is_gone_) machine_->report("exited block", format("shared memory of block %u, which has exited", block_->index));
  return &bytes_[address];
}

void SharedMemory::read(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy, Strength strength) {
  if (shadow_ == nullptr || bytes == 0) return;
  check_reads(accessor(*machine_, warp, lane, *block_, proxy, strength), *shadow_, address, bytes);
  mark(warp, lane, address, bytes, proxy, strength);
}

void SharedMemory::mark_use(Warp& warp, int lane, u32 address) {
  if (shadow_ != nullptr) mark(warp, lane, address, 8, Proxy::kGeneric, {});
}

void SharedMemory::mark(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy, Strength strength) {
  Shadow& shadow = *shadow_;
  if (lane < 0) {
    machine_->see_warpgroup(warp);
    const Reader whole{machine_->now(), kAllLanes, proxy, strength};
    const Agent agent = warp.block->warpgroup_agents[warp.id / 4];
    shadow.visit(address, bytes, [&](const Entry& entry) {
      entry.cell.flags |= Shadow::kWasRead;
      if (warp.block == block_)
        entry.readers[shadow.warps() + warp.id / 4] = whole;
      else
        add_other(shadow, entry, {agent, whole.time, proxy, strength});
    });
    return;
  }
  const Reader one{warp.own[lane] + 1, 1u << lane, proxy, strength};
  shadow.visit(address, bytes,
               [&](const Entry& entry) { mark_read(shadow, entry, warp, lane, one, warp.block != block_); });
}

void SharedMemory::write(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy, Strength strength,
                         const u8* value) {
  if (shadow_ == nullptr || bytes == 0) return;
  const Accessor who = accessor(*machine_, warp, lane, *block_, proxy, strength, value, bytes_.data());
  check_write(who, *shadow_, address, bytes);
  shadow_->unite(address, bytes);
  const int first = lane < 0 ? __builtin_ctz(warp.alive) : lane;
  const Agent agent = warp.agent(first);
  const Time time = warp.own[first] + 1;
  shadow_->visit(address, bytes, [&](const Entry& entry) {
    shadow_->forget_readers(entry);
    Cell& cell = entry.cell;
    if (strength.is_weak() && !cell.strength.is_weak())
      machine_->write_weakly(*block_->cluster, kSharedWindow + (u64(block_->rank + 1) << kRankShift) + entry.address);
    cell.time = time;
    cell.pc = machine_->pc;
    cell.agent = agent;
    cell.proxy = proxy;
    cell.strength = strength;
  });
}

void SharedMemory::begin_write(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy) {
  if (shadow_ == nullptr || bytes == 0) return;
  check_write(accessor(*machine_, warp, lane, *block_, proxy), *shadow_, address, bytes);
  shadow_->visit(address, bytes, [&](const Entry& entry) {
    ++entry.cell.writes_in_flight;
    entry.cell.pc = machine_->pc;
  });
}

void SharedMemory::end_write(u32 address, u32 bytes, Agent agent, Time time, Proxy proxy, int pc) {
  if (shadow_ == nullptr || bytes == 0) return;
  shadow_->visit(address, bytes, [&](const Entry& entry) {
    shadow_->forget_readers(entry);
    Cell& cell = entry.cell;
    if (cell.writes_in_flight > 0) --cell.writes_in_flight;
    cell.time = time;
    cell.pc = pc;
    cell.agent = agent;
    cell.proxy = proxy;
    cell.strength = {};
  });
}

void SharedMemory::begin_read(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy) {
  if (shadow_ == nullptr || bytes == 0) return;
  check_reads(accessor(*machine_, warp, lane, *block_, proxy), *shadow_, address, bytes);
  shadow_->visit(address, bytes, [&](const Entry& entry) { ++entry.cell.reads_in_flight; });
}

void SharedMemory::end_read(Warp& warp, int lane, u32 address, u32 bytes) {
  if (shadow_ == nullptr || bytes == 0) return;
  shadow_->visit(address, bytes, [&](const Entry& entry) {
    if (entry.cell.reads_in_flight > 0) --entry.cell.reads_in_flight;
  });
  mark(warp, lane, address, bytes, Proxy::kAsync, {});
}

void SharedMemory::poison() {
  std::fill(bytes_.begin(), bytes_.end(), u8(0xff));
  is_gone_ = true;
}

void SharedMemory::guard(u32 address, u32 bytes, bool is_live) {
  if (shadow_ == nullptr) return;
  shadow_->visit(address, bytes, [&](const Entry& entry) {
    entry.cell.flags = u8(is_live ? entry.cell.flags | Shadow::kGuarded : entry.cell.flags & ~Shadow::kGuarded);
  });
}

}  // namespace fused_resnet::ptx
