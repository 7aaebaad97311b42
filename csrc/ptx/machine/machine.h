// The state of the machine: resident blocks, their warps and shared memory; global memory; what is pending.
#pragma once

#include <cstdarg>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "ptx/machine/clocks.h"
#include "ptx/program.h"

namespace fused_resnet::ptx {

constexpr int kLanes = 32, kMaxWarps = 32, kNamedBarriers = 16;
constexpr u64 kSharedWindow = 0x0100000000ull;  // generic addresses of shared memory; 16 MiB a block of a cluster
constexpr u64 kLocalWindow = 0x0200000000ull;   // no host pointer is that low
constexpr u32 kSharedBase = 1024;               // a block's first KiB belongs to the system, sm_80 and later
constexpr int kRankShift = 24;  // of an address of .shared::cluster, from here on: the block's rank plus 1; 0: our own

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

struct Fault : std::runtime_error {  // ends the launch
  using std::runtime_error::runtime_error;
};

enum class Proxy : u8 { kGeneric, kAsync };  // PTX ISA 8.6

struct Block;
struct Cluster;
struct Grid;
class Shadow;

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
  Views fenced[kLanes];  // what a fence of the lane made ready for its next strong write (PTX ISA 8.7)
  std::unordered_map<u32, Time> observed_blocks;
  Views observed[kLanes];         // what its strong reads have found, for its next fence to take over
  Time fence_times[kLanes] = {};  // of that fence, for other blocks

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
  // reader its warpgroup. `strong`: atomics, .relaxed and stronger, .volatile; they race with weak accesses only (8.7).
  // `value`: what is written, if known; threads that write one value over each other are reported in strict mode only.
  void read(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy = Proxy::kGeneric, bool strong = false);
  void write(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy = Proxy::kGeneric, bool strong = false,
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

 private:
  void mark(Warp& warp, int lane, u32 address, u32 bytes, Proxy proxy, bool strong);  // as read
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
    bool strong = false;
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

struct Mbarrier {  // PTX ISA 9.7.13.15
  u32 address = 0;
  Agent agent = kNobody;  // in whose name copies that complete here write
  u32 count = 0;
  s64 pending = 0, bytes = 0;
  u32 phase = 0;  // completed phases
  bool alive = false;
  Views arriving, complete;  // what the arrivals of this phase hand on; what those of complete phases did
  Agent made_by = kNobody;
  Time made_at = 0;
  bool is_fenced = false;                       // by fence.mbarrier_init of its maker
  u32 fenced_in = 0;                            // in that phase of barrier.cluster
  bool waited = true;                           // somebody's wait for the last complete phase came true
  bool has_remote = false, had_remote = false;  // arrivals from other blocks, in this phase and in complete ones
};

struct NamedBarrier {             // PTX ISA 9.7.13.1
  u32 arrived = 0, expected = 0;  // threads; 0 expected: all of the block
  int pc = -1;                    // of the first arrival
  Views arriving;
  struct Waiting {
    Warp* warp;
    Lanes lanes;
    const Instruction* instruction;
  };
  std::vector<Waiting> waiting;
  u32 num_true = 0, num_asked = 0;  // of bar.red
  Lanes lanes[kMaxWarps] = {};      // who has arrived
};

// A block while it is resident. Blocks of a cluster are resident together.
struct Block {
  Grid* grid;
  u32 index;  // in the grid
  u32 id[3];
  u32 rank;         // in its cluster
  u32 first_agent;  // of its threads
  Cluster* cluster = nullptr;
  bool has_exited = false, launched_dependents = false;
  // barrier.cluster by thread: how often it arrived without having waited, and the phase it arrived in
  std::vector<u32> cluster_arrivals;
  Agent warpgroup_agents[kMaxWarps / 4];      // in whose name wgmma reads
  std::unordered_map<u32, Time> seen_blocks;  // of other blocks, through atomics in global memory: up to when
  int num_threads, num_warps, warps_done = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<u64> registers;
  std::vector<Lanes> predicates;
  SharedMemory shared;
  std::map<u32, Mbarrier> mbarriers;
  NamedBarrier barriers[kNamedBarriers];
  std::shared_ptr<Warpgroup> warpgroups[kMaxWarps / 4];
  std::shared_ptr<RegisterPool> register_pool;                                  // null: no setmaxnreg so far
  std::vector<std::shared_ptr<BulkCopy>> bulk_groups_open[kMaxWarps * kLanes];  // by thread
  std::deque<std::vector<std::shared_ptr<BulkCopy>>> bulk_groups[kMaxWarps * kLanes];
};

struct Cluster {  // the blocks that are resident together, and barrier.cluster
  Grid* grid;
  std::vector<std::unique_ptr<Block>> blocks;
  u32 arrived = 0;  // threads, at barrier.cluster
  u32 phase = 0;    // how often it has completed
  u32 number = 0;   // of all that were started, from 1
  Views arriving, complete;
  std::vector<NamedBarrier::Waiting> waiting;
};

struct Grid {           // a launch
  u32 first_block = 0;  // blocks of the grids before it
  const PtxLaunch* launch;
  const Program* program;
  u8* parameters;  // 64-byte aligned, ours
  int number;
  u32 blocks_done = 0, launched_dependents = 0;
  std::vector<u32> clusters;  // those to run, in order
  u32 num_blocks = 0;         // in those
  size_t next_block = 0;
  Agent agent = kNobody;  // whoever waited for the grid has seen this agent
  u32 waited_for = 0;     // grids that it has waited for itself, by number
};

class Machine {
 public:
  Machine(const PtxLaunch* launches, int num_launches, const PtxRegion* regions, int num_regions, const PtxOptions&);
  ~Machine();
  void run();  // all launches; throws Fault

  PtxOptions options;
  PtxCounts counts{};
  std::vector<std::string> reports;
  std::vector<Region> regions;
  std::vector<std::unique_ptr<Grid>> grids;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<std::shared_ptr<BulkCopy>> pending;  // bulk copies that have not landed
  int pc = 0;                                      // the instruction being executed
  Warp* warp = nullptr;                            // whose
  int copies_in_global = 0;                        // asynchronous copies in flight from or to writable regions
  bool yields = false;                             // set by a handler that polls in vain: the warp's turn ends

  u32 random();
  u32 random(u32 below) { return random() % below; }
  bool chance(u32 one_in) { return random() % one_in == 0; }

  // A report, once for each kind and instruction. `pc` -1: the instruction being executed.
  void report(const char* kind, const std::string& what, int pc = -1);
  [[noreturn]] void fault(const char* kind, const std::string& what, int pc = -1);
  std::string where(int pc) const;  // "line 12: <text>"

  // Publication: all that the lane did is at or before the time returned; what it does later is after.
  Time publish(Warp& warp, int lane);
  Time now() const { return now_; }
  Agent new_agent();  // for an mbarrier
  // The same for several lanes at once: they publish, and `to` learns what they have seen and done.
  void hand_on(Warp& warp, Lanes lanes, Views& to);
  // The lanes learn what `from` has.
  void take_over(Warp& warp, Lanes lanes, const Views& from);

  // All lanes of the warp have seen what its warpgroup has read so far: to be called by wgmma.wait_group.
  void see_warpgroup(Warp& warp);

  // Order through memory (PTX ISA 8.7 to 8.9). The key is the address of a location: in global memory, or kSharedWindow
  // + (rank + 1) << 24 + offset. A strong write releases: all that the lane has seen and done, or, if it is `relaxed`,
  // what a fence of the lane covers. A strong read acquires: at once, or, if it is `relaxed`, with the lane's next
  // fence.
  void release(Warp& warp, int lane, u64 key, bool relaxed = false);
  void acquire(Warp& warp, int lane, u64 key, bool relaxed = false);
  void fence(Warp& warp, int lane, bool other_blocks);
  u32 block_number(const Block& block) const;  // of all grids, from 1

  // Global memory. Checks bounds, alignment (0: to the size) and races, and counts no sectors.
  // `value`: what is written, if known. `strong` as in SharedMemory.
  u8* global(Warp& warp, int lane, u64 address, u32 bytes, bool is_write, const u8* value = nullptr, u32 alignment = 0,
             bool strong = false, Proxy proxy = Proxy::kGeneric);
  bool is_written_by_grid(Warp& warp, u64 address, u32 bytes);  // for ld.global.nc
  Region* region_of(u64 address, u64 bytes);
  void count_global(const u64* addresses, Lanes mask, u32 bytes, bool is_write);  // sectors of one request of a warp
  void count_shared(const u32* addresses, Lanes mask, u32 bytes, bool is_write);  // wavefronts of one request of a warp

  Block* block_of_rank(Warp& warp, u32 rank);  // in the warp's cluster; null if there is none
  void launch_dependents(Block& block);        // the grid after this one may start, once all blocks have said so
  bool land_one();                             // a pending bulk copy; false if there is none

  std::string name_of(Agent agent) const;  // "warp 1 lane 3"

 private:
  friend class SharedMemory;
  // global_memory.cpp
  struct GlobalAccess;
  void check_global(const GlobalAccess& who, Region& region, u64 address, u32 bytes, const u8* value);
  bool is_ordered(const GlobalAccess& who, const Region::Access& before) const;
  void note_global(const GlobalAccess& who, Region& region, Region::Cell& cell, u64 address);
  const Block* resident_block(u32 number) const;
  const Grid& grid_of(u32 block_number) const;
  void report_global(const GlobalAccess& who, const Region& region, u64 address, const Region::Access& before,
                     const char* what);

  // residents.cpp
  void order_blocks(Grid& grid);
  void start();  // clusters, as many as may be resident
  bool may_start(const Grid& grid) const;
  bool start_another();
  void start_cluster(Grid& grid);
  void retire_finished();
  void block_exited(Block& block);

  // scheduler.cpp
  Warp* choose();
  bool can_go_on(Warp& warp);
  void take_turn(Warp& warp);
  void land_in_time();
  [[noreturn]] void deadlock();

  // steps.cpp
  void step(Warp& warp);
  Lanes select(Warp& warp);
  Lanes gather(Warp& warp, const Instruction& instruction, Lanes group);
  void execute(Warp& warp, const Instruction& instruction, Lanes group);
  void advance(Warp& warp, const Instruction& instruction, u32 from, Lanes group);
  void exited(Warp& warp, Lanes exiting);

  static constexpr u64 kSharedLocation = 1ull << 63;  // keys of locations in shared memory, with the cluster's number
  struct Location {                                   // what strong writes left at an address
    Views views;
    u32 agents_epoch = 0;                  // whose agents these are; of others nothing is known but:
    std::unordered_map<u32, Time> blocks;  // by block of a grid: all that it did up to this time
  };
  Location& location(Warp& warp, u64 key);

  u64 random_state_;
  Time now_ = 1;
  u64 steps_ = 0;
  bool residents_change_ = false;
  u32 next_agent_ = 0, first_thread_agent_ = 0;
  u32 cluster_number_ = 0, agents_epoch_ = 0;  // an epoch: agents are numbered anew
  std::vector<Warp*> warps_;                   // of all resident clusters
  size_t turn_ = 0;
  Region* last_region_ = nullptr;
  std::unordered_map<u64, Location> locations_;
  std::map<std::pair<std::string, int>, int> reported_;
};

// An address of .shared::cluster, or a generic one less kSharedWindow: whose shared memory, and where in it.
struct SharedPlace {
  Block* block;
  u32 address;
};
inline SharedPlace shared_place(Machine& machine, Warp& warp, u32 address) {
  const u32 rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  if (rank == 0) return {warp.block, offset};
  Block* block = machine.block_of_rank(warp, rank - 1);
  if (block == nullptr) machine.fault("out of bounds", format("no block of rank %u in the cluster", rank - 1));
  return {block, offset};
}

// In their files:
void finish_copies(Machine& machine, Cluster& cluster);  // copies.cpp: before its blocks go, all that is pending
// Of an access to a writable region: reports what meets an asynchronous copy in flight. Call if copies_in_global > 0.
void check_copies_in_global(Machine& machine, u64 address, u32 bytes, bool is_write);  // copies.cpp
void check_copies_at_exit(Machine& machine, Warp& warp, Lanes exiting);                // copies.cpp
void land(Machine& machine, BulkCopy& copy);               // copies.cpp: the data, and whoever waits for it
void try_release(Machine& machine, Block& block, int id);  // barriers.cpp: after an arrival, or when a warp has exited
void try_release_cluster(Machine& machine, Cluster& cluster);
bool grid_wait_is_over(Machine& machine, Warp& warp);          // control.cpp: of griddepcontrol.wait
void check_register_exit(Machine& machine, Warp& warp);        // register_pool.cpp: of a warp that has exited
void complete_if_due(Machine& machine, Mbarrier& barrier);     // mbarriers.cpp
void check_exit(Machine& machine, Warp& warp, Lanes exiting);  // scheduler.cpp: reports what they leave pending

}  // namespace fused_resnet::ptx
