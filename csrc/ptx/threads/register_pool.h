// setmaxnreg, as control.cpp needs it.
#pragma once

#include "ptx/program.h"

namespace fused_resnet::ptx {

void decode_setmaxnreg(Modifiers& modifiers, Instruction& instruction);

}  // namespace fused_resnet::ptx
