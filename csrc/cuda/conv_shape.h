// Index maths of the implicit GEMM, without CUDA headers, so that the host can run the very same functions.
//
// A convolution of x (N, H, W, C) with w (K, R, S, C/groups) is, per group, a matrix product:
//   row m = (n, p, q), column k; reduction (r, s, c), c fastest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "common/divisor.h"
#include "common/inline.h"

namespace fused_resnet {

// Everything a kernel needs to know about the shapes, as derive() fills it.
struct ConvShape {
  int64_t N;
  int32_t C, H, W, K, R, S;
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  int32_t P, Q;
  int32_t group_channels;                                   // C / groups
  int32_t group_filters;                                    // K / groups
  int32_t reduction;                                        // R * S * C / groups
  FastDivisor by_pixels, by_columns, by_taps, by_channels;  // P * Q, Q, S, C / groups
};

// Coordinates are below 2^28, so that kOutside + any valid coordinate is still outside the image.
constexpr int32_t kLargestExtent = 1 << 28;
constexpr int32_t kOutside = 1 << 29;
// A tile adds at most its rows, or one step of the reduction, to an index that is divided in 31 bits.
constexpr int64_t kLargestDividend = INT32_MAX - 1024;
constexpr int kMostTileRows = 256;

// A convolution's sizes as they are asked for: positive, paddings at least 0, and no more than that.
struct ConvSizes {
  int64_t N, C, H, W, K, R, S;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// Why the kernels cannot index a convolution of these sizes; empty if they can, and then the shape is filled.
inline std::string derive(const ConvSizes& sizes, ConvShape* shape) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const auto product = [&](int64_t a, int64_t b) { return text(a) + "x" + text(b); };
  const auto& z = sizes;
  const int64_t largest = std::max({z.C, z.K, z.R, z.S, z.groups, z.stride_h, z.stride_w, z.dilation_h, z.dilation_w});
  if (largest > INT32_MAX) {
    return text(largest) + " is too large (channels, filter sizes, groups, strides and dilations must be below 2^31)";
  }
  if (std::max(z.H, z.W) >= kLargestExtent) {
    return "an input of " + product(z.H, z.W) + " is too large (height and width must be below 2^28)";
  }
  if (std::max(z.pad_h, z.pad_w) >= kLargestExtent) {
    return "padding " + text(std::max(z.pad_h, z.pad_w)) + " is too large (it must be below 2^28)";
  }
  const int64_t window_h = z.dilation_h * (z.R - 1), window_w = z.dilation_w * (z.S - 1);
  if (std::max(window_h, window_w) >= kLargestExtent) {
    return "a window of " + text(std::max(window_h, window_w) + 1) +
           " pixels is too large (dilation * (filter size - 1) must be below 2^28)";
  }
  const int64_t room_h = z.H + 2 * z.pad_h - window_h - 1, room_w = z.W + 2 * z.pad_w - window_w - 1;
  if (room_h < 0 || room_w < 0) {
    return "the output would be empty: a window of " + product(window_h + 1, window_w + 1) + " over " +
           product(z.H + 2 * z.pad_h, z.W + 2 * z.pad_w) + " pixels";
  }
  const int64_t P = room_h / z.stride_h + 1, Q = room_w / z.stride_w + 1;
  if (P * Q >= kLargestDividend) {
    return "an output of " + product(P, Q) + " is too large (P * Q must be below 2^31 - 1025)";
  }
  const int64_t taps = z.R * z.S, group_channels = z.C / z.groups;
  if (taps >= kLargestDividend || taps * group_channels >= kLargestDividend) {
    return "a sum of " + product(z.R, z.S) + "x" + text(group_channels) +
           " products is too long (R * S * C/groups must be below 2^31 - 1025)";
  }
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  ConvShape& s = *shape;
  s.N = z.N;
  s.C = narrow(z.C), s.H = narrow(z.H), s.W = narrow(z.W);
  s.K = narrow(z.K), s.R = narrow(z.R), s.S = narrow(z.S);
  s.stride_h = narrow(z.stride_h), s.stride_w = narrow(z.stride_w);
  s.pad_h = narrow(z.pad_h), s.pad_w = narrow(z.pad_w);
  s.dilation_h = narrow(z.dilation_h), s.dilation_w = narrow(z.dilation_w);
  s.groups = narrow(z.groups);
  s.P = narrow(P), s.Q = narrow(Q);
  s.group_channels = narrow(group_channels);
  s.group_filters = narrow(z.K / z.groups);
  s.reduction = narrow(taps * group_channels);
  s.by_pixels = FastDivisor(static_cast<uint32_t>(P * Q));
  s.by_columns = FastDivisor(static_cast<uint32_t>(Q));
  s.by_taps = FastDivisor(static_cast<uint32_t>(s.S));
  s.by_channels = FastDivisor(static_cast<uint32_t>(s.group_channels));
  return "";
}

// Within a tile the rows' windows are kept as 32-bit multiples of `unit` elements from the first one's. Not empty if
// images are so large that they may lie further apart. A double is exact wherever that is in doubt.
inline std::string why_span_too_long(const ConvShape& s, int unit) {
  const double images = static_cast<double>(kMostTileRows / (static_cast<int64_t>(s.P) * s.Q) + 2);
  const double rows_of_x = images * s.H + 2.0 * s.pad_h + 2.0;
  const double span = (rows_of_x * s.W + 2.0 * s.pad_w) * s.C, reach = 2147483648.0 * unit;
  if (span < reach) return "";
  char text[160];
  std::snprintf(text, sizeof(text),
                "one tile may span %.0f elements of x, too many for its 32-bit offsets (they reach %.0f)", span, reach);
  return text;
}

// How many bytes of x and of the weight are copied at once: 16 or 8, where a group's channels are whole copies, so that
// one lies within one tap, and the addresses (x | weight) are multiples. 0: element by element.
inline int copy_bytes(int64_t group_channels, int element_bytes, uintptr_t addresses) {
  for (const int bytes : {16, 8}) {
    if (group_channels * element_bytes % bytes == 0 && addresses % bytes == 0) return bytes;
  }
  return 0;
}

// Elements of x whose offsets the kernel keeps as one: those of a copy.
constexpr int offset_unit(int copy_bytes, int element_bytes) {
  return copy_bytes > 0 ? copy_bytes / element_bytes : 1;
}

// All of the above, where x and the weight start at multiples of 16 bytes; tensors do that are not views into the
// middle of others.
inline std::string conv_why_not(const ConvSizes& sizes, int element_bytes) {
  ConvShape shape{};
  const std::string reason = derive(sizes, &shape);
  if (!reason.empty()) return reason;
  return why_span_too_long(shape, offset_unit(copy_bytes(shape.group_channels, element_bytes, 0), element_bytes));
}

FUSED_RESNET_HD int64_t num_rows(const ConvShape& s) {
  return s.N * s.P * s.Q;
}

// Row m as (image, pixel). One 64-bit division per tile; the rows of the tile go on from there in 32 bits.
struct RowOrigin {
  int64_t n;
  uint32_t pixel;
};

FUSED_RESNET_HD RowOrigin row_origin(const ConvShape& s, int64_t m) {
  const int64_t pixels = static_cast<int64_t>(s.P) * s.Q;
  const int64_t n = m / pixels;
  return {n, static_cast<uint32_t>(m - n * pixels)};
}

// The window of one output row: its top left corner (h, w), possibly in the padding, and the offset in x of that
// corner at the group's first channel. Rows past the last have h = -2 * kOutside, which no tap can bring inside.
struct InputRow {
  int64_t offset;
  int32_t h, w;
};

FUSED_RESNET_HD InputRow input_row(const ConvShape& s, const RowOrigin& origin, int row, int group) {
  uint32_t pixel = origin.pixel + static_cast<uint32_t>(row);
  const uint32_t images = s.by_pixels.divide(pixel);
  pixel -= images * s.by_pixels.divisor;
  const int64_t n = origin.n + images;
  const int32_t p = static_cast<int32_t>(s.by_columns.divide(pixel));
  const int32_t q = static_cast<int32_t>(pixel) - p * s.Q;
  const int32_t h = p * s.stride_h - s.pad_h;
  const int32_t w = q * s.stride_w - s.pad_w;
  const int64_t offset = ((n * s.H + h) * s.W + w) * s.C + static_cast<int64_t>(group) * s.group_channels;
  return {offset, n < s.N ? h : -2 * kOutside, w};
}

// Reduction index k = (r, s, c) as a step from the window's corner. k past the last has h = kOutside.
struct Tap {
  int64_t offset;
  int32_t h, w;
};

FUSED_RESNET_HD Tap filter_tap(const ConvShape& s, int32_t k) {
  const int32_t tap = static_cast<int32_t>(s.by_channels.divide(static_cast<uint32_t>(k)));
  const int32_t c = k - tap * s.group_channels;
  const int32_t r = static_cast<int32_t>(s.by_taps.divide(static_cast<uint32_t>(tap)));
  const int32_t h = r * s.dilation_h;
  const int32_t w = (tap - r * s.S) * s.dilation_w;
  return {(static_cast<int64_t>(h) * s.W + w) * s.C + c, k < s.reduction ? h : kOutside, w};
}

// Whether the tap of this row lies in the image; if so the element of x is at row.offset + tap.offset.
FUSED_RESNET_HD bool is_inside(const ConvShape& s, const InputRow& row, const Tap& tap) {
  return static_cast<uint32_t>(row.h + tap.h) < static_cast<uint32_t>(s.H) &&
         static_cast<uint32_t>(row.w + tap.w) < static_cast<uint32_t>(s.W);
}

}  // namespace fused_resnet
