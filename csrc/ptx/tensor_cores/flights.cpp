// Rules for the registers of wgmma (PTX ISA 9.7.15.7.1, wgmma.fence; 9.7.15.7.3, wgmma.wait_group).
//
// A register is in flight if a wgmma writes it, or reads it as A. It may be touched only as D of another wgmma of the
// same shape, or as A once more. Any other access is undefined until wgmma.wait_group; then it is as any register.
#include "ptx/tensor_cores/flights.h"

#include <algorithm>

#include "ptx/tensor_cores/wgmma.h"

namespace fused_resnet::ptx {
namespace {

constexpr u64 kPoison = 0x7fff7fff;  // NaN of .f32 and of .f16x2, and a large .s32

WgmmaRegisters& registers_of(Warp& warp) {
  if (!warp.wgmma_registers) {
    const size_t count = warp.in_flight.size();
    warp.wgmma_registers = std::make_shared<WgmmaRegisters>();
    warp.wgmma_registers->uses.resize(count);
    warp.wgmma_registers->values.resize(count * kLanes);
    warp.wgmma_registers->is_apart.resize(count);
  }
  return *warp.wgmma_registers;
}

template <class F>
void for_operand(const Instruction& instruction, int operand, F f) {
  for (int j = 0; j < instruction.count(operand); ++j) {
    const PtxOperand& part = instruction.at(operand, j);
    if (part.kind == kRegister) f(part.index);
  }
}

// Any access before the last wgmma.fence is ordered; later ones are, as D of the same shape. To read A twice harms
// nothing, but the text excepts accumulators only.
bool is_ordered(const Machine& machine, const Warp& warp, const WgmmaRegisters& registers, int index, u32 shape) {
  if (warp.last_access[index] > warp.fenced_at) return false;
  const WgmmaRegisters::Use& use = registers.uses[index];
  const bool is_excepted = use.shape == shape && (shape != 0 || machine.options.races < 2);
  return use.time <= warp.fenced_at || is_excepted;
}

// A register's writers in flight all have one shape: that of its last use as D.
bool may_write(const WgmmaRegisters::Use& use, u32 shape) {
  return use.readers == 0 && (use.writers == 0 || use.shape == shape);
}

void use(Warp& warp, int index, u32 shape) {
  WgmmaRegisters::Use& use = warp.wgmma_registers->uses[index];
  use.time = warp.executed;
  use.shape = shape;
  ++(shape == 0 ? use.readers : use.writers);
  warp.in_flight[index] = 1;
}

bool release(Warp& warp, int index, bool as_a) {  // whether nothing writes the register any more
  WgmmaRegisters::Use& use = warp.wgmma_registers->uses[index];
  --(as_a ? use.readers : use.writers);
  warp.in_flight[index] = use.readers + use.writers > 0;
  return use.writers == 0;
}

}  // namespace

void check_flight(Machine& machine, Warp& warp, const Flight& flight) {
  const WgmmaRegisters& registers = registers_of(warp);
  if (warp.fenced_at == 0) machine.report("wgmma fence", "no wgmma.fence before the first wgmma.mma_async");
  bool ordered = true, free_d = true, free_a = true;
  for_operand(*flight.instruction, 0, [&](int index) {
    const bool is_free = may_write(registers.uses[index], flight.shape);
    free_d = free_d && is_free;
    ordered = ordered && (!is_free || is_ordered(machine, warp, registers, index, flight.shape));
  });
  if (flight.has_a) {
    for_operand(*flight.instruction, 1, [&](int index) {
      const bool is_free = registers.uses[index].writers == 0;
      free_a = free_a && is_free;
      ordered = ordered && (!is_free || is_ordered(machine, warp, registers, index, 0));
    });
  }
  if (!free_d) machine.report("wgmma wait", "D is in flight as A, or as D of another shape");
  if (!free_a) machine.report("wgmma wait", "A is in flight as the D of another wgmma");
  if (!ordered) machine.report("wgmma fence", "D or A was accessed after the last wgmma.fence");
}

void take_off(Warp& warp, const Flight& flight, bool apart) {
  WgmmaRegisters& registers = registers_of(warp);
  if (flight.has_a) for_operand(*flight.instruction, 1, [&](int index) { use(warp, index, 0); });
  for_operand(*flight.instruction, 0, [&](int index) {
    use(warp, index, flight.shape);
    if (!apart || registers.is_apart[index]) return;
    u64* values = warp.of(index);
    std::copy(values, values + kLanes, &registers.values[index * kLanes]);
    std::fill(values, values + kLanes, kPoison);
    registers.is_apart[index] = true;
  });
}

void land_registers(Warp& warp, const Flight& flight) {
  WgmmaRegisters& registers = registers_of(warp);
  if (flight.has_a) for_operand(*flight.instruction, 1, [&](int index) { release(warp, index, true); });
  for_operand(*flight.instruction, 0, [&](int index) {
    if (!release(warp, index, false) || !registers.is_apart[index]) return;
    const u64* values = &registers.values[index * kLanes];
    std::copy(values, values + kLanes, warp.of(index));
    registers.is_apart[index] = false;
  });
}

u64* accumulator(Warp& warp, int index) {
  WgmmaRegisters& registers = registers_of(warp);
  return registers.is_apart[index] ? &registers.values[index * kLanes] : warp.of(index);
}

void check_registers(Machine& machine, Warp& warp, const Instruction& instruction) {
  if (instruction.counted == Class::kWgmma) return;  // these know better
  for (const PtxOperand& operand : instruction.flat) {
    const bool is_register = operand.kind == kRegister || operand.kind == kMemory;
    if (is_register && operand.index >= 0 && warp.in_flight[operand.index])
      return machine.report("wgmma wait", "a register of a wgmma is used that has not been waited for");
  }
}

}  // namespace fused_resnet::ptx
