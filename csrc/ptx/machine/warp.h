// A warp: its lanes' registers, what they know of each other, and what they have under way.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "ptx/machine/scopes.h"
#include "ptx/program.h"

namespace fused_resnet::ptx {

constexpr int kLanes = 32, kMaxWarps = 32, kNamedBarriers = 16;

struct Block;

// One thread's cp.async copies (PTX ISA 9.7.9.25.3); they write through the generic proxy.
struct Copy {
  u32 to;
  u64 from;
  u8 bytes, valid;
  bool landed;
  int pc;
  u32 number = 0;         // of this thread's copies
  Agent agent = kNobody;  // once it is over: in whose name it wrote, and when
  Time time = 0;
};
struct CopyGroups {
  u32 issued = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

// A wgmma.mma_async that was issued (PTX ISA 9.7.15). wgmma.cpp alone knows more.
struct Wgmma {
  const Instruction* instruction;
  int pc;
  u64 a, b;
  bool scale_d, done;
  u64 number;  // among the wgmma instructions of its warp, the same in all warps of the warpgroup
  struct Range {
    u32 address, bytes;
  };
  std::vector<Range> reads;  // of shared memory
};
struct WgmmaRegisters;  // wgmma.cpp: of a warp, what was last done to its registers and what they will be
struct Warpgroup;       // wgmma.cpp: what its four warps have issued

// A bulk or tensor copy that was issued (PTX ISA 9.7.9.25.4 to 9.7.9.27). copies.cpp alone knows more.
struct BulkCopy;

struct KnownMaps;  // tensor_maps.cpp: of a warp, which tensor maps its fences have made known

struct RegisterPool;  // register_pool.cpp: of a block, for setmaxnreg

// kAtWarpgroup: wgmma.wait_group waits for the other warps to issue; warpgroups.cpp wakes it.
// kAtRegisters: setmaxnreg.inc waits for other warps to release registers; register_pool.cpp wakes it.
enum class State : u8 { kRunning, kAtBarrier, kAtMbarrier, kAtCluster, kAtGrid, kAtWarpgroup, kAtRegisters, kDone };

struct Warp {
  Block* block;
  int id;
  Lanes alive = 0;    // lanes that have not exited
  Lanes blocked = 0;  // of a diverged warp: lanes that wait for others at an .aligned or .sync instruction
  bool diverged = false;
  u32 pc = 0, pcs[kLanes] = {};
  Lanes branching = 0;           // set by a branch: the lanes that take it
  Lanes at_barrier = 0;          // lanes that have arrived at a barrier and wait for it
  const u32* targets = nullptr;  // of brx.idx: where each branching lane goes, in label_targets
  u32 label_targets[kLanes];
  Lanes at_grid = 0;       // lanes that wait for the grid before
  Lanes threads = 0;       // lanes that the warp began with
  Time saw_warpgroup = 0;  // when its lanes last came to know what their warpgroup has read
  int failed_waits = 0;    // test_wait and try_wait in vain since the warp last did anything else of note
  State state = State::kRunning;
  int waiting_at = -1;  // the instruction
  u32 wait_address = 0, wait_parity = 0;

  u64* registers;     // [register][lane]
  Lanes* predicates;  // [predicate]
  Lanes carry = 0;    // CC.CF (PTX ISA 9.7.2)
  std::vector<u8> local;
  u64* of(int index) { return registers + u64(index) * kLanes; }

  // Lanes of a warp are threads of their own: only bar.warp.sync, barriers and the like order them.
  Views views[kLanes];
  Time own[kLanes] = {};  // when each lane last published; what it does from now on is later
  CopyGroups copies[kLanes];
  // By scope (PTX ISA 8.8): what a fence of the lane made ready for its next strong write, and what its strong reads
  // have found, for its next fence to take over.
  Views fenced[kScopes][kLanes], observed[kScopes][kLanes];

  // wgmma: registers in flight, and when each register was last accessed, counted in instructions of this warp
  std::vector<Wgmma> wgmma_open;
  std::deque<std::vector<Wgmma>> wgmma_committed;
  int wgmma_pending = 0;
  std::vector<u16> in_flight;       // by register: how many wgmmas write it, or read it as A
  std::vector<u64> last_access;     // by register
  u64 fenced_at = 0, executed = 0;  // of wgmma.fence; instructions
  std::shared_ptr<WgmmaRegisters> wgmma_registers;
  u64 wgmma_issued = 0;  // instructions of wgmma, waits and fences too
  std::shared_ptr<KnownMaps> known_maps;

  Agent first_agent = 0;  // lane 0's
  Agent agent(int lane) const { return static_cast<Agent>(first_agent + lane); }
};

}  // namespace fused_resnet::ptx
