// fence and membar.
#pragma once

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

void decode_fence(Modifiers& modifiers, Instruction& instruction);

}  // namespace fused_resnet::ptx
