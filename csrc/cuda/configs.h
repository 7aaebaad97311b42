// Every way in which a device can compute a convolution, of all tables of tiles.
#pragma once

#include <utility>
#include <vector>

#include "cuda/sm80/grouped_tiles.h"
#include "cuda/sm80/tiles.h"
#include "cuda/sm90/tiles.h"

namespace fused_resnet {

// The cheapest first, by estimates. is_aligned: x and weight start at multiples of 16 bytes. has_sm90: its kernels are
// compiled.
inline std::vector<ConvConfig> legal_configs(const ConvShape& shape, int element_bytes, const DeviceLimits& device,
                                             bool is_aligned, bool has_sm90) {
  std::vector<RankedConfig> found;
  if (has_sm90) found = sm90::ranked_configs(shape, element_bytes, device, is_aligned);
  const auto slabs = grouped::ranked_configs(shape, element_bytes, device, is_aligned);
  found.insert(found.end(), slabs.begin(), slabs.end());
  const bool is_chunked = is_aligned && shape.group_channels * element_bytes % 16 == 0;
  const auto others = ranked_configs(gemm_size(shape, element_bytes), device, is_chunked);
  found.insert(found.end(), others.begin(), others.end());
  return in_order(std::move(found));
}

}  // namespace fused_resnet
