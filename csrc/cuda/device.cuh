// A thread's place in its block and the grid, and the block's shared memory, whatever the architecture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_resnet {

__device__ __forceinline__ int thread_index() {
  return threadIdx.x;
}
__device__ __forceinline__ int64_t block_index() {
  return blockIdx.x;
}
__device__ __forceinline__ int64_t num_grid_blocks() {
  return gridDim.x;
}
__device__ __forceinline__ int threads_per_block() {
  return blockDim.x;
}
__device__ __forceinline__ void sync_block() {
  __syncthreads();
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

}  // namespace fused_resnet
