// One instruction of one warp, for those of its lanes that are there.
#include <algorithm>

#include "ptx/machine/operands.h"
#include "ptx/tensor_cores/wgmma.h"

namespace fused_resnet::ptx {
namespace {

using Counter = uint64_t PtxCounts::*;

// By Class. Loads and stores are counted where their space is known.
Counter counter_of(Class counted) {
  static constexpr Counter kCounters[] = {
      &PtxCounts::integer,      &PtxCounts::floating,
      &PtxCounts::half,         &PtxCounts::conversion,
      &PtxCounts::special,      &PtxCounts::move,
      &PtxCounts::compare,      &PtxCounts::control,
      &PtxCounts::exchange,     nullptr,
      &PtxCounts::matrix_loads, &PtxCounts::matrix_stores,
      &PtxCounts::cp_async,     &PtxCounts::bulk_copies,
      &PtxCounts::mma,          &PtxCounts::wgmma,
      &PtxCounts::barriers,     &PtxCounts::mbarrier_operations,
      &PtxCounts::fences,       &PtxCounts::waits,
  };
  return kCounters[static_cast<int>(counted)];
}

// A warp that does more than poll is not waiting.
bool is_progress(const Instruction& instruction) {
  switch (instruction.counted) {
    case Class::kInteger:
    case Class::kMove:
    case Class::kCompare:
    case Class::kControl:
    case Class::kMbarrier:
    case Class::kWait:
    case Class::kExchange:
      return false;
    default:
      return true;
  }
}

bool is_register(const PtxOperand& operand) {
  return (operand.kind == kRegister || operand.kind == kMemory) && operand.index >= 0;
}

Lanes same_pc(const Warp& warp, u32 pc) {
  Lanes lanes = 0;
  FOR_ACTIVE(warp.alive) if (warp.pcs[l] == pc) lanes |= 1u << l;
  return lanes;
}

bool is_warp_barrier(const Instruction& instruction) {
  return instruction.counted == Class::kBarrier && instruction.convergence == Convergence::kMembers;
}

// Lanes that wait at any bar.warp.sync for these members: it need not be the same one (PTX ISA 9.7.13.2).
Lanes at_warp_barriers(Machine& machine, Warp& warp, Lanes members) {
  if (!warp.diverged) return 0;
  const auto& program = warp.block->grid->program->instructions;
  Lanes lanes = 0;
  u64 room[kLanes];
  FOR_ACTIVE(warp.blocked & warp.alive) {
    const Instruction& other = program[warp.pcs[l]];
    if (is_warp_barrier(other) && Lanes(read(machine, warp, other.at(other.members), room)[l]) == members)
      lanes |= 1u << l;
  }
  return lanes;
}

// PTX ISA on .aligned and .sync: with lanes missing, whatever happens is not defined.
void check_guard(Machine& machine, const Instruction& instruction, Lanes mask, Lanes group) {
  if (instruction.convergence == Convergence::kAligned)
    machine.report("aligned", format("lanes %#x of the warp are predicated off", group & ~mask));
  else
    machine.report("membermask", format("lanes %#x, which are members, are predicated off", group & ~mask));
}

void check_whole(Machine& machine, const Warp& warp, const Instruction& instruction) {
  switch (instruction.counted) {
    case Class::kMma:
    case Class::kWgmma:
    case Class::kMatrixLoad:
    case Class::kMatrixStore:
      machine.report("aligned", format("the warp has lanes %#x only", warp.alive));
      break;
    default:
      break;
  }
}

// Whether wgmma.fence must order it (PTX ISA 9.7.15.7.1). LLVM puts the copies and constants that an accumulator begins
// with between a fence, which names no registers, and the product. ptxas 12.8 and 13.0 then add a fence of their own
// (C7519), or make a product without an addend of zeros: only the strict mode counts them.
bool is_access(const Instruction& instruction, int races) {
  return instruction.counted != Class::kWgmma && (races > 1 || !instruction.is_copy);
}

}  // namespace

void Machine::step(Warp& one) {
  warp = &one;
  Lanes group = one.alive;
  u32 from = one.pc;
  if (one.diverged) {
    group = select(one);
    if (group == 0) return;
    from = one.pcs[__builtin_ctz(group)];
  }
  const auto& instructions = one.block->grid->program->instructions;
  if (from >= instructions.size()) {
    pc = static_cast<int>(instructions.size()) - 1;
    fault("control", "execution runs past the end of the kernel");
  }
  pc = static_cast<int>(from);
  const Instruction& instruction = instructions[from];
  if (instruction.convergence != Convergence::kFree) {
    group = gather(one, instruction, group);
    if (group == 0) return;
  }
  const Lanes alive = one.alive;
  execute(one, instruction, group);
  if (one.alive != alive) {
    exited(one, alive & ~one.alive);
    if (one.alive == 0) return;
  }
  advance(one, instruction, from, group);
}

// Of a diverged warp: the lanes that are furthest behind, or now and then others, so that none is left to starve.
Lanes Machine::select(Warp& one) {
  const Lanes open = one.alive & ~one.blocked & ~one.at_barrier;
  if (open == 0) {
    if (one.at_barrier == 0) {
      pc = static_cast<int>(one.pcs[__builtin_ctz(one.alive)]);
      std::string lines;
      FOR_ACTIVE(one.alive) lines += format(" %d", one.block->grid->program->instructions[one.pcs[l]].line);
      fault("divergence", "the lanes of a warp wait for each other at different instructions, lines" + lines);
    }
    one.state = State::kAtBarrier;
    return 0;
  }
  u32 from = ~0u;
  if (chance(8)) {
    const int lane = static_cast<int>(random(kLanes));
    if (open >> lane & 1) from = one.pcs[lane];
  }
  if (from == ~0u) FOR_ACTIVE(open) from = std::min(from, one.pcs[l]);
  return same_pc(one, from) & open;
}

// Who executes an instruction that wants lanes together: none as long as somebody is missing.
Lanes Machine::gather(Warp& one, const Instruction& instruction, Lanes group) {
  if (instruction.convergence == Convergence::kAligned) {
    if (group == one.alive) return group;
    const Lanes here = same_pc(one, one.pcs[__builtin_ctz(group)]) & ~one.at_barrier;
    if (here == one.alive) return here;
    one.blocked |= group;
    return 0;
  }
  const PtxOperand& operand = instruction.at(instruction.members);
  if (operand.kind == kImmediate && Lanes(operand.value) == kAllLanes && group == one.alive) return group;
  u64 room[kLanes];
  const u64* masks = read(*this, one, operand, room);
  // lanes that name different members are different calls
  const int first = __builtin_ctz(group);
  const Lanes members = Lanes(masks[first]);
  Lanes together = 0;
  const Lanes here = one.diverged ? same_pc(one, one.pcs[first]) & ~one.at_barrier : one.alive;
  FOR_ACTIVE(here) if (Lanes(masks[l]) == members) together |= 1u << l;
  if ((together & ~members) != 0) {
    report("membermask", format("lanes %#x execute it and are not in its mask %#x", together & ~members, members));
    return group;
  }
  if (is_warp_barrier(instruction)) together |= at_warp_barriers(*this, one, members);
  if ((members & one.alive & ~together) == 0) {
    one.blocked &= ~together;
    if (!one.diverged && together != one.alive) {
      FOR_ACTIVE(one.alive) one.pcs[l] = one.pc;
      one.diverged = true;
    }
    return together;
  }
  if (!one.diverged) {  // all are here, and wait for members of other masks: they will never come
    FOR_ACTIVE(one.alive) one.pcs[l] = one.pc;
    one.diverged = true;
  }
  one.blocked |= together;
  return 0;
}

void Machine::execute(Warp& one, const Instruction& instruction, Lanes group) {
  Lanes mask = group;
  if (instruction.guard >= 0) {
    const Lanes guard = one.predicates[instruction.guard];
    mask &= instruction.guard_negated ? ~guard : guard;
  }
  ++one.executed;
  ++counts.warp_instructions;
  counts.thread_instructions += __builtin_popcount(group);
  one.branching = 0;
  if (mask == 0) return;
  if (const Counter counter = counter_of(instruction.counted)) ++(counts.*counter);
  if (instruction.convergence != Convergence::kFree && mask != group) check_guard(*this, instruction, mask, group);
  if (one.alive != kAllLanes && instruction.convergence == Convergence::kAligned) check_whole(*this, one, instruction);
  if (one.wgmma_pending > 0) check_registers(*this, one, instruction);
  instruction.handler(*this, one, instruction, mask);
  if (one.failed_waits > 0 && !yields && is_progress(instruction)) one.failed_waits = 0;
  if (one.block->grid->program->has_wgmma && is_access(instruction, options.races))
    for (const PtxOperand& operand : instruction.flat)
      if (is_register(operand)) one.last_access[operand.index] = one.executed;
}

void Machine::advance(Warp& one, const Instruction& instruction, u32 from, Lanes group) {
  group &= one.alive;
  const Lanes taken = one.branching & one.alive;
  const u32* targets = one.targets;
  one.targets = nullptr;
  if (!one.diverged && targets == nullptr && (taken == 0 || taken == one.alive)) {
    one.pc = taken != 0 ? u32(instruction.target) : from + 1;
    return;
  }
  if (!one.diverged) {
    FOR_LANES one.pcs[l] = from;
    one.diverged = true;
    one.blocked = 0;
  }
  FOR_ACTIVE(group)
  one.pcs[l] = !(taken >> l & 1) ? one.pcs[l] + 1 : targets != nullptr ? targets[l] : u32(instruction.target);
  one.blocked &= ~group;
  const u32 first = one.pcs[__builtin_ctz(one.alive)];
  if (same_pc(one, first) == one.alive && (one.at_barrier == 0 || one.at_barrier == one.alive)) {
    one.diverged = false;
    one.pc = first;
    one.blocked = 0;
    return;
  }
  // a lane that comes to where others wait may complete their group: they look again
  Lanes arrived = 0;
  FOR_ACTIVE(one.blocked) if (same_pc(one, one.pcs[l]) & group) arrived |= 1u << l;
  one.blocked &= ~arrived;
}

void Machine::exited(Warp& one, Lanes exiting) {
  check_exit(*this, one, exiting);
  one.blocked = 0;
  Block& block = *one.block;
  for (int id = 0; id < kNamedBarriers; ++id) try_release(*this, block, id);
  try_release_cluster(*this, *block.cluster);
  if (one.alive != 0) return;
  one.state = State::kDone;
  if (++block.warps_done == block.num_warps) block_exited(block);
}

}  // namespace fused_resnet::ptx
