// Control flow (PTX ISA 9.7.12), and what else steers execution: nanosleep, griddepcontrol.
#include "ptx/machine/operands.h"
#include "ptx/threads/register_pool.h"

namespace fused_resnet::ptx {
namespace {

void check_uniform(Machine& machine, const Warp& warp, const Instruction& i, Lanes mask) {
  if (i.a != 0 && !warp.diverged && mask != warp.alive)
    machine.report("divergence", format("lanes %#x of %#x take a branch that says .uni", mask, warp.alive));
}

// 9.7.12.3. a: .uni
void bra(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  check_uniform(machine, warp, i, mask);
  warp.branching = mask;
}

// 9.7.12.4: each lane to the label that its index picks.
void brx(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes];
  const u64* picks = read(machine, warp, i.at(0), room);
  FOR_ACTIVE(mask) {
    if (u32(picks[l]) >= u32(i.count(1)))
      machine.fault("control", format("brx.idx: label %u of %d", u32(picks[l]), i.count(1)));
    warp.label_targets[l] = static_cast<u32>(i.at(1, int(picks[l])).value);
  }
  warp.targets = warp.label_targets;
  warp.branching = mask;
}

// 9.7.12.6, 9.7.12.7: a kernel returns to nowhere.
void leave(Machine&, Warp& warp, const Instruction&, Lanes mask) {
  warp.alive &= ~mask;
}

void trap(Machine& machine, Warp&, const Instruction&, Lanes mask) {
  machine.fault("trap", format("lanes %#x execute it", mask));
}

// 9.7.19.2: others go on.
void nanosleep(Machine& machine, Warp&, const Instruction&, Lanes) {
  machine.yields = true;
}

// ------------------------------------------------------------------------------------- dependent grids, 9.7.13.13

bool is_complete(const Grid& grid) {
  return grid.blocks_done == grid.num_blocks;
}

// What the lane knows once the grid before is complete and its writes are there for all: that grid, and what it had
// itself waited for. A grid before it that it did not wait for may still be running.
void know(Machine& machine, Warp& warp, Lanes lanes) {
  Grid& grid = *warp.block->grid;
  if (grid.number == 0) return;
  const Grid& before = *machine.grids[grid.number - 1];
  grid.waited_for |= before.waited_for | 1u << before.number % 32;
  Views known;
  for (const auto& one : machine.grids) {
    if (one->number >= grid.number || !(grid.waited_for >> one->number % 32 & 1)) continue;
    known.generic.add(one->agent, 1);
  }
  machine.take_over(warp, lanes, known);
}

void wait_for_grid(Machine& machine, Warp& warp, const Instruction&, Lanes mask) {
  const Grid& grid = *warp.block->grid;
  if (grid.number == 0 || is_complete(*machine.grids[grid.number - 1])) {
    know(machine, warp, mask);
    return;
  }
  warp.at_grid |= mask;
  warp.waiting_at = machine.pc;
  warp.state = State::kAtGrid;
}

// Publishes nothing: the grid that starts must wait before it reads what this one writes.
void launch_dependents(Machine& machine, Warp& warp, const Instruction&, Lanes) {
  machine.launch_dependents(*warp.block);
}

}  // namespace

bool grid_wait_is_over(Machine& machine, Warp& warp) {
  const Grid& grid = *warp.block->grid;
  if (!is_complete(*machine.grids[grid.number - 1])) return false;
  know(machine, warp, warp.at_grid);
  warp.at_grid = 0;
  warp.state = State::kRunning;
  return true;
}

void decode_control(Modifiers& m, Instruction& i) {
  const std::string& name = m.name();
  if (name == "bra") {
    i.a = m.take("uni");
    if (i.target < 0) m.refuse("no target");
    i.handler = bra;
  } else if (name == "brx") {
    if (!m.take("idx")) m.refuse();
    i.a = m.take("uni");
    i.handler = brx;
    for (int k = 0; k < i.count(1); ++k)
      if (i.at(1, k).kind != kLabel) m.refuse("labels");
  } else if (name == "ret" || name == "exit") {
    m.take("uni");
    i.handler = leave;
  } else if (name == "trap" || name == "brkpt") {
    i.handler = trap;
  } else if (name == "nanosleep") {
    if (m.type() != kU32) m.refuse();
    expect_operands(m, i, "s");
    i.handler = nanosleep;
  } else if (name == "setmaxnreg") {
    decode_setmaxnreg(m, i);
  } else if (name == "griddepcontrol") {
    i.handler = m.take("wait") ? wait_for_grid : m.take("launch_dependents") ? launch_dependents : nullptr;
  }
}

}  // namespace fused_resnet::ptx
