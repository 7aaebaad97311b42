// Which blocks are resident: a cluster at a time, or, with programmatic dependence, as many as there is room for.
#include <algorithm>
#include <numeric>

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {
namespace {

constexpr u32 kMostThreads = 32768;  // resident at a time, with programmatic dependence

u32 volume(const u32* sizes) {
  return sizes[0] * sizes[1] * sizes[2];
}

// Clusters that hold at least one of the blocks that are asked for, by their index among clusters, x fastest.
std::vector<u32> clusters_of(const PtxLaunch& launch) {
  const u32 *grid = launch.grid, *cluster = launch.cluster;
  std::vector<u32> clusters;
  if (launch.blocks == nullptr) {
    clusters.resize(volume(grid) / volume(cluster));
    std::iota(clusters.begin(), clusters.end(), 0u);
    return clusters;
  }
  for (int k = 0; k < launch.num_blocks; ++k) {
    const u32 index = launch.blocks[k];
    const u32 x = index % grid[0], y = index / grid[0] % grid[1], z = index / grid[0] / grid[1];
    const u32 across = grid[0] / cluster[0], down = grid[1] / cluster[1];
    const u32 found = x / cluster[0] + (y / cluster[1] + z / cluster[2] * down) * across;
    if (std::find(clusters.begin(), clusters.end(), found) == clusters.end()) clusters.push_back(found);
  }
  return clusters;
}

void place(Block& block, const PtxLaunch& launch, u32 cluster_index) {
  const u32 *grid = launch.grid, *cluster = launch.cluster;
  const u32 across = grid[0] / cluster[0], down = grid[1] / cluster[1];
  const u32 corner[] = {cluster_index % across, cluster_index / across % down, cluster_index / across / down};
  const u32 inside[] = {block.rank % cluster[0], block.rank / cluster[0] % cluster[1],
                        block.rank / cluster[0] / cluster[1]};
  for (int d = 0; d < 3; ++d) block.id[d] = corner[d] * cluster[d] + inside[d];
  block.index = block.id[0] + (block.id[1] + block.id[2] * grid[1]) * grid[0];
}

// Registers and predicates hold anything before they are first written.
void start_warps(Machine& machine, Block& block) {
  const Program& program = *block.grid->program;
  const size_t registers = size_t(program.num_registers + 1) * kLanes, predicates = program.num_predicates + 1;
  block.registers.resize(registers * block.num_warps);
  block.predicates.resize(predicates * block.num_warps);
  for (u64& value : block.registers) value = u64(machine.random()) << 32 | machine.random();
  for (Lanes& value : block.predicates) value = machine.random();
  for (int k = 0; k < block.num_warps; ++k) {
    auto warp = std::make_unique<Warp>();
    warp->block = &block;
    warp->id = k;
    warp->first_agent = static_cast<Agent>(block.first_agent + u32(k) * kLanes);
    const int lanes = std::min(kLanes, block.num_threads - k * kLanes);
    warp->threads = warp->alive = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp->registers = &block.registers[registers * k];
    warp->predicates = &block.predicates[predicates * k];
    warp->local.assign(size_t(program.local_bytes) * kLanes, 0xff);
    warp->in_flight.assign(program.num_registers + 1, 0);
    warp->last_access.assign(program.num_registers + 1, 0);
    block.warps.push_back(std::move(warp));
  }
}

}  // namespace

u32 Machine::block_number(const Block& block) const {
  return block.grid->first_block + block.index + 1;
}

bool Machine::may_start(const Grid& grid) const {
  if (grid.next_block >= grid.clusters.size()) return false;
  const u32 threads = volume(grid.launch->block) * volume(grid.launch->cluster);
  if (!resident.empty() && (!options.overlap || next_agent_ + 2 * threads > kMostThreads)) return false;
  if (grid.number == 0) return true;
  const Grid& before = *grids[grid.number - 1];
  return before.blocks_done == before.num_blocks ||
         (options.overlap && before.launched_dependents == before.num_blocks);
}

// Order of blocks is not defined (PTX ISA 2.2.3): it varies with the schedule.
void Machine::order_blocks(Grid& grid) {
  grid.clusters = clusters_of(*grid.launch);
  grid.num_blocks = static_cast<u32>(grid.clusters.size()) * volume(grid.launch->cluster);
  if (options.schedule == 3) std::reverse(grid.clusters.begin(), grid.clusters.end());
  if (options.schedule == 0)
    for (size_t k = grid.clusters.size(); k > 1; --k) std::swap(grid.clusters[k - 1], grid.clusters[random(u32(k))]);
}

void Machine::start() {
  for (bool again = true; again;) {
    again = false;
    for (auto& grid : grids) {
      if (!may_start(*grid)) continue;
      start_cluster(*grid);
      again = options.overlap != 0;
    }
  }
}

// Blocks that wait for each other: there may be more of them resident than one cluster.
bool Machine::start_another() {
  for (auto& grid : grids) {
    const u32 threads = volume(grid->launch->block) * volume(grid->launch->cluster);
    if (grid->next_block >= grid->clusters.size() || next_agent_ + 2 * threads > kMostThreads) continue;
    if (grid->number > 0 && grids[grid->number - 1]->next_block < grids[grid->number - 1]->clusters.size())
      return false;
    if (resident.empty() || &*grid != resident[0]->grid) return false;
    for (Warp* one : warps_) one->failed_waits = 0;
    start_cluster(*grid);
    return true;
  }
  return false;
}

void Machine::start_cluster(Grid& grid) {
  const PtxLaunch& launch = *grid.launch;
  if (resident.empty()) {
    next_agent_ = first_thread_agent_;
    ++agents_epoch_;
  }
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid;
  cluster->number = ++cluster_number_;
  const u32 index = grid.clusters[grid.next_block++];
  for (u32 rank = 0; rank < volume(launch.cluster); ++rank) {
    auto block = std::make_unique<Block>();
    block->grid = &grid;
    block->cluster = cluster.get();
    block->rank = rank;
    place(*block, launch, index);
    block->num_threads = static_cast<int>(volume(launch.block));
    block->num_warps = (block->num_threads + kLanes - 1) / kLanes;
    if (block->num_warps > kMaxWarps) throw Fault("more than 1024 threads in a block");
    block->first_agent = next_agent_;
    placed_[block_number(*block)] = {agents_epoch_, block->first_agent, cluster->number};
    next_agent_ += u32(block->num_warps) * kLanes;
    for (Agent& agent : block->warpgroup_agents) agent = static_cast<Agent>(next_agent_++);
    block->cluster_arrivals.assign(block->num_threads, 0);
    start_warps(*this, *block);
    block->shared.reset(*this, *block, launch.shared_bytes, block->num_warps);
    for (auto& warp_of : block->warps) warps_.push_back(warp_of.get());
    cluster->blocks.push_back(std::move(block));
  }
  resident.push_back(std::move(cluster));
}

void Machine::retire_finished() {
  for (size_t k = resident.size(); k-- > 0;) {
    Cluster& cluster = *resident[k];
    const auto& blocks = cluster.blocks;
    if (!std::all_of(blocks.begin(), blocks.end(), [](const auto& block) { return block->has_exited; })) continue;
    finish_copies(*this, cluster);
    const auto is_of_it = [&](Warp* one) { return one->block->cluster == &cluster; };
    warps_.erase(std::remove_if(warps_.begin(), warps_.end(), is_of_it), warps_.end());
    const auto is_in_it = [&](u64 key) { return key >> 32 == (kSharedLocation >> 32) + cluster.number; };
    for (auto entry = locations_.begin(); entry != locations_.end();)
      entry = is_in_it(entry->first) ? locations_.erase(entry) : std::next(entry);
    warp = nullptr;
    cluster.grid->blocks_done += static_cast<u32>(blocks.size());
    resident.erase(resident.begin() + static_cast<long>(k));
    turn_ = 0;
  }
}

void Machine::launch_dependents(Block& block) {
  if (!block.launched_dependents) ++block.grid->launched_dependents;
  block.launched_dependents = true;
  residents_change_ = true;
}

// A block whose last warp has exited. Others of its cluster may live on, and must leave its shared memory alone.
void Machine::block_exited(Block& block) {
  block.has_exited = true;
  launch_dependents(block);
  if (block.cluster->blocks.size() > 1) block.shared.poison();
  residents_change_ = true;
}

}  // namespace fused_resnet::ptx
