// Shared memory of a block and global memory, with who accessed what.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx/machine/scopes.h"
#include "ptx/program.h"

namespace fused_resnet::ptx {

constexpr u64 kSharedWindow = 0x0100000000ull;  // generic addresses of shared memory; 16 MiB a block of a cluster
constexpr u64 kLocalWindow = 0x0200000000ull;   // no host pointer is that low
constexpr u32 kSharedBase = 1024;               // a block's first KiB belongs to the system, sm_80 and later
constexpr int kRankShift = 24;  // of an address of .shared::cluster, from here on: the block's rank plus 1; 0: our own

enum class Proxy : u8 { kGeneric, kAsync };  // PTX ISA 8.6

struct Block;
class Shadow;

// Shared memory of one block. Every byte knows who wrote it, who read it since, and what is in flight.
class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  void reset(Machine& machine, Block& block, u32 bytes, int warps);
  u32 end() const { return end_; }
  // The bytes, after a check of bounds and of alignment to `alignment` (0: to the size, at most 16).
  u8* at(u32 address, u32 bytes, u32 alignment = 0);
  // Checks an access for races, proxies and things in flight, and marks it. A lane of -1: the warp as a whole, and as a
  // reader its warpgroup. `strength`: of atomics, .relaxed and stronger, .volatile.
  // `value`: what is written, if known; threads that write one value over each other are reported in strict mode only.
  void read(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy = Proxy::kGeneric, Strength strength = {});
  void write(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy = Proxy::kGeneric, Strength strength = {},
             const u8* value = nullptr);
  // Asynchronous writes: checked as a write when they begin, then in flight; when they end they are `agent`'s at
  // `time`.
  void begin_write(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy);
  void end_write(u32 address, u32 bytes, Agent agent, Time time, Proxy proxy, int pc);
  // Asynchronous reads: checked as a read when they begin, in flight until they end, then read by warp and lane.
  void begin_read(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy);
  void end_read(Warp& warp, int lane, u32 address, u32 bytes);
  void poison();  // when the block has exited
  // An mbarrier lives here, or no longer does: while it lives, any access is reported (PTX ISA 9.7.13.15.1).
  void guard(u32 address, u32 bytes, bool is_live);
  // The lane has used the mbarrier here: whoever writes its bytes must come after.
  void mark_use(Warp& warp, int lane, u32 address);

 private:
  void mark(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy, Strength strength);  // as read
  Machine* machine_ = nullptr;
  Block* block_ = nullptr;
  u32 end_ = 0;
  bool is_gone_ = false;  // the block has exited
  std::vector<u8> bytes_;
  std::unique_ptr<Shadow> shadow_;  // who accessed what
};

// Global memory that the kernel may touch. Who accessed what is kept for writable regions, in words like shared memory.
struct Region {
  u64 base, size;
  bool writable;
  std::string name;
  struct Access {
    u32 block = 0;  // which block of which grid, plus 1; 0: nobody
    Time time = 0;
    s32 pc = 0;
    u16 thread = 0;
    Strength strength;
    Proxy proxy = Proxy::kGeneric;
  };
  struct Cell {
    Access writer, reader;
    bool has_more_readers = false;
  };
  std::vector<Cell> words;
  std::unordered_map<u64, std::vector<Cell>> split;           // words whose bytes differ
  std::unordered_map<u64, std::vector<Access>> more_readers;  // by byte, of whom none has seen the other
  std::vector<bool> sectors_read, sectors_written;
  std::vector<u16> reads_in_flight, writes_in_flight;  // by byte, of asynchronous copies; empty: never any
};

}  // namespace fused_resnet::ptx
