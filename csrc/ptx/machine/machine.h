// The state of the machine: what is resident, global memory, what is pending, and how warps take turns.
#pragma once

#include <cstdarg>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx/machine/blocks.h"

namespace fused_resnet::ptx {

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

struct Fault : std::runtime_error {  // ends the launch
  using std::runtime_error::runtime_error;
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

  // Order through memory (orders.cpp). The key is the address of a location: in global memory, or kSharedWindow
  // + (rank + 1) << 24 + offset. A strong write hands on what a fence of the lane covers and, if it releases, all that
  // the lane has seen and done. `has_read`: an atomic's, which hands on what it has found too. A strong read finds what
  // was handed on, and takes it over if it acquires; else the lane's next fence does.
  void write_strongly(Warp& warp, int lane, u64 key, Scope scope, bool releases, bool has_read);
  void read_strongly(Warp& warp, int lane, u64 key, Scope scope, bool acquires);
  void write_weakly(const Cluster& cluster, u64 key);  // over a strong write
  void fence(Warp& warp, int lane, Scope scope, bool acquires, bool releases);
  u32 block_number(const Block& block) const;  // of all grids, from 1

  // Global memory. Checks bounds, alignment (0: to the size) and races, and counts no sectors.
  // `value`: what is written, if known. `strength` as in SharedMemory.
  u8* global(Warp& warp, int lane, u64 address, u32 bytes, bool is_write, const u8* value = nullptr, u32 alignment = 0,
             Strength strength = {}, Proxy proxy = Proxy::kGeneric);
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
  bool are_morally_strong(const GlobalAccess& who, const Region::Access& before) const;
  bool has_seen(const View& view, const Region::Access& what) const;
  void note_global(const GlobalAccess& who, Region& region, Region::Cell& cell, u64 address);
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
  static u64 key_of(const Cluster& cluster, u64 key);
  Location* location(const Cluster& cluster, u64 key);  // null if nothing was handed on there

  struct Placed {  // of a block that runs or has run
    u32 epoch, first_agent, cluster;
  };
  std::unordered_map<u32, Placed> placed_;  // by the block's number

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
