// How the blocked kernels lay out what they read and write. No torch here.
//
// Activations are [image][block][pixel][lane]: a pixel of a block is 64 bytes, 64 channels in int8, 32 in bf16 or 16 in
// fp32, so that neighbouring pixels are the rows of an A tile. The map has `halo` pixels of zeros on each side. Lines
// are `pitch` pixels apart, and the zeros to the right of one are those to the left of the next. Channels beyond C are
// zero within a panel. In int8 the last block may have a half beyond the last panel: it holds anything, and meets
// zeros.
//
// Weights are [panel][k step][half][16 x 64 bytes], in the order in which they are used. A panel is 32 output channels,
// a half 16 of them. A k step is a tap and a block of input channels, blocks outermost. Its 64-byte rows are one input
// channel x 16 output channels in fp32. In bf16 they are pairs of input channels x 16, as [output][pair], and in int8
// fours of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "common/inline.h"
#include "cpu/dispatch.h"

namespace fused_resnet {
namespace blocked {

// A dtype of these kernels alone: bytes, unsigned or signed as each step says.
constexpr Dtype kInt8 = static_cast<Dtype>(3);

constexpr int64_t kPixelBytes = 64, kPanel = 32, kHalf = 16, kHalfBytes = 1024, kStepBytes = 2 * kHalfBytes;

struct Layout {
  int64_t N, C, H, W, halo, pitch;
  int64_t lanes;  // channels in a block

  // Whole panels of channels are kept, but a reduction reads only the blocks that have some of C.
  int64_t blocks() const {
    const int64_t unit = std::max(kPanel, lanes);
    return (C + unit - 1) / unit * (unit / lanes);
  }
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

// Lines [begin, end), counted over all images, to NHWC. A channel has 64 / lanes bytes.
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

// The same of bytes, as float(q) * scale.
template <class Byte>
FUSED_RESNET_INLINE void to_floats(const Layout& l, const char* buffer, float scale, int64_t begin, int64_t end,
                                   float* nhwc) {
  for (int64_t line = begin; line < end; ++line) {
    for (int64_t block = 0; block < l.used_blocks(); ++block) {
      const auto* from = reinterpret_cast<const Byte*>(buffer + l.at(line / l.H, block, line % l.H, 0));
      const int64_t count = std::min(l.C - block * l.lanes, l.lanes);
      float* to = nhwc + line * l.W * l.C + block * l.lanes;
      for (int64_t w = 0; w < l.W; ++w, from += kPixelBytes, to += l.C) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]) * scale;
      }
    }
  }
}

inline void to_floats_anywhere(const Layout& l, const char* buffer, float scale, bool is_signed, int64_t begin,
                               int64_t end, float* nhwc) {
  is_signed ? to_floats<int8_t>(l, buffer, scale, begin, end, nhwc)
            : to_floats<uint8_t>(l, buffer, scale, begin, end, nhwc);
}

FUSED_RESNET_AVX2 inline void to_floats_avx2(const Layout& l, const char* buffer, float scale, bool is_signed,
                                             int64_t begin, int64_t end, float* nhwc) {
  is_signed ? to_floats<int8_t>(l, buffer, scale, begin, end, nhwc)
            : to_floats<uint8_t>(l, buffer, scale, begin, end, nhwc);
}

// A convolution of stride s meets, at each tap, every s-th line, and every s-th pixel of it: a phase of the map. With
// the phases as maps of their own its strides are 1, and its tiles can run on over the ends of lines.
//
// One side of a window. Tap t meets pixel `shift[t]` from the output's own, in the phase that is `phases[which[t]]`.
struct PhasedSide {
  std::vector<int64_t> phases, which, shift;

  PhasedSide(int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t at = tap * dilation - padding, phase = (at % stride + stride) % stride;
      const auto known = std::find(phases.begin(), phases.end(), phase);
      which.push_back(known - phases.begin());
      shift.push_back((at - phase) / stride);
      if (known == phases.end()) phases.push_back(phase);
    }
  }
};

struct Phases {
  PhasedSide h, w;
  int64_t stride_h, stride_w;

  int64_t count() const { return static_cast<int64_t>(h.phases.size() * w.phases.size()); }
  int64_t index(int64_t r, int64_t s) const { return h.which[r] * static_cast<int64_t>(w.phases.size()) + w.which[s]; }
};

// Planes [begin, end) of `to`: (image, phase, block of from). Zeros where the map has ended.
inline void split_phases(const Layout& from, const Phases& p, const Layout& to, const char* in, int64_t begin,
                         int64_t end, char* out) {
  const int64_t blocks = from.blocks(), across = static_cast<int64_t>(p.w.phases.size());
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / to.blocks(), plane = index % to.blocks(), block = plane % blocks;
    const int64_t first_h = p.h.phases[plane / blocks / across], first_w = p.w.phases[plane / blocks % across];
    const int64_t width = std::clamp<int64_t>((from.W - first_w + p.stride_w - 1) / p.stride_w, 0, to.W);
    for (int64_t i = 0; i < to.H; ++i) {
      const int64_t h = i * p.stride_h + first_h, pixels = h < from.H ? width : 0;
      char* line = out + to.at(image, plane, i, 0);
      if (pixels > 0) {
        const char* pixel = in + from.at(image, block, h, first_w);
        for (int64_t j = 0; j < pixels; ++j) {
          std::memcpy(line + j * kPixelBytes, pixel + j * p.stride_w * kPixelBytes, kPixelBytes);
        }
      }
      std::memset(line + pixels * kPixelBytes, 0, (to.W - pixels) * kPixelBytes);
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
