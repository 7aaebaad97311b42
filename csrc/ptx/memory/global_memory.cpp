// Accesses to global memory: bounds, alignment, and races inside a block, between blocks and between dependent grids.
#include <algorithm>

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {

struct Machine::GlobalAccess {
  Warp& warp;
  int lane;
  bool is_write;
  Region::Access mark;
};

namespace {

constexpr u64 kNear = 1 << 20;

// The cells of a region that an access touches: words, or the bytes of words whose bytes differ.
template <class Visit>
void visit(Region& region, u64 address, u32 bytes, Visit visit) {
  const u64 first = region.base & ~u64(3);
  for (const u64 end = address + bytes; address < end;) {
    const u64 word = (address - first) / 4, next = std::min(end, first + (word + 1) * 4);
    auto parts = region.split.empty() ? region.split.end() : region.split.find(word);
    if (parts == region.split.end() && next - address == 4) {
      visit(region.words[word], address, 4u);
      address = next;
      continue;
    }
    if (parts == region.split.end()) {
      parts = region.split.emplace(word, std::vector<Region::Cell>(4, region.words[word])).first;
      if (region.words[word].has_more_readers)
        for (u64 k = 3; k > 0; --k) region.more_readers[first + word * 4 + k] = region.more_readers[first + word * 4];
    }
    for (; address < next; ++address) visit(parts->second[address % 4], address, 1u);
  }
}

// The array that is nearest, if it is near, and how far its first byte is.
std::string nearest(const std::vector<Region>& regions, u64 address) {
  const auto distance = [&](const Region& region) {
    return address < region.base ? region.base - address : address - std::min(address, region.base + region.size);
  };
  const auto found = std::min_element(regions.begin(), regions.end(), [&](const Region& one, const Region& other) {
    return distance(one) < distance(other);
  });
  if (found == regions.end() || distance(*found) >= kNear) return "";
  return format(" (%s%+lld, of %llu bytes)", found->name.c_str(), static_cast<long long>(address - found->base),
                static_cast<unsigned long long>(found->size));
}

}  // namespace

Region* Machine::region_of(u64 address, u64 bytes) {
  const auto holds = [&](const Region& region) {
    return address >= region.base && address - region.base <= region.size &&
           bytes <= region.size - (address - region.base);
  };
  if (last_region_ != nullptr && holds(*last_region_)) return last_region_;
  for (Region& region : regions)
    if (holds(region)) return last_region_ = &region;
  return nullptr;
}

u8* Machine::global(Warp& of, int lane, u64 address, u32 bytes, bool is_write, const u8* value, u32 alignment,
                    Strength strength, Proxy proxy) {
  if (alignment == 0) alignment = std::min(bytes, 32u);
  if (alignment > 1 && address % alignment != 0)
    fault("misaligned", format("lane %d: %u bytes at global %#llx, which is no multiple of %u", lane, bytes,
                               static_cast<unsigned long long>(address), alignment));
  Region* region = region_of(address, bytes);
  if (region == nullptr)
    fault("out of bounds", format("lane %d: %s of %u bytes at global %#llx", lane, is_write ? "write" : "read", bytes,
                                  static_cast<unsigned long long>(address)) +
                               nearest(regions, address));
  if (is_write && !region->writable) fault("read-only", format("lane %d: write to ", lane) + region->name);
  if (region->writable && options.races > 0 && bytes > 0) {
    if (copies_in_global > 0 && strength.is_weak()) check_copies_in_global(*this, address, bytes, is_write);
    const GlobalAccess who{
        of,
        lane,
        is_write,
        {block_number(*of.block), of.own[lane] + 1, pc, u16(of.id * kLanes + lane), strength, proxy}};
    check_global(who, *region, address, bytes, value);
  }
  return reinterpret_cast<u8*>(address);
}

const Grid& Machine::grid_of(u32 number) const {
  size_t k = grids.size() - 1;
  while (grids[k]->first_block >= number) --k;
  return *grids[k];
}

bool Machine::has_seen(const View& view, const Region::Access& what) const {
  const Placed& placed = placed_.at(what.block);
  const Agent agent = static_cast<Agent>(placed.first_agent + what.thread);
  return placed.epoch == agents_epoch_ ? view.has_seen(agent, what.time)
                                       : view.has_seen_in(placed.epoch, agent, what.time);
}

bool Machine::is_ordered(const GlobalAccess& who, const Region::Access& before) const {
  const Warp& of = who.warp;
  const View& view = of.views[who.lane].generic;
  if (before.block == who.mark.block && before.thread == who.mark.thread) return true;
  if (before.block != who.mark.block && grids.size() > 1) {
    const Grid& other = grid_of(before.block);
    // a launch begins when the one before it is complete, unless it depends programmatically (PTX ISA 9.7.13.13)
    if (&other != of.block->grid) return options.overlap == 0 || view.has_seen(other.agent, 1);
  }
  return has_seen(view, before);
}

// Whether they may meet unordered (PTX ISA 8.7).
bool Machine::are_morally_strong(const GlobalAccess& who, const Region::Access& before) const {
  if (who.mark.strength.is_weak() || before.strength.is_weak() || who.mark.proxy != before.proxy) return false;
  Scope common = Scope::kCta;
  if (before.block != who.mark.block) {
    const bool is_near = placed_.at(before.block).cluster == who.warp.block->cluster->number;
    common = is_near ? Scope::kCluster : Scope::kGpu;
  }
  return ptx::are_morally_strong(who.mark.strength, before.strength, common);
}

void Machine::report_global(const GlobalAccess& who, const Region& region, u64 address, const Region::Access& before,
                            const char* what) {
  const Grid& grid = grid_of(before.block);
  const Grid& mine = *who.warp.block->grid;
  const auto& program = grid.program->instructions;
  const int line = before.pc < static_cast<int>(program.size()) ? program[before.pc].line : -1;
  std::string text = format("lane %d: %s+%llu %s ", who.lane, region.name.c_str(),
                            static_cast<unsigned long long>(address - region.base), what);
  if (&grid != &mine) text += format("grid %d ", grid.number);
  text += format("block %u thread %u (line %d)", before.block - 1 - grid.first_block, before.thread, line);
  report(&grid != &mine ? "dependent launch" : "global race", text);
}

void Machine::check_global(const GlobalAccess& who, Region& region, u64 address, u32 bytes, const u8* value) {
  const u64 begin = address;
  visit(region, address, bytes, [&](Region::Cell& cell, u64 at, u32 size) {
    const Region::Access& writer = cell.writer;
    if (writer.block != 0 && !are_morally_strong(who, writer)) {
      if (!is_ordered(who, writer)) {
        const bool is_same = who.is_write && value != nullptr && options.races < 2 &&
                             std::memcmp(reinterpret_cast<const u8*>(at), value + (at - begin), size) == 0;
        if (!is_same)
          report_global(who, region, at, writer,
                        who.is_write ? "is overwritten without synchronisation with its write by"
                                     : "is read without synchronisation with its write by");
      } else if (who.mark.proxy == Proxy::kAsync && writer.proxy == Proxy::kGeneric &&
                 &grid_of(writer.block) == who.warp.block->grid &&
                 !has_seen(who.warp.views[who.lane].async_global, writer)) {
        report("proxy",
               format("lane %d: %s+%llu is accessed through the async proxy, without fence.proxy.async after "
                      "the write by thread %u",
                      who.lane, region.name.c_str(), static_cast<unsigned long long>(at - region.base), writer.thread));
      }
    }
    note_global(who, region, cell, at);
  });
}

void Machine::note_global(const GlobalAccess& who, Region& region, Region::Cell& cell, u64 at) {
  const auto is_open = [&](const Region::Access& reader) {
    return !are_morally_strong(who, reader) && !is_ordered(who, reader);
  };
  if (!who.is_write) {
    if (who.mark.proxy == Proxy::kAsync) return;  // copies.cpp knows how long it is in flight
    // a read takes the place of one that it comes after, unless that one races with more writes
    const Strength strength = cell.reader.strength;
    const bool is_like = who.mark.strength.is_weak() || who.mark.strength == strength;
    if (cell.reader.block == 0 || (is_like && is_ordered(who, cell.reader))) {
      cell.reader = who.mark;
      return;
    }
    cell.has_more_readers = true;
    auto& more = region.more_readers[at];
    for (Region::Access& reader : more) {
      if (reader.block != who.mark.block || reader.thread != who.mark.thread) continue;
      if (reader.strength != who.mark.strength) continue;
      reader = who.mark;
      return;
    }
    more.push_back(who.mark);
    return;
  }
  const char* what = "is overwritten, which may not have been read yet by";
  if (cell.reader.block != 0 && is_open(cell.reader)) report_global(who, region, at, cell.reader, what);
  if (cell.has_more_readers) {
    for (const Region::Access& reader : region.more_readers[at])
      if (is_open(reader)) report_global(who, region, at, reader, what);
    region.more_readers.erase(at);
  }
  if (who.mark.strength.is_weak() && !cell.writer.strength.is_weak()) write_weakly(*who.warp.block->cluster, at);
  cell = Region::Cell{who.mark, {}, false};
}

bool Machine::is_written_by_grid(Warp& of, u64 address, u32 bytes) {
  Region* region = region_of(address, bytes);
  if (region == nullptr || region->words.empty()) return false;
  bool is_written = false;
  visit(*region, address, bytes, [&](const Region::Cell& cell, u64, u32) {
    is_written = is_written || (cell.writer.block != 0 && &grid_of(cell.writer.block) == of.block->grid);
  });
  return is_written;
}

}  // namespace fused_resnet::ptx
