// How csrc/cuda's convolution would be launched, for whoever runs its PTX: the argument's bytes, grids and sizes.
#pragma once

#include <cstdint>

#include "ptx/interface.h"

extern "C" {

struct PtxConv {
  int64_t sizes[14];  // as ConvSizes of csrc/cuda/conv_shape.h
  const void *x, *weight, *residual;
  void* out;
  const void* vectors[5];  // bn_weight, bn_bias, bn_mean, bn_var, bias; or null
  int32_t vector_dtypes[5], element_bytes;
  float eps;
  int32_t activation, tile, splits;
  void* partials;  // splits x N P Q K
  int32_t capability, smem_per_block, num_sms;
  float residual_scale, low, high;  // of bytes
  uint32_t residual_sign;
};

struct PtxConvLaunch {
  int64_t blocks, sum_blocks;  // of the second kernel, which adds the parts up
  int32_t threads, sum_threads, shared_bytes, cluster;
  int32_t copy_bytes;  // the kernel's third template argument, of sm80's tiles
  int32_t width;       // and of the grouped ones
  int32_t argument_bytes;
  uint8_t arguments[512];  // a ConvArguments, what both kernels are given
  int32_t
      num_maps;  // that the kernel is given besides: of sm90's tiles x's, the weight's, the residual's, the output's
  PtxTensorMap maps[4];  // without their elements' type; no dimensions where it has none
};

// What a block of a tile computes at a time, and what it takes for that.
struct PtxTile {
  int32_t block_m, block_n, stages, cluster, threads, shared_bytes;
};

// Null, or why the launcher would refuse this; valid until this thread's next call.
__attribute__((visibility("default"))) const char* ptx_conv_launch(const PtxConv* conv, PtxConvLaunch* launch);

// Whether csrc/cuda has a tile of this index, which is then described.
__attribute__((visibility("default"))) int32_t ptx_tile(int32_t index, int32_t element_bytes, PtxTile* tile);
}
