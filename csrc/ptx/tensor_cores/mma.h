// mma.sync, as decode_matrix needs it.
#pragma once

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {

void decode_mma(Modifiers& modifiers, Instruction& instruction);
bool decode_small_mma(Modifiers& modifiers, Instruction& instruction);  // whether it was one of small_mma.cpp's
// Ends the launch unless all 32 lanes execute the instruction: what lacks one is undefined (PTX ISA 9.7.14.5,
// .aligned).
void expect_whole_warp(Machine& machine, Lanes mask);

}  // namespace fused_resnet::ptx
