// What shared memory remembers of accesses: who wrote each byte, who read it since, what is in flight.
//
// It is kept in words of 4 bytes. A word of which only some bytes are accessed is split into four cells until the whole
// of it is written again.
#pragma once

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

class Shadow {
 public:
  struct Cell {
    Time time = 0;  // of the last write
    s32 pc = -1;
    Agent agent = kNobody;
    u16 writes_in_flight = 0, reads_in_flight = 0;
    Proxy proxy = Proxy::kGeneric;
    Strength strength;
    u8 flags = 0;
    bool has(u8 flag) const { return (flags & flag) != 0; }
    bool is_written_like(const Cell& other) const {
      return time == other.time && agent == other.agent && proxy == other.proxy && flags == other.flags &&
             strength == other.strength && writes_in_flight == other.writes_in_flight &&
             reads_in_flight == other.reads_in_flight;
    }
  };
  enum Flag : u8 { kWasRead = 1, kHasMoreReaders = 2, kGuarded = 4 };

  struct Reader {  // the last read by lanes of one warp, or, in the slots behind those of warps, by a warpgroup
    Time time = 0;
    Lanes lanes = 0;
    Proxy proxy = Proxy::kGeneric;
    Strength strength;
    bool operator==(const Reader& other) const {
      return time == other.time && lanes == other.lanes && proxy == other.proxy && strength == other.strength;
    }
  };
  struct OtherReader {  // reads that were not ordered with the one in the slot, or came from another block
    Agent agent;
    Time time;
    Proxy proxy;
    Strength strength;
  };
  struct Entry {  // a cell as it is visited: `bytes` from `address` on
    Cell& cell;
    Reader* readers;
    u32 address, bytes;
    u32 key() const { return address | (bytes == 4 ? 1u << 31 : 0); }
  };

  Shadow(u32 bytes, int warps)
      : warps_(warps),
        slots_(warps + (warps + 3) / 4),
        words_(bytes / 4 + 1),
        readers_(words_.size() * slots_),
        split_(words_.size(), 0) {}

  int slots() const { return slots_; }
  int warps() const { return warps_; }

  template <class Visit>
  void visit(u32 address, u32 bytes, Visit visit) {
    const u32 end = address + bytes;
    if (address % 4 != 0 || bytes < 4) split(address / 4);
    if (end % 4 != 0) split(end / 4);
    while (address < end) {
      const u32 word = address / 4, next = std::min(end, (word + 1) * 4);
      if (split_[word] == 0 && next - address == 4) {
        visit(Entry{words_[word], &readers_[size_t(word) * slots_], address, 4});
      } else {
        for (u32 at = address; at < next; ++at) visit(byte(word, at));
      }
      address = next;
    }
  }

  std::vector<OtherReader>& others(const Entry& entry) { return others_[entry.key()]; }

  // Nobody has read it since it was written.
  void forget_readers(const Entry& entry) {
    Cell& cell = entry.cell;
    if (cell.has(kWasRead)) std::fill(entry.readers, entry.readers + slots_, Reader());
    if (cell.has(kHasMoreReaders)) others_.erase(entry.key());
    cell.flags &= u8(~(kWasRead | kHasMoreReaders));
  }

  // Words of which every byte is being written become one cell again.
  void unite(u32 address, u32 bytes) {
    for (u32 word = (address + 3) / 4; (word + 1) * 4 <= address + bytes; ++word) {
      if (split_[word] == 0) continue;
      bool is_quiet = true;
      for (u32 k = 0; k < 4; ++k) {
        const Cell& cell = byte(word, 4 * word + k).cell;
        is_quiet = is_quiet && cell.writes_in_flight == 0 && cell.reads_in_flight == 0 && !cell.has(kGuarded);
      }
      if (!is_quiet) continue;
      for (u32 k = 0; k < 4; ++k) forget_readers(byte(word, 4 * word + k));
      free_.push_back(split_[word]);
      split_[word] = 0;
      words_[word] = Cell();
      std::fill_n(&readers_[size_t(word) * slots_], slots_, Reader());
    }
  }

 private:
  Entry byte(u32 word, u32 address) {
    const size_t index = size_t(split_[word]) * 4 + address % 4;
    return Entry{bytes_[index], &byte_readers_[index * slots_], address, 1};
  }

  void split(u32 word) {
    if (split_[word] != 0) return;
    if (free_.empty()) {
      if (bytes_.empty()) bytes_.resize(4);  // number 0 means: not split
      free_.push_back(static_cast<u32>(bytes_.size() / 4));
      bytes_.resize(bytes_.size() + 4);
      byte_readers_.resize(bytes_.size() * slots_);
    }
    split_[word] = free_.back();
    free_.pop_back();
    const Entry whole{words_[word], &readers_[size_t(word) * slots_], 4 * word, 4};
    for (u32 k = 0; k < 4; ++k) {
      const Entry part = byte(word, 4 * word + k);
      part.cell = whole.cell;
      std::copy(whole.readers, whole.readers + slots_, part.readers);
      if (whole.cell.has(kHasMoreReaders)) others_[part.key()] = others_[whole.key()];
    }
    if (whole.cell.has(kHasMoreReaders)) others_.erase(whole.key());
  }

  int warps_, slots_;
  std::vector<Cell> words_, bytes_;             // by word; by number of a split word, four each
  std::vector<Reader> readers_, byte_readers_;  // slots of each of those
  std::vector<u32> split_, free_;               // by word: its number among those that are split; numbers to use again
  std::unordered_map<u32, std::vector<OtherReader>> others_;
};

}  // namespace fused_resnet::ptx
