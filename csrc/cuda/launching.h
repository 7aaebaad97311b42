// What launchers ask of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/sm80/tiles.h"

namespace fused_resnet {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("cuda_conv_bn_act: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cannot query the device");
  return value;
}

inline int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

inline DeviceLimits device_limits(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), capability(device)};
}

// More than 48 KB of shared memory must be asked for, once per kernel and device.
template <auto kKernel>
void reserve_shared_memory(int bytes, int device) {
  static std::atomic<uint64_t> devices_done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device >= 64 || (devices_done.load(std::memory_order_relaxed) & bit) == 0) {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "cannot reserve shared memory");
    devices_done.fetch_or(device < 64 ? bit : 0, std::memory_order_relaxed);
  }
}

}  // namespace fused_resnet
