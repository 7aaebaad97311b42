// Launches the grouped 3x3 convolution.
#include <stdexcept>
#include <string>

#include "cuda/launchers.h"
#include "cuda/launching.h"
#include "cuda/sm80/grouped.cuh"

namespace fused_resnet {
namespace grouped {
namespace {

template <class Element, int kTileIndex, int kWidth>
void launch_width(const ConvArguments& args, const DeviceLimits& limits, int device, cudaStream_t stream) {
  constexpr int kSmemBytes = smem_bytes(kTiles[kTileIndex]);
  constexpr auto kernel = grouped_conv_kernel<Element, kTileIndex, kWidth>;
  reserve_shared_memory<kernel>(kSmemBytes, device);
  const int64_t blocks = num_blocks(kTiles[kTileIndex], args.shape, sizeof(Element), limits);
  kernel<<<static_cast<unsigned>(blocks), kThreads, kSmemBytes, stream>>>(args);
  check(cudaGetLastError(), "launch failed");
}

// The kernel of run-time index `tile` and of the shape's width, counting up to them at compile time.
template <class Element, int kTileIndex = 0, int kWidth = width(1, sizeof(Element))>
void launch_tile(int tile, const ConvArguments& args, const DeviceLimits& limits, int device, cudaStream_t stream) {
  if constexpr (kTileIndex < kNumTiles && kWidth <= kMostWidth && kWidth <= slab_channels(sizeof(Element))) {
    if (tile != kTileIndex) return launch_tile<Element, kTileIndex + 1, kWidth>(tile, args, limits, device, stream);
    if (width(args.shape.group_channels, sizeof(Element)) != kWidth)
      return launch_tile<Element, kTileIndex, 2 * kWidth>(tile, args, limits, device, stream);
    launch_width<Element, kTileIndex, kWidth>(args, limits, device, stream);
  }
}

template <class Element>
void launch(ConvArguments args, int tile, int device, void* stream) {
  const DeviceLimits limits = device_limits(device);
  const std::string reason = why_not_launched(args, kTiles[tile - kFirstTile], sizeof(Element), limits);
  if (!reason.empty()) {
    throw std::runtime_error("cuda_conv_bn_act: tile " + std::to_string(tile) + " cannot run this: " + reason + ".");
  }
  args.has_vector_rows = has_whole_quads(args, sizeof(Element));
  launch_tile<Element>(tile - kFirstTile, args, limits, device, static_cast<cudaStream_t>(stream));
}

}  // namespace

void launch_conv_bn_act(const ConvArguments& args, int tile, Dtype dtype, int device, void* stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<float>(args, tile, device, stream);
    case Dtype::kFloat16:
      return launch<Half>(args, tile, device, stream);
    case Dtype::kBFloat16:
      return launch<BFloat16>(args, tile, device, stream);
  }
}

}  // namespace grouped
}  // namespace fused_resnet
