// Operands of a whole warp.
#pragma once

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

#define FOR_LANES for (int l = 0; l < kLanes; ++l)
#define FOR_ACTIVE(mask)           \
  for (int l = 0; l < kLanes; ++l) \
    if ((mask) >> l & 1)

// A source's 32 values. `room` holds them where they are not a register's.
const u64* read(Machine& machine, Warp& warp, const PtxOperand& operand, u64* room);
// Where a destination's values go. `sink` takes those of `_`.
u64* destination(Warp& warp, const PtxOperand& operand, u64* sink);
Lanes read_predicate(Warp& warp, const PtxOperand& operand);
void write_predicate(Warp& warp, const PtxOperand& operand, Lanes value, Lanes mask);
u64 address(Warp& warp, const PtxOperand& operand, int lane);  // of a memory operand

// At load: refuses the instruction unless its operands are, one letter each:
// d a destination register (or `_`), s a source (register, immediate, special register), D and S vectors of those,
// q a destination predicate (or `_`), p a source predicate or a constant, i an immediate, m memory.
// Operands of several parts, as in `d|p`, have their letters in brackets: "(dq)ss".
void expect_operands(const Modifiers& modifiers, const Instruction& instruction, const char* shape);

// A number that depends on these alone, for what PTX leaves open but lets not change.
u32 of_seed(u64 seed, u64 salt);

template <class F>
void store(u64* to, Lanes mask, F value) {
  if (mask == kAllLanes) {
    FOR_LANES to[l] = value(l);
  } else {
    FOR_ACTIVE(mask) to[l] = value(l);
  }
}

}  // namespace fused_resnet::ptx
