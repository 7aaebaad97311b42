// Index maths of the implicit GEMM, without CUDA headers, so that the host can run the very same functions.
//
// A convolution of x (N, H, W, C) with w (K, R, S, C/groups) is, per group, a matrix product:
//   row m = (n, p, q), column k; reduction (r, s, c), c fastest.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/inline.h"

namespace fused_resnet {

// Everything a kernel needs to know about the shapes. The second part is filled by derive().
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

// Fills the derived members; the others are the caller's. Null if the kernels can index this problem, else why not.
inline const char* derive(ConvShape& s) {
  const int64_t window_h = static_cast<int64_t>(s.dilation_h) * (s.R - 1);
  const int64_t window_w = static_cast<int64_t>(s.dilation_w) * (s.S - 1);
  if (s.H >= kLargestExtent || s.W >= kLargestExtent) return "height and width must be below 2^28";
  if (s.pad_h >= kLargestExtent || s.pad_w >= kLargestExtent) return "padding must be below 2^28";
  if (window_h >= kLargestExtent || window_w >= kLargestExtent) {
    return "dilation * (filter size - 1) must be below 2^28";
  }
  const int64_t room_h = s.H + 2LL * s.pad_h - window_h - 1;
  const int64_t room_w = s.W + 2LL * s.pad_w - window_w - 1;
  if (room_h < 0 || room_w < 0) return "the output would be empty";
  s.P = static_cast<int32_t>(room_h / s.stride_h + 1);
  s.Q = static_cast<int32_t>(room_w / s.stride_w + 1);
  s.group_channels = s.C / s.groups;
  s.group_filters = s.K / s.groups;
  const int64_t pixels = static_cast<int64_t>(s.P) * s.Q;
  if (pixels >= kLargestDividend) return "an output map must have fewer than 2^31 - 1025 pixels";
  const int64_t taps = static_cast<int64_t>(s.R) * s.S;
  if (taps >= kLargestDividend || taps * s.group_channels >= kLargestDividend) {
    return "R * S * C / groups must be below 2^31 - 1025";
  }
  s.reduction = static_cast<int32_t>(taps * s.group_channels);
  s.by_pixels = FastDivisor(static_cast<uint32_t>(pixels));
  s.by_columns = FastDivisor(static_cast<uint32_t>(s.Q));
  s.by_taps = FastDivisor(static_cast<uint32_t>(s.S));
  s.by_channels = FastDivisor(static_cast<uint32_t>(s.group_channels));
  return nullptr;
}

// Within a tile the rows' windows are kept as 32-bit multiples of `unit` elements from the first one's. False if
// images are so large that they may lie further apart.
inline bool spans_fit(const ConvShape& s, int unit) {
  const double images = static_cast<double>(kMostTileRows / (static_cast<int64_t>(s.P) * s.Q) + 2);
  const double rows_of_x = images * s.H + 2.0 * s.pad_h + 2.0;
  return (rows_of_x * s.W + 2.0 * s.pad_w) * s.C < 2147483648.0 * unit;
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
