// What the operators call: launchers without CUDA types, so that their callers compile with any C++ compiler.
// Each enqueues on `stream` (a cudaStream_t) of the current device and throws std::runtime_error on a CUDA error.
#pragma once

#include <cstdint>

#include "conv_arguments.h"

namespace fused_resnet {

// Into how many parts launch_conv_bn_act had best split the reduction on this device (ConvArguments::splits).
int conv_bn_act_splits(const ConvShape& shape, int element_bytes, int device);

// The operands' pointers need only the alignment of their elements. Throws if the device is older than sm_80.
void launch_conv_bn_act(const ConvArguments& args, Dtype dtype, int device, void* stream);

void launch_add_relu(const void* a, const void* b, void* out, int64_t numel, Dtype dtype, void* stream);
void launch_add_relu_backward(const void* grad, const void* out, void* grad_input, int64_t numel, Dtype dtype,
                              void* stream);

}  // namespace fused_resnet
