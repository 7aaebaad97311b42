// How a region's inputs come into blocks: from any strides, fp32 or as the map is, unfolded along their lines where a
// stem's few channels would not fill a block. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/inline.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/layout.h"
#include "cpu/dispatch.h"

namespace fused_resnet {
namespace blocked {

// rint(min(max(x * inverse, low), high)) as a byte, half to even; NaN gives low. The numbers lie where their neighbours
// in fp32 are one apart after kShift is added, and its lowest byte is theirs.
struct Quantizer {
  float inverse, low, high;

  FUSED_RESNET_INLINE uint8_t operator()(float x) const { return static_cast<uint8_t>(bits(x)); }

  // The lowest 22 of them are the number's.
  FUSED_RESNET_INLINE uint32_t bits(float x) const {
    constexpr float kShift = 12582912.f;  // 1.5 * 2^23
    float y = x * inverse;
    y = y > low ? y : low;
    y = y < high ? y : high;
    y += kShift;
    uint32_t found;
    std::memcpy(&found, &y, 4);
    return found;
  }
};

template <class To>
struct Cast {
  FUSED_RESNET_INLINE To operator()(float x) const { return static_cast<To>(x); }
};

// A tensor (n, c, h, w), its strides in elements.
struct Image {
  const char* base;
  int64_t C, H, W, stride_n, stride_c, stride_h, stride_w;
  Dtype dtype;
  Quantizer quantizer;  // in int8

  // Whether lines lie one after the other as the map's do, pixel by pixel.
  bool is_nhwc() const { return stride_c == 1 && stride_w == C && stride_h == W * C && stride_n == H * W * C; }
};

// A pixel of the map holds the `taps` pixels that a window's row meets there, one after the other. In int8 it may hold
// those of several neighbouring rows: line h of the map those from h * rows - padding_h on.
struct Unfolding {
  int64_t taps, stride, padding, rows = 1, padding_h = 0;
};

// One line of the input, its channels together, into all blocks of a line of the map, `plane` bytes apart. `readable`:
// bytes from its begin.
FUSED_RESNET_INLINE void unfold_line(const Layout& l, const Unfolding& u, const char* from, int64_t line_bytes,
                                     int64_t readable, char* to_plane, int64_t plane, int64_t pixel_bytes) {
  for (int64_t block = 0; block < l.blocks(); ++block, to_plane += plane) {
    const int64_t bytes = std::clamp<int64_t>(l.C - block * l.lanes, 0, l.lanes) * (kPixelBytes / l.lanes);
    uint64_t kept[kPixelBytes / 8] = {};
    std::memset(kept, 0xff, bytes);
    char* to = to_plane;
    int64_t at = block * kPixelBytes - u.padding * pixel_bytes;
    for (int64_t w = 0; w < l.W; ++w, at += u.stride * pixel_bytes, to += kPixelBytes) {
      uint64_t values[kPixelBytes / 8];
      if (at >= 0 && at + bytes <= line_bytes && at + kPixelBytes <= readable) {
        std::memcpy(values, from + at, kPixelBytes);
        for (int i = 0; i < kPixelBytes / 8; ++i) values[i] &= kept[i];
        std::memcpy(to, values, kPixelBytes);
      } else {
        const int64_t first = std::max<int64_t>(at, 0), last = std::min(at + bytes, line_bytes);
        std::memset(to, 0, kPixelBytes);
        if (first < last) std::memcpy(to + first - at, from + first, last - first);
      }
    }
  }
}

// What a window's row, from byte `at` on, meets of a line: zeros outside of it.
FUSED_RESNET_INLINE void unfold_pixel(const char* from, int64_t line_bytes, int64_t at, int64_t bytes, char* to) {
  const int64_t first = std::max<int64_t>(at, 0), last = std::min(at + bytes, line_bytes);
  std::memset(to, 0, bytes);
  if (first < last) std::memcpy(to + first - at, from + first, last - first);
}

// A line as one of several rows that a pixel holds side by side in a single block, whose bytes begin at `to`. Where
// they are few they are copied with what follows, which the next row writes over, or else meets weights of zero. After
// a line as many bytes as a pixel has can be read.
FUSED_RESNET_INLINE void unfold_row(const Layout& l, const Unfolding& u, const char* from, int64_t line_bytes, char* to,
                                    int64_t room, int64_t pixel_bytes) {
  constexpr int64_t kTogether = kPixelBytes / 2;
  const int64_t bytes = u.taps * pixel_bytes, step = u.stride * pixel_bytes, before = u.padding * pixel_bytes;
  int64_t begin = l.W, end = l.W;  // of the pixels that are copied so: those that meet the line alone
  if (bytes <= kTogether && kTogether <= room && bytes <= line_bytes) {
    begin = std::min((before + step - 1) / step, l.W);
    end = std::clamp((before + line_bytes - bytes) / step + 1, begin, l.W);
  }
  int64_t w = 0;
  for (; w < begin; ++w) unfold_pixel(from, line_bytes, w * step - before, bytes, to + w * kPixelBytes);
  for (; w < end; ++w) std::memcpy(to + w * kPixelBytes, from + w * step - before, kTogether);
  for (; w < l.W; ++w) unfold_pixel(from, line_bytes, w * step - before, bytes, to + w * kPixelBytes);
}

// One channel of a line, every C-th of the pixels' values. Neighbours are converted together.
template <class From, class To, class Convert>
FUSED_RESNET_INLINE void gather(const From* from, int64_t stride, int64_t W, int64_t C, const Convert& convert,
                                To* to) {
  constexpr int64_t kTogether = 64;
  To values[kTogether];
  for (int64_t begin = 0; begin < W; begin += kTogether) {
    const int64_t count = std::min(kTogether, W - begin);
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) values[i] = convert(static_cast<float>(from[begin + i]));
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = convert(static_cast<float>(from[(begin + i) * stride]));
    }
    for (int64_t i = 0; i < count; ++i) to[(begin + i) * C] = values[i];
  }
}

// An image's three colours, which the compiler then interleaves by vectors.
template <class From, class To, class Convert>
FUSED_RESNET_INLINE void gather_colours(const From* red, const From* green, const From* blue, int64_t W,
                                        const Convert& convert, To* to) {
  for (int64_t i = 0; i < W; ++i) {
    to[3 * i] = convert(static_cast<float>(red[i]));
    to[3 * i + 1] = convert(static_cast<float>(green[i]));
    to[3 * i + 2] = convert(static_cast<float>(blue[i]));
  }
}

template <class From, class To, class Convert = Cast<To>>
FUSED_RESNET_INLINE void gather_line(const Image& image, int64_t n, int64_t h, char* to,
                                     const Convert& convert = Convert()) {
  const From* from = reinterpret_cast<const From*>(image.base) + n * image.stride_n + h * image.stride_h;
  if (image.C == 3 && image.stride_w == 1) {
    const int64_t step = image.stride_c;
    return gather_colours(from, from + step, from + 2 * step, image.W, convert, reinterpret_cast<To*>(to));
  }
  for (int64_t c = 0; c < image.C; ++c) {
    gather(from + c * image.stride_c, image.stride_w, image.W, image.C, convert, reinterpret_cast<To*>(to) + c);
  }
}

FUSED_RESNET_INLINE void gather_bytes(const Image& image, int64_t n, int64_t h, char* to) {
  if (image.dtype == Dtype::kBFloat16) {
    gather_line<BFloat16, uint8_t>(image, n, h, to, image.quantizer);
  } else {
    gather_line<float, uint8_t>(image, n, h, to, image.quantizer);
  }
}

// A line of a map whose pixels hold several rows of the image.
FUSED_RESNET_INLINE void read_rows(const Layout& l, const Unfolding& u, const Image& image, int64_t n, int64_t h,
                                   char* line, char* to) {
  const int64_t line_bytes = image.W * image.C, bytes = u.taps * image.C;
  for (int64_t row = 0; row < u.rows; ++row) {
    const int64_t source = h * u.rows - u.padding_h + row;
    const bool is_inside = source >= 0 && source < image.H;
    if (is_inside) gather_bytes(image, n, source, line);
    unfold_row(l, u, line, is_inside ? line_bytes : 0, to + row * bytes, kPixelBytes - row * bytes, image.C);
  }
}

// Lines [begin, end) of the map, counted over all images, to their places in a view of it. line: scratch for one of the
// input's and kPixelBytes more.
FUSED_RESNET_INLINE void read_lines(const Layout& l, const Unfolding& u, const Image& image, int64_t begin, int64_t end,
                                    char* line, const View& to) {
  const int64_t pixel_bytes = image.C * (kPixelBytes / l.lanes), line_bytes = image.W * pixel_bytes;
  const bool is_int8 = l.lanes == kPixelBytes, is_bf16 = l.lanes == kPixelBytes / 2;
  const bool is_alike = !is_int8 && is_bf16 == (image.dtype == Dtype::kBFloat16);
  const bool is_ready = is_alike && image.is_nhwc();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / l.H, h = index % l.H;
    if (u.rows > 1) {
      read_rows(l, u, image, n, h, line, to.base + n * to.image + h * to.line);
      continue;
    }
    const char* from = line;
    if (is_ready) {
      from = image.base + index * line_bytes;
    } else if (is_int8) {
      gather_bytes(image, n, h, line);
    } else if (is_bf16 && is_alike) {
      gather_line<BFloat16, BFloat16>(image, n, h, line);
    } else if (is_bf16) {
      gather_line<float, BFloat16>(image, n, h, line);
    } else if (is_alike) {
      gather_line<float, float>(image, n, h, line);
    } else {
      gather_line<BFloat16, float>(image, n, h, line);
    }
    const int64_t readable = is_ready ? (l.N * l.H - index) * line_bytes : line_bytes + kPixelBytes;
    unfold_line(l, u, from, line_bytes, readable, to.base + n * to.image + h * to.line, to.plane, pixel_bytes);
  }
}

inline void read_lines_anywhere(const Layout& l, const Unfolding& u, const Image& image, int64_t begin, int64_t end,
                                char* line, const View& to) {
  read_lines(l, u, image, begin, end, line, to);
}

FUSED_RESNET_AVX2 inline void read_lines_avx2(const Layout& l, const Unfolding& u, const Image& image, int64_t begin,
                                              int64_t end, char* line, const View& to) {
  read_lines(l, u, image, begin, end, line, to);
}

FUSED_RESNET_AVX512 inline void read_lines_avx512(const Layout& l, const Unfolding& u, const Image& image,
                                                  int64_t begin, int64_t end, char* line, const View& to) {
  read_lines(l, u, image, begin, end, line, to);
}

}  // namespace blocked
}  // namespace fused_resnet
