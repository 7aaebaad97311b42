// What the operators call: launchers without CUDA types, so that their callers compile with any C++ compiler.
// Each enqueues on `stream` (a cudaStream_t) of the current device and throws std::runtime_error on a CUDA error.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "cuda/conv_arguments.h"
#include "cuda/sm80/grouped_tiles.h"
#include "cuda/sm80/tiles.h"
#include "cuda/sm90/tiles.h"

namespace fused_resnet {

// What launch_conv_bn_act can run on this device, the cheapest first; never empty. is_aligned: x and weight start at
// multiples of 16 bytes.
std::vector<ConvConfig> conv_bn_act_configs(const ConvShape& shape, int element_bytes, bool is_aligned, int device);

// tile: of a legal config; of sm80's tiles args.splits may be any, and the operands' pointers need only the alignment
// of their elements.
// Throws if the device cannot run the tile, or is older than sm_80.
void launch_conv_bn_act(const ConvArguments& args, int tile, Dtype dtype, int device, void* stream);

// The same for elements of one byte: x is s8, or else u8.
void launch_conv_int8(const ConvArguments& args, int tile, bool is_signed, int device, void* stream);

namespace sm90 {

// Whether its kernels are in this library.
bool is_built();

// Throw with the reason where a config is not legal.
void launch_conv_bn_act(const ConvArguments& args, int tile, Dtype dtype, int device, void* stream);
void launch_conv_int8(const ConvArguments& args, int tile, bool is_signed, int device, void* stream);

}  // namespace sm90

namespace grouped {

// Throws with the reason where a config is not legal.
void launch_conv_bn_act(const ConvArguments& args, int tile, Dtype dtype, int device, void* stream);

}  // namespace grouped

void launch_add_relu(const void* a, const void* b, void* out, int64_t numel, Dtype dtype, void* stream);
void launch_add_relu_backward(const void* grad, const void* out, void* grad_input, int64_t numel, Dtype dtype,
                              void* stream);

}  // namespace fused_resnet
