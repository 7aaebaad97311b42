// wgmma as the rest of the machine sees it.
#pragma once

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

// Reports an instruction that touches registers of a wgmma.mma_async in flight (PTX ISA 9.7.15.7.3, wgmma.wait_group).
// To be called before each instruction of a warp while `wgmma_pending` is above 0.
void check_registers(Machine& machine, Warp& warp, const Instruction& instruction);
// Reports what a warp that has exited leaves pending, and a warpgroup whose warps did not do the same.
void check_wgmma_exit(Machine& machine, Warp& warp);

}  // namespace fused_resnet::ptx
