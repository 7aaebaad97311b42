// Launches the convolution kernel of a tile, and says which tiles a device can run.
#include <stdexcept>
#include <string>

#include "cuda/configs.h"
#include "cuda/launchers.h"
#include "cuda/launching.h"
#include "cuda/sm80/conv_bn_act.cuh"

namespace fused_resnet {
namespace {

void check_capability(int device) {
  if (capability(device) < 80) {
    throw std::runtime_error("cuda_conv_bn_act: compute capability 8.0 or later is needed.");
  }
}

uintptr_t address(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

template <class Element, int kTileIndex, int kCopyBytes>
void launch(const ConvArguments& args, int device, cudaStream_t stream, int64_t blocks) {
  constexpr int kSmemBytes = smem_bytes(kTiles[kTileIndex]);
  constexpr auto kernel = conv_bn_act_kernel<Element, kTileIndex, kCopyBytes>;
  reserve_shared_memory<kernel>(kSmemBytes, device);
  kernel<<<static_cast<unsigned>(blocks), num_threads(kTiles[kTileIndex]), kSmemBytes, stream>>>(args);
  check(cudaGetLastError(), "launch failed");
}

// The kernel of run-time index `tile`, counting up to it at compile time.
template <class Element, int kTileIndex = 0>
void launch_tile(int tile, int bytes, const ConvArguments& args, int device, cudaStream_t stream, int64_t blocks) {
  if constexpr (kTileIndex < kNumTiles) {
    if (tile != kTileIndex) {
      launch_tile<Element, kTileIndex + 1>(tile, bytes, args, device, stream, blocks);
    } else if (bytes == kChunkBytes) {
      launch<Element, kTileIndex, kChunkBytes>(args, device, stream, blocks);
    } else if constexpr (kTiles[kTileIndex].any_alignment) {
      if (bytes == 8) {
        launch<Element, kTileIndex, 8>(args, device, stream, blocks);
      } else {
        launch<Element, kTileIndex, 0>(args, device, stream, blocks);
      }
    }
  }
}

template <class Element>
void launch_element(ConvArguments args, int tile, int device, cudaStream_t stream) {
  constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Element));
  const ConvShape& s = args.shape;
  const int bytes = copy_bytes(s.group_channels, sizeof(Element), address(args.x) | address(args.weight));
  args.has_vector_rows = has_vector_rows(args, sizeof(Element));

  const std::string reason = why_span_too_long(s, offset_unit(bytes, sizeof(Element)));
  if (!reason.empty()) throw std::runtime_error("cuda_conv_bn_act: " + reason + ".");
  const GemmSize size = gemm_size(s, sizeof(Element));
  if (const char* reason = why_illegal(kTiles[tile], device_limits(device), bytes == kChunkBytes)) {
    throw std::runtime_error("cuda_conv_bn_act: tile " + std::to_string(tile) + " cannot run this: " + reason + ".");
  }
  const int64_t blocks = num_blocks(kTiles[tile], size) * args.splits;
  if (blocks > INT32_MAX) throw std::runtime_error("cuda_conv_bn_act: the output needs more than 2^31 - 1 blocks.");
  const int64_t sum_blocks = args.splits > 1 ? num_sum_blocks(s, kChunk) : 0;
  if (sum_blocks > INT32_MAX / kSumThreads) {
    throw std::runtime_error("cuda_conv_bn_act: the output has too many values for split sums.");
  }
  launch_tile<Element>(tile, bytes, args, device, stream, blocks);
  if (sum_blocks > 0) {
    sum_splits_kernel<Element><<<static_cast<unsigned>(sum_blocks), kSumThreads, 0, stream>>>(args);
    check(cudaGetLastError(), "launch failed");
  }
}

}  // namespace

std::vector<ConvConfig> conv_bn_act_configs(const ConvShape& shape, int element_bytes, bool is_aligned, int device) {
  auto configs = legal_configs(shape, element_bytes, device_limits(device), is_aligned, sm90::is_built());
  if (configs.empty()) throw std::runtime_error("cuda_conv_bn_act: no tile fits this device's shared memory.");
  return configs;
}

void launch_conv_bn_act(const ConvArguments& args, int tile, Dtype dtype, int device, void* stream) {
  check_capability(device);
  if (num_rows(args.shape) == 0) return;
  if (sm90::is_tile(tile)) return sm90::launch_conv_bn_act(args, tile, dtype, device, stream);
  if (grouped::is_tile(tile)) return grouped::launch_conv_bn_act(args, tile, dtype, device, stream);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kFloat32:
      launch_element<float>(args, tile, device, cuda_stream);
      break;
    case Dtype::kFloat16:
      launch_element<Half>(args, tile, device, cuda_stream);
      break;
    case Dtype::kBFloat16:
      launch_element<BFloat16>(args, tile, device, cuda_stream);
      break;
  }
}

void launch_conv_int8(const ConvArguments& args, int tile, bool is_signed, int device, void* stream) {
  check_capability(device);
  if (num_rows(args.shape) == 0) return;
  if (sm90::is_tile(tile)) return sm90::launch_conv_int8(args, tile, is_signed, device, stream);
  if (grouped::is_tile(tile)) {
    throw std::runtime_error("cuda_conv_bn_act: tile " + std::to_string(tile) +
                             " cannot run this: it is not compiled for elements of one byte.");
  }
  const auto launch = is_signed ? launch_element<int8_t> : launch_element<uint8_t>;
  launch(args, tile, device, static_cast<cudaStream_t>(stream));
}

}  // namespace fused_resnet
