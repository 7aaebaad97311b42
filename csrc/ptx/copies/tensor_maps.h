// Tensor maps where a kernel finds them (PTX ISA 5.5.8).
#pragma once

#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {

constexpr u32 kMapBytes = 128;
static_assert(sizeof(PtxTensorMap) == kMapBytes, "a map is as large as a real one");

// The map at a generic address, checked, and where it lies if that is global memory; else 0.
PtxTensorMap map_at(Machine& machine, Warp& warp, int lane, u64 address, u64* global);

void decode_tensormap(Modifiers&, Instruction&);        // tensormap.replace, tensormap.cp_fenceproxy
void decode_tensormap_fence(Modifiers&, Instruction&);  // fence.proxy.tensormap::generic

}  // namespace fused_resnet::ptx
