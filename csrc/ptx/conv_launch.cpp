#include "ptx/conv_launch.h"

#include <cstring>
#include <string>

#include "cuda/conv_arguments.h"
#include "cuda/sm80/grouped_tiles.h"
#include "cuda/sm80/tile_layout.h"
#include "cuda/sm80/tiles.h"
#include "cuda/sm90/tensor_maps.h"

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

ConvArguments arguments_of(const PtxConv& conv, const ConvShape& shape) {
  ConvArguments args{};
  args.shape = shape;
  args.epilogue = epilogue_of(conv);
  args.x = conv.x, args.weight = conv.weight, args.out = conv.out;
  args.splits = conv.splits, args.partials = conv.partials;
  args.has_vector_rows = has_vector_rows(args, conv.element_bytes);
  return args;
}

PtxTensorMap described(const sm90::MapPlan& plan) {
  PtxTensorMap map{};
  map.rank = static_cast<uint8_t>(plan.rank);
  map.swizzle = static_cast<uint8_t>(plan.swizzle), map.is_im2col = plan.is_im2col;
  map.pixels = static_cast<uint16_t>(plan.pixels), map.channels = static_cast<uint16_t>(plan.channels);
  for (int d = 0; d < plan.rank; ++d) {
    map.sizes[d] = plan.sizes[d];
    if (d > 0) map.strides[d - 1] = plan.strides[d - 1];
    map.box[d] = static_cast<uint16_t>(plan.box[d]);
    map.element_strides[d] = static_cast<uint8_t>(plan.element_strides[d]);
  }
  for (int d = 0; d < 2; ++d) {
    map.lower[d] = static_cast<int16_t>(plan.lower[d]), map.upper[d] = static_cast<int16_t>(plan.upper[d]);
  }
  return map;
}

// What csrc/cuda/sm80/conv_bn_act.cu does before it starts a kernel.
std::string fill_sm80(const PtxConv& conv, const DeviceLimits& device, const ConvArguments& args,
                      PtxConvLaunch* launch) {
  const Tile& tile = kTiles[conv.tile];
  const int element = conv.element_bytes, chunk = 16 / element;
  const ConvShape& shape = args.shape;
  const int bytes = copy_bytes(shape.group_channels, element, address(conv.x) | address(conv.weight));
  if (std::string reason = why_span_too_long(shape, offset_unit(bytes, element)); !reason.empty()) return reason;
  if (const char* reason = why_illegal(tile, device, bytes == 16)) return reason;
  launch->blocks = num_blocks(tile, gemm_size(shape, element)) * conv.splits;
  launch->sum_blocks = conv.splits > 1 ? num_sum_blocks(shape, chunk) : 0;
  launch->threads = num_threads(tile), launch->sum_threads = kSumThreads, launch->cluster = 1;
  launch->shared_bytes = smem_bytes(tile), launch->copy_bytes = bytes;
  return "";
}

// And sm90/conv_bn_act.cu.
std::string fill_sm90(const PtxConv& conv, const DeviceLimits& device, const ConvArguments& args,
                      PtxConvLaunch* launch) {
  const sm90::Tile& tile = sm90::kTiles[conv.tile - sm90::kFirstTile];
  std::string reason = sm90::why_not_launched(args, tile, conv.element_bytes, device);
  if (!reason.empty()) return reason;
  launch->blocks = sm90::num_blocks(tile, args.shape, device.num_sms);
  launch->threads = sm90::num_threads(tile), launch->cluster = tile.cluster;
  launch->shared_bytes = sm90::smem_bytes(tile, conv.element_bytes);
  const sm90::MapPlans plans = sm90::tensor_maps(args, tile, conv.element_bytes);
  launch->num_maps = sm90::kNumMaps;
  for (int i = 0; i < sm90::kNumMaps; ++i) launch->maps[i] = described(plans.maps[i]);
  return "";
}

// And sm80/grouped.cu.
std::string fill_grouped(const PtxConv& conv, const DeviceLimits& device, ConvArguments* args, PtxConvLaunch* launch) {
  const grouped::Tile& tile = grouped::kTiles[conv.tile - grouped::kFirstTile];
  const int element = conv.element_bytes;
  std::string reason = grouped::why_not_launched(*args, tile, element, device);
  if (!reason.empty()) return reason;
  args->has_vector_rows = grouped::has_whole_quads(*args, element);
  launch->blocks = grouped::num_blocks(tile, args->shape, element, device);
  launch->threads = grouped::kThreads, launch->cluster = 1;
  launch->shared_bytes = grouped::smem_bytes(tile);
  launch->width = grouped::width(args->shape.group_channels, element);
  return "";
}

std::string fill(const PtxConv& conv, PtxConvLaunch* launch) {
  const int64_t* n = conv.sizes;
  const ConvSizes sizes{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13]};
  ConvShape shape{};
  if (std::string reason = derive(sizes, &shape); !reason.empty()) return reason;
  const bool is_sm90 = sm90::is_tile(conv.tile), is_grouped = grouped::is_tile(conv.tile);
  if (!is_sm90 && !is_grouped && (conv.tile < 0 || conv.tile >= kNumTiles))
    return "there is no tile " + std::to_string(conv.tile);
  const DeviceLimits device{conv.num_sms, conv.smem_per_block, conv.smem_per_block + kReservedSmemPerBlock,
                            conv.capability};
  ConvArguments args = arguments_of(conv, shape);
  static_assert(sizeof args <= sizeof launch->arguments, "the arguments fit");
  const std::string reason = is_sm90      ? fill_sm90(conv, device, args, launch)
                             : is_grouped ? fill_grouped(conv, device, &args, launch)
                                          : fill_sm80(conv, device, args, launch);
  launch->argument_bytes = sizeof args;
  std::memcpy(launch->arguments, &args, sizeof args);
  return reason;
}

}  // namespace
}  // namespace fused_resnet

extern "C" const char* ptx_conv_launch(const PtxConv* conv, PtxConvLaunch* launch) {
  thread_local std::string reason;
  reason = fused_resnet::fill(*conv, launch);
  return reason.empty() ? nullptr : reason.c_str();
}

extern "C" int32_t ptx_tile(int32_t index, int32_t element_bytes, PtxTile* tile) {
  using namespace fused_resnet;
  if (sm90::is_tile(index)) {
    const sm90::Tile& t = sm90::kTiles[index - sm90::kFirstTile];
    *tile = {t.block_m, t.block_n, t.stages, t.cluster, sm90::num_threads(t), sm90::smem_bytes(t, element_bytes)};
    return 1;
  }
  if (grouped::is_tile(index)) {
    const grouped::Tile& t = grouped::kTiles[index - grouped::kFirstTile];
    const int channels = grouped::slab_channels(element_bytes);
    *tile = {t.lines * t.columns, channels, grouped::kStages, 1, grouped::kThreads, grouped::smem_bytes(t)};
    return 1;
  }
  if (index < 0 || index >= kNumTiles) return 0;
  const Tile& t = kTiles[index];
  *tile = {t.block_m, t.block_n, t.stages, 1, num_threads(t), smem_bytes(t)};
  return 1;
}
