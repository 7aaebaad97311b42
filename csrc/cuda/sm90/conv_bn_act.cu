// Launches the convolution for sm_90a. Compiled for that architecture alone, with FUSED_RESNET_SM90; where it is not
// among those that are built, without the kernels.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/launchers.h"
#include "cuda/launching.h"

#ifdef FUSED_RESNET_SM90
#include "cuda/sm90/conv_bn_act.cuh"
#include "cuda/sm90/tensor_maps.h"
#endif

namespace fused_resnet {
namespace sm90 {
namespace {

const std::string kRefusal = "cuda_conv_bn_act: tile ";

}  // namespace

#ifdef FUSED_RESNET_SM90

namespace {

// The driver's, found when it is first needed: the library is not linked with libcuda, which CPU machines lack.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  if (found == nullptr || result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("cuda_conv_bn_act: the driver has no ") + name +
                             "; one for CUDA 12 or later does.");
  }
  return reinterpret_cast<Function>(found);
}

TensorMap encoded(const MapPlan& plan, CUtensorMapDataType type) {
  if (plan.rank == 0) return {};  // nothing reads it
  static const auto tiled = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  constexpr auto kInterleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  const auto swizzle = plan.swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  constexpr auto kFill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;  // zeros
  CUtensorMap map;
  const auto rank = static_cast<cuuint32_t>(plan.rank);
  cuuint64_t sizes[4], strides[3];
  for (int d = 0; d < plan.rank; ++d) sizes[d] = plan.sizes[d];
  for (int d = 0; d < plan.rank - 1; ++d) strides[d] = plan.strides[d];
  void* address = const_cast<void*>(plan.address);
  const CUresult result = plan.is_im2col
                              ? im2col(&map, type, rank, address, sizes, strides, plan.lower, plan.upper, plan.channels,
                                       plan.pixels, plan.element_strides, kInterleave, swizzle, kPromotion, kFill)
                              : tiled(&map, type, rank, address, sizes, strides, plan.box, plan.element_strides,
                                      kInterleave, swizzle, kPromotion, kFill);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuda_conv_bn_act: the driver refuses a tensor map, error " +
                             std::to_string(static_cast<int>(result)) + ".");
  }
  TensorMap copied;
  static_assert(sizeof copied == sizeof map, "a tensor map's 128 bytes");
  std::memcpy(&copied, &map, sizeof map);
  return copied;
}

// The kernel of run-time index `tile`, counting up to it at compile time.
template <class Element, int kTileIndex = 0>
void launch_tile(int tile, const ConvArguments& args, CUtensorMapDataType type, const DeviceLimits& limits, int device,
                 cudaStream_t stream) {
  if constexpr (kTileIndex < kNumTiles) {
    if (tile != kTileIndex) return launch_tile<Element, kTileIndex + 1>(tile, args, type, limits, device, stream);
    constexpr Tile kTile = kTiles[kTileIndex];
    constexpr int kSmemBytes = smem_bytes(kTile, sizeof(Element));
    constexpr auto kernel = conv_bn_act_kernel<Element, kTileIndex>;
    reserve_shared_memory<kernel>(kSmemBytes, device);
    const auto blocks = static_cast<unsigned>(num_blocks(kTile, args.shape, limits.num_sms));
    const auto [maps] = tensor_maps(args, kTile, sizeof(Element));
    kernel<<<blocks, num_threads(kTile), kSmemBytes, stream>>>(args, encoded(maps[0], type), encoded(maps[1], type),
                                                               encoded(maps[2], type), encoded(maps[3], type));
    check(cudaGetLastError(), "launch failed");
  }
}

template <class Element>
void launch(ConvArguments args, int tile, CUtensorMapDataType type, int device, void* stream) {
  constexpr int kElementBytes = sizeof(Element);
  const DeviceLimits limits = device_limits(device);
  const std::string reason = why_not_launched(args, kTiles[tile - kFirstTile], kElementBytes, limits);
  if (!reason.empty()) throw std::runtime_error(kRefusal + std::to_string(tile) + " cannot run this: " + reason + ".");
  args.has_vector_rows = has_vector_rows(args, kElementBytes);
  launch_tile<Element>(tile - kFirstTile, args, type, limits, device, static_cast<cudaStream_t>(stream));
}

}  // namespace

bool is_built() {
  return true;
}

void launch_conv_bn_act(const ConvArguments& args, int tile, Dtype dtype, int device, void* stream) {
  switch (dtype) {
    case Dtype::kFloat16:
      return launch<Half>(args, tile, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, device, stream);
    case Dtype::kBFloat16:
      return launch<BFloat16>(args, tile, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, device, stream);
    case Dtype::kFloat32:
      throw std::runtime_error(kRefusal + std::to_string(tile) + " cannot run this: it is not compiled for float32.");
  }
}

void launch_conv_int8(const ConvArguments& args, int tile, bool is_signed, int device, void* stream) {
  const auto launch_bytes = is_signed ? launch<int8_t> : launch<uint8_t>;
  launch_bytes(args, tile, CU_TENSOR_MAP_DATA_TYPE_UINT8, device, stream);
}

#else

namespace {

constexpr char kNotBuilt[] = " cannot run: this build left out sm_90a. Build it with 9.0 in TORCH_CUDA_ARCH_LIST.";

}  // namespace

bool is_built() {
  return false;
}

void launch_conv_bn_act(const ConvArguments&, int tile, Dtype, int, void*) {
  throw std::runtime_error(kRefusal + std::to_string(tile) + kNotBuilt);
}

void launch_conv_int8(const ConvArguments&, int tile, bool, int, void*) {
  throw std::runtime_error(kRefusal + std::to_string(tile) + kNotBuilt);
}

#endif

}  // namespace sm90
}  // namespace fused_resnet
