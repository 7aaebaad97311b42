// The machine's construction, its reports, and what its threads hand on to each other.
#include "ptx/machine/machine.h"

#include <cstdio>

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

u8* parameters_of(const PtxLaunch& launch) {
  const size_t bytes = (launch.parameter_bytes / 64 + 1) * 64;
  auto* parameters = static_cast<u8*>(std::aligned_alloc(64, bytes));
  std::memset(parameters, 0xff, bytes);
  std::memcpy(parameters, launch.parameters, launch.parameter_bytes);
  return parameters;
}

u32 blocks_of(const PtxLaunch& launch) {
  return launch.grid[0] * launch.grid[1] * launch.grid[2];
}

}  // namespace

std::string format(const char* text, ...) {
  char room[1024];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(room, sizeof room, text, arguments);
  va_end(arguments);
  return room;
}

Machine::Machine(const PtxLaunch* launches, int num_launches, const PtxRegion* given, int num_regions,
                 const PtxOptions& wanted)
    : options(wanted), random_state_(wanted.seed * 0x9e3779b97f4a7c15ull + 0x1234567) {
  for (int k = 0; k < num_regions; ++k) {
    Region region;
    region.base = given[k].base;
    region.size = given[k].size;
    region.writable = given[k].writable != 0;
    region.name = given[k].name;
    if (region.writable && options.races > 0) region.words.resize((region.base % 4 + region.size + 3) / 4);
    region.sectors_read.resize(region.size / 32 + 2);
    region.sectors_written.resize(region.size / 32 + 2);
    regions.push_back(std::move(region));
  }
  for (int k = 0; k < num_launches; ++k) {
    auto grid = std::make_unique<Grid>();
    grid->launch = &launches[k];
    grid->program = static_cast<const Program*>(launches[k].program);
    grid->parameters = parameters_of(launches[k]);
    grid->number = k;
    if (k > 0) grid->first_block = grids[k - 1]->first_block + blocks_of(launches[k - 1]);
    grid->agent = static_cast<Agent>(next_agent_++);
    grids.push_back(std::move(grid));
  }
  first_thread_agent_ = next_agent_;
  for (auto& grid : grids) order_blocks(*grid);
}

Machine::~Machine() {
  for (auto& grid : grids) std::free(grid->parameters);
}

u32 Machine::random() {  // xorshift64
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<u32>(random_state_ >> 11);
}

std::string Machine::where(int pc) const {
  if (warp == nullptr && grids.size() != 1) return "?";
  const Program& program = *(warp != nullptr ? warp->block->grid : grids[0].get())->program;
  if (pc < 0 || pc >= static_cast<int>(program.instructions.size())) return "?";
  const Instruction& instruction = program.instructions[pc];
  return format("line %d: %.200s", instruction.line, instruction.text.c_str());
}

void Machine::report(const char* kind, const std::string& what, int pc_of) {
  const int at = pc_of < 0 ? pc : pc_of;
  const int grid = warp == nullptr ? 0 : warp->block->grid->number;
  if (reported_[{format("%s %d", kind, grid), at}]++ > 0) return;
  std::string text = format("[%s] ", kind);
  if (grids.size() > 1) text += format("grid %d, ", grid);
  if (warp != nullptr) text += format("block %u, warp %d: ", warp->block->index, warp->id);
  reports.push_back(text + what + "\n    at " + where(at));
}

void Machine::fault(const char* kind, const std::string& what, int pc_of) {
  report(kind, what, pc_of);
  throw Fault(kind);
}

std::string Machine::name_of(Agent agent) const {
  for (const auto& grid : grids)
    if (grid->agent == agent) return format("grid %d", grid->number);
  for (const auto& cluster : resident) {
    for (const auto& block : cluster->blocks) {
      const u32 thread = agent - block->first_agent;
      if (agent < block->first_agent || thread >= u32(block->num_warps) * kLanes) continue;
      const std::string name = format("warp %u lane %u", thread / kLanes, thread % kLanes);
      return warp != nullptr && block.get() == warp->block ? name : format("block %u ", block->index) + name;
    }
    for (const auto& block : cluster->blocks)
      for (const auto& entry : block->mbarriers)
        if (entry.second.agent == agent) return format("copies of the mbarrier at shared %u", entry.first);
  }
  return "asynchronous work";
}

Agent Machine::new_agent() {
  if (next_agent_ + 1 >= kNobody) fault("capacity", "too many threads and mbarriers at a time");
  return static_cast<Agent>(next_agent_++);
}

Block* Machine::block_of_rank(Warp& of, u32 rank) {
  auto& blocks = of.block->cluster->blocks;
  return rank < blocks.size() ? blocks[rank].get() : nullptr;
}

Time Machine::publish(Warp& of, int lane) {
  return of.own[lane] = ++now_;
}

void Machine::hand_on(Warp& of, Lanes lanes, Views& to) {
  const Time time = ++now_;
  const Views* last = nullptr;
  FOR_ACTIVE(lanes) {
    if (last == nullptr || !last->is_same(of.views[l])) to.join(of.views[l]);
    last = &of.views[l];
  }
  FOR_ACTIVE(lanes) {
    of.own[l] = time;
    to.generic.add(of.agent(l), time);
  }
}

void Machine::take_over(Warp& of, Lanes lanes, const Views& from) {
  Views before, after;
  bool is_known = false;
  FOR_ACTIVE(lanes) {
    if (is_known && before.is_same(of.views[l])) {
      of.views[l] = after;
      continue;
    }
    before = of.views[l];
    of.views[l].join(from);
    after = of.views[l];
    is_known = true;
  }
}

void Machine::see_warpgroup(Warp& of) {
  if (of.saw_warpgroup == now_) return;
  of.saw_warpgroup = now_;
  Views seen;
  seen.generic.add(of.block->warpgroup_agents[of.id / 4], now_);
  take_over(of, of.alive, seen);
}

}  // namespace fused_resnet::ptx
