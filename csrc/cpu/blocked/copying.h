// Maps copied into others: side by side, every s-th pixel of them, or each pixel several times. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/blocked/layout.h"

namespace fused_resnet {
namespace blocked {

// to[channel + c, p, q] = from[c, p / factor_h * stride_h, q / factor_w * stride_w]
struct Copying {
  int64_t channel, stride_h, stride_w, factor_h, factor_w;
  bool zeroes;  // all channels of `to` before
};

// Lines [begin, end) of `to`, counted over all images.
inline void copy_lines(const Layout& from, const Copying& c, const Layout& to, const char* in, int64_t begin,
                       int64_t end, char* out) {
  const int64_t channel_bytes = kPixelBytes / from.lanes;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / to.H, p = line % to.H, h = p / c.factor_h * c.stride_h;
    for (int64_t block = 0; c.zeroes && block < to.blocks(); ++block) {
      std::memset(out + to.at(n, block, p, 0), 0, to.W * kPixelBytes);
    }
    for (int64_t block = 0; block < from.used_blocks(); ++block) {
      const int64_t first = c.channel + block * from.lanes, into = first / to.lanes, at = first % to.lanes;
      const int64_t count = std::min(from.C - block * from.lanes, from.lanes), fitting = std::min(count, to.lanes - at);
      const char* source = in + from.at(n, block, h, 0);
      char* target = out + to.at(n, into, p, 0);
      for (int64_t q = 0; q < to.W; ++q) {
        const char* pixel = source + q / c.factor_w * c.stride_w * kPixelBytes;
        char* copy = target + q * kPixelBytes;
        if (fitting == from.lanes) {
          std::memcpy(copy, pixel, kPixelBytes);
          continue;
        }
        std::memcpy(copy + at * channel_bytes, pixel, fitting * channel_bytes);
        if (count > fitting) {  // the next block has the others
          std::memcpy(copy + to.plane_bytes(), pixel + fitting * channel_bytes, (count - fitting) * channel_bytes);
        }
      }
    }
  }
}

}  // namespace blocked
}  // namespace fused_resnet
