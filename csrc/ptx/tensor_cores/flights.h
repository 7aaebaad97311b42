// Registers of one warp that wgmma.mma_async instructions in flight write, or read as A.
#pragma once

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

// What wgmma did to the registers of a warp, and what it will have done to those in flight.
struct WgmmaRegisters {
  struct Use {
    u64 time = 0;                  // Warp::executed, of the last one
    u32 shape = 0;                 // of the last one; 0: as A
    u32 writers = 0, readers = 0;  // in flight, as D and as A
  };
  std::vector<Use> uses;       // by register
  std::vector<u64> values;     // [register][lane] of those in flight; the registers themselves are poisoned
  std::vector<bool> is_apart;  // whether a register's value is there
};

// The three parts of an instruction's operands that matter here.
struct Flight {
  const Instruction* instruction;
  bool has_a;  // A in registers
  u32 shape;   // not 0
};

// At issue: reports accesses without a wgmma.fence between, and registers in flight that may not be touched.
void check_flight(Machine& machine, Warp& warp, const Flight& flight);
// From now on the registers are in flight. `apart`: what they hold is hidden until the wait.
void take_off(Warp& warp, const Flight& flight, bool apart);
void land_registers(Warp& warp, const Flight& flight);
u64* accumulator(Warp& warp, int index);  // where the value is that the next wgmma adds to

}  // namespace fused_resnet::ptx
