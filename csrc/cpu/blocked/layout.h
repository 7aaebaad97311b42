// How the blocked kernels lay out what they read and write. No torch here.
//
// Activations are [image][block][pixel][lane]: a pixel of a block is 64 bytes, 32 channels in bf16 or 16 in fp32, so
// that neighbouring pixels are the rows of an A tile. The map has `halo` pixels of zeros on each side. Lines are
// `pitch` pixels apart, and the zeros to the right of one are those to the left of the next. Channels beyond C are
// zero.
//
// Weights are [panel][k step][half][16 x 64 bytes], in the order in which they are used. A panel is 32 output channels,
// a half 16 of them. A k step is a tap and a block of input channels, blocks outermost. Its 64-byte rows are one input
// channel x 16 output channels in fp32, and a pair of input channels x 16, as [output][pair], in bf16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fused_resnet {
namespace blocked {

constexpr int64_t kPixelBytes = 64, kPanel = 32, kHalf = 16, kHalfBytes = 1024, kStepBytes = 2 * kHalfBytes;

struct Layout {
  int64_t N, C, H, W, halo, pitch;
  int64_t lanes;  // channels in a block

  // Whole panels of channels are kept, but a reduction reads only the blocks that have some of C.
  int64_t blocks() const { return (C + kPanel - 1) / kPanel * (kPanel / lanes); }
  int64_t used_blocks() const { return (C + lanes - 1) / lanes; }
  int64_t pixels() const { return (H + 2 * halo - 1) * pitch + W + 2 * halo; }
  int64_t plane_bytes() const { return pixels() * kPixelBytes; }
  int64_t image_bytes() const { return blocks() * plane_bytes(); }
  int64_t bytes() const { return N * image_bytes(); }

  // Of pixel (h, w) in a plane; in the halo where one of them is outside of the map.
  int64_t pixel(int64_t h, int64_t w) const { return ((h + halo) * pitch + w + halo) * kPixelBytes; }
  int64_t at(int64_t n, int64_t block, int64_t h, int64_t w) const {
    return n * image_bytes() + block * plane_bytes() + pixel(h, w);
  }
};

// Lines [begin, end), counted over all images, from and to NHWC. A channel has 64 / lanes bytes.
inline void from_nhwc(const Layout& l, const char* nhwc, int64_t begin, int64_t end, char* buffer) {
  const int64_t channel_bytes = kPixelBytes / l.lanes;
  for (int64_t line = begin; line < end; ++line) {
    for (int64_t block = 0; block < l.blocks(); ++block) {
      const char* from = nhwc + (line * l.W * l.C + block * l.lanes) * channel_bytes;
      const int64_t bytes = std::clamp<int64_t>(l.C - block * l.lanes, 0, l.lanes) * channel_bytes;
      char* to = buffer + l.at(line / l.H, block, line % l.H, 0);
      for (int64_t w = 0; w < l.W; ++w, from += l.C * channel_bytes, to += kPixelBytes) {
        if (bytes == kPixelBytes) {
          std::memcpy(to, from, kPixelBytes);
        } else {
          std::memset(to, 0, kPixelBytes);
          if (bytes > 0) std::memcpy(to, from, bytes);
        }
      }
    }
  }
}

inline void to_nhwc(const Layout& l, const char* buffer, int64_t begin, int64_t end, char* nhwc) {
  const int64_t channel_bytes = kPixelBytes / l.lanes;
  for (int64_t line = begin; line < end; ++line) {
    for (int64_t block = 0; block < l.used_blocks(); ++block) {
      const char* from = buffer + l.at(line / l.H, block, line % l.H, 0);
      const int64_t bytes = std::min(l.C - block * l.lanes, l.lanes) * channel_bytes;
      char* to = nhwc + (line * l.W * l.C + block * l.lanes) * channel_bytes;
      for (int64_t w = 0; w < l.W; ++w, from += kPixelBytes, to += l.C * channel_bytes) std::memcpy(to, from, bytes);
    }
  }
}

// Everything in the planes [begin, end), counted over all images, that is no pixel of the map.
inline void zero_halo(const Layout& l, int64_t begin, int64_t end, char* buffer) {
  for (int64_t index = begin; index < end; ++index) {
    char* plane = buffer + index * l.plane_bytes();
    int64_t from = 0;
    for (int64_t h = 0; h < l.H; ++h) {
      std::memset(plane + from, 0, l.pixel(h, 0) - from);
      from = l.pixel(h, l.W);
    }
    std::memset(plane + from, 0, l.plane_bytes() - from);
  }
}

}  // namespace blocked
}  // namespace fused_resnet
