#include "ptx/conv_launch.h"

#include <cstring>
#include <string>

#include "cuda/conv_arguments.h"
#include "cuda/sm80/tile_layout.h"
#include "cuda/sm80/tiles.h"

namespace fused_resnet {
namespace {

uintptr_t address(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

EpilogueArguments epilogue_of(const PtxConv& conv) {
  const auto vector = [&](int i) { return ChannelVector{conv.vectors[i], static_cast<Dtype>(conv.vector_dtypes[i])}; };
  return {vector(0),
          vector(1),
          vector(2),
          vector(3),
          vector(4),
          conv.eps,
          static_cast<Activation>(conv.activation),
          conv.residual,
          conv.residual_scale,
          conv.low,
          conv.high,
          conv.residual_sign};
}

// What csrc/cuda/sm80/conv_bn_act.cu does before it starts a kernel.
std::string fill(const PtxConv& conv, PtxConvLaunch* launch) {
  const int64_t* n = conv.sizes;
  const ConvSizes sizes{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13]};
  ConvArguments args{};
  if (std::string reason = derive(sizes, &args.shape); !reason.empty()) return reason;
  if (conv.tile < 0 || conv.tile >= kNumTiles) return "there is no tile " + std::to_string(conv.tile);
  const Tile& tile = kTiles[conv.tile];
  const int element = conv.element_bytes, chunk = 16 / element;
  const ConvShape& shape = args.shape;
  const int bytes = copy_bytes(shape.group_channels, element, address(conv.x) | address(conv.weight));
  if (std::string reason = why_span_too_long(shape, offset_unit(bytes, element)); !reason.empty()) return reason;
  const DeviceLimits device{1, conv.smem_per_block, conv.smem_per_block + kReservedSmemPerBlock, conv.capability};
  if (const char* reason = why_illegal(tile, device, bytes == 16)) return reason;

  args.epilogue = epilogue_of(conv);
  args.x = conv.x, args.weight = conv.weight, args.out = conv.out;
  const uintptr_t written = address(conv.out) | address(conv.residual) | address(conv.partials);
  args.has_vector_rows = shape.group_filters % chunk == 0 && written % 16 == 0;
  args.splits = conv.splits, args.partials = conv.partials;

  launch->blocks = num_blocks(tile, gemm_size(shape, element)) * conv.splits;
  launch->sum_blocks = conv.splits > 1 ? num_sum_blocks(shape, chunk) : 0;
  launch->threads = num_threads(tile), launch->sum_threads = kSumThreads;
  launch->shared_bytes = smem_bytes(tile), launch->copy_bytes = bytes;
  launch->argument_bytes = sizeof args;
  static_assert(sizeof args <= sizeof launch->arguments, "the arguments fit");
  std::memcpy(launch->arguments, &args, sizeof args);
  return "";
}

}  // namespace
}  // namespace fused_resnet

extern "C" const char* ptx_conv_launch(const PtxConv* conv, PtxConvLaunch* launch) {
  thread_local std::string reason;
  reason = fused_resnet::fill(*conv, launch);
  return reason.empty() ? nullptr : reason.c_str();
}
