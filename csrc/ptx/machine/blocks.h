// What is resident: blocks with their barriers and mbarriers, clusters, and the grids that they are of.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "ptx/machine/memories.h"
#include "ptx/machine/warp.h"

namespace fused_resnet::ptx {

struct Cluster;
struct Grid;

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

struct NamedBarrier {              // PTX ISA 9.7.13.1
  u32 arrivals = 0, expected = 0;  // instructions that have arrived; threads, 0: all of the block
  bool reduces = false;            // the first arrival was a bar.red
  int pc = -1;                     // of the first arrival
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
  Agent warpgroup_agents[kMaxWarps / 4];  // in whose name wgmma reads
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

}  // namespace fused_resnet::ptx
