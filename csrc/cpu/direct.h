// Convolution of one group with any window, stride, padding and dilation, and the epilogue act(conv + bias + residual),
// in channels_last; activations fp32 or bf16, weights and sums fp32.
//
// A block of output pixels times output channels is a matrix product whose left factor is never written down: for each
// tap of the window, a table says where each pixel's input channels lie, those of padding being zeros (indirect
// convolution: Dukhan 2019, arXiv 1907.02129). So pixels of several rows and images are computed together, and a map of
// 7x7 wastes nothing. A segment of the sum, as long as its weights stay in the first cache, is done for all pixels of a
// block before the next one. bf16 inputs are widened first, the rows that a block reads. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace direct {

constexpr int kPanel = 16;               // output channels that lie together in the weights
constexpr int64_t kPixelsPerBlock = 96;  // their input and sums stay in L2, and weights are read once for all of them
constexpr int64_t kMostPlaces = 1 << 17, kMostInput = 1 << 20;  // of a block, as far as fewer pixels help

// Weights lie as [K/16, rounded up][R][S][C][16], zeros behind the last channel.
struct Shape {
  int64_t N, H, W, C, K, R, S, P, Q, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  // Few channels make a row of the window one tap: its pixels lie together, and so do its weights.
  bool is_narrow() const { return C < kPanel && S > 1 && dilation_w == 1; }
  int64_t tap_columns() const { return is_narrow() ? S : 1; }
  int64_t tap_channels() const { return tap_columns() * C; }
  int64_t taps() const { return R * S / tap_columns(); }
  int64_t pixels() const { return N * P * Q; }
  int64_t panels() const { return (K + kPanel - 1) / kPanel; }
  int64_t panel_floats() const { return R * S * C * kPanel; }
  bool is_pointwise() const { return R * S == 1 && stride_h * stride_w == 1 && padding_h + padding_w == 0; }
};

// Output pixels [begin, end) times panels [first, last): what one thread computes at a time.
struct Block {
  int64_t begin, end, first, last;
  int64_t pixels() const { return end - begin; }
};

// About as many rows of the input, through all images, as some output pixels after each other read.
inline int64_t rows_read(const Shape& s, int64_t pixels) {
  const int64_t rows = (pixels + s.Q - 1) / s.Q, images = (rows + s.P - 1) / s.P;
  return images > 1 ? images * s.H : std::min(s.H, (rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1);
}

// The blocks of a whole problem for a number of threads: equal portions of the pixels, and of the panels too where
// there are fewer portions of pixels than threads.
struct Blocks {
  int64_t pixels, panels, of_pixels, of_panels;  // the largest block's size; how many there are
  int64_t count() const { return of_pixels * of_panels; }

  Blocks(const Shape& s, int64_t threads) {
    int64_t most = std::clamp<int64_t>(kMostPlaces / s.taps(), 1, kPixelsPerBlock);
    while (most > 1 && rows_read(s, most) * s.W * s.C > kMostInput) most = (most + 1) / 2;
    of_pixels = (s.pixels() + most - 1) / most;
    if (of_pixels >= threads) of_pixels = std::min((of_pixels + threads - 1) / threads * threads, s.pixels());
    pixels = (s.pixels() + of_pixels - 1) / of_pixels;
    of_pixels = (s.pixels() + pixels - 1) / pixels;
    const int64_t wanted = (threads + of_pixels - 1) / of_pixels;
    panels = (s.panels() + wanted - 1) / wanted;
    panels += panels % 2;  // pairs are multiplied at once
    of_panels = (s.panels() + panels - 1) / panels;
  }

  Block at(const Shape& s, int64_t index) const {
    const int64_t pixel = index / of_panels * pixels, panel = index % of_panels * panels;
    return {pixel, std::min(pixel + pixels, s.pixels()), panel, std::min(panel + panels, s.panels())};
  }
};

// Input pixels [begin, end), counted through all images, that hold all that a block reads.
struct Range {
  int64_t begin, end;
  int64_t pixels() const { return end - begin; }
};

inline Range input_of(const Shape& s, const Block& block) {
  if (s.is_pointwise()) return {block.begin, block.end};
  if (s.H * s.W == 0) return {0, 0};  // all is padding
  const auto row = [&](int64_t pixel, int64_t r) {
    const int64_t n = pixel / (s.P * s.Q), p = pixel / s.Q % s.P;
    return n * s.H + std::clamp<int64_t>(p * s.stride_h - s.padding_h + r * s.dilation_h, 0, s.H - 1);
  };
  return {row(block.begin, 0) * s.W, (row(block.end - 1, s.R - 1) + 1) * s.W};
}

inline int64_t most_input_pixels(const Shape& s, const Blocks& blocks) {
  int64_t most = 0;
  for (int64_t index = 0; index < blocks.count(); index += blocks.of_panels) {
    most = std::max(most, input_of(s, blocks.at(s, index)).pixels());
  }
  return most;
}

// A thread's memory for a block: where pixels lie, zeros for those of padding, rows of windows that reach into padding,
// sums between segments, widened input.
struct Room {
  const float** places;
  float *zeros, *edges, *sums, *input;

  static int64_t place_floats(const Shape& s, const Blocks& blocks) {
    return aligned(s.taps() * blocks.pixels * 2);  // a pointer is two floats at most
  }
  static int64_t zero_floats(const Shape& s) { return aligned(s.tap_channels()); }
  static int64_t edge_floats(const Shape& s, const Blocks& blocks) {
    return s.is_narrow() ? aligned(s.taps() * blocks.pixels * s.tap_channels()) : 0;
  }
  static int64_t sum_floats(const Blocks& blocks) { return aligned(blocks.pixels * 2 * kPanel); }
  static int64_t floats(const Shape& s, const Blocks& blocks, int64_t input_pixels) {
    return place_floats(s, blocks) + zero_floats(s) + edge_floats(s, blocks) + sum_floats(blocks) + input_pixels * s.C;
  }
  static int64_t aligned(int64_t floats) { return (floats + kPanel - 1) / kPanel * kPanel; }

  Room(const Shape& s, const Blocks& blocks, float* memory) {
    places = reinterpret_cast<const float**>(memory);
    zeros = memory + place_floats(s, blocks);
    edges = zeros + zero_floats(s);
    sums = edges + edge_floats(s, blocks);
    input = sums + sum_floats(blocks);
    std::fill(zeros, edges, 0.f);
  }
};

// Where fp32 input lies, counted from the first pixel of x.
FUSED_RESNET_INLINE const float* as_floats(const Shape&, const float* x, const Range&, float*) {
  return x;
}

FUSED_RESNET_INLINE const float* as_floats(const Shape& s, const BFloat16* x, const Range& range, float* input) {
  constexpr int kLanes = 16;
  const BFloat16* from = x + range.begin * s.C;
  const int64_t count = range.pixels() * s.C, whole = count / kLanes * kLanes;
  Lanes<kLanes>::Vector v;
  for (int64_t i = 0; i < whole; i += kLanes) {
    load<kLanes>(from + i, &v);
    store<kLanes>(v, input + i);
  }
  for (int64_t i = whole; i < count; ++i) {
    load_some<kLanes>(from + i, 1, &v);
    input[i] = v[0];
  }
  return input - range.begin * s.C;
}

// Columns [w, w + S) of a row of the input: as they lie, or in `edge` with zeros for those of padding.
inline const float* place_row(const Shape& s, const float* row, int64_t w, float* edge) {
  if (w >= 0 && w + s.S <= s.W) return row + w * s.C;
  for (int64_t t = 0; t < s.S; ++t) {
    const bool is_inside = w + t >= 0 && w + t < s.W;
    for (int64_t c = 0; c < s.C; ++c) edge[t * s.C + c] = is_inside ? row[(w + t) * s.C + c] : 0.f;
  }
  return edge;
}

// places[tap][pixel of the block]
inline void find_places(const Shape& s, const Block& block, const float* x, const Room& room) {
  int64_t n = block.begin / (s.P * s.Q), p = block.begin / s.Q % s.P, q = block.begin % s.Q;
  float* edge = room.edges;
  for (int64_t i = 0; i < block.pixels(); ++i) {
    const float** place = room.places + i;
    for (int64_t r = 0; r < s.R; ++r) {
      const int64_t h = p * s.stride_h - s.padding_h + r * s.dilation_h;
      const bool is_inside = h >= 0 && h < s.H;
      const float* row = is_inside ? x + (n * s.H + h) * s.W * s.C : nullptr;
      for (int64_t t = 0; t < s.S; t += s.tap_columns(), place += block.pixels()) {
        const int64_t w = q * s.stride_w - s.padding_w + t * s.dilation_w;
        if (is_inside && s.is_narrow()) {
          *place = place_row(s, row, w, edge);
          edge += s.tap_channels();
        } else {
          *place = is_inside && w >= 0 && w < s.W ? row + w * s.C : room.zeros;
        }
      }
    }
    if (++q < s.Q) continue;
    q = 0;
    if (++p == s.P) p = 0, ++n;
  }
}

// A part of the sum: channels [c, c + channels) of taps [tap, tap + taps). There is more than one tap only if all
// channels are in.
struct Segment {
  int64_t tap, taps, c, channels;
};

// The segments of a sum, of about `depth` products each.
struct Segments {
  int64_t per_tap, taps_each, channels, count;

  Segments(const Shape& s, int64_t depth) {
    per_tap = (s.tap_channels() + depth - 1) / depth;
    channels = (s.tap_channels() + per_tap - 1) / per_tap;
    const int64_t portions = (s.taps() * s.tap_channels() + depth - 1) / depth;
    taps_each = per_tap > 1 ? 1 : (s.taps() + portions - 1) / portions;
    count = per_tap > 1 ? s.taps() * per_tap : (s.taps() + taps_each - 1) / taps_each;
  }
  Segment at(const Shape& s, int64_t index) const {
    const int64_t tap = index / per_tap * taps_each, c = index % per_tap * channels;
    return {tap, std::min(taps_each, s.taps() - tap), c, std::min(channels, s.tap_channels() - c)};
  }
};

// kRows pixels x kPanels panels, over the channels of one tap. u: the weights of its first channel.
template <int kLanes, int kRows, int kPanels>
FUSED_RESNET_INLINE void multiply(const float* const* places, int64_t c, int64_t channels, const float* u,
                                  int64_t panel_floats,
                                  typename Lanes<kLanes>::Vector (*sums)[kPanels * kPanel / kLanes]) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int kWide = kPanels * kPanel / kLanes, kPerPanel = kPanel / kLanes;
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = places[r] + c;
  for (int64_t i = 0; i < channels; ++i) {
    V b[kWide];
    for (int j = 0; j < kWide; ++j) {
      load<kLanes>(u + j / kPerPanel * panel_floats + i * kPanel + j % kPerPanel * kLanes, b + j);
    }
    for (int r = 0; r < kRows; ++r) {
      const float value = x[r][i];
      for (int j = 0; j < kWide; ++j) sums[r][j] += value * b[j];
    }
  }
}

// Where the sums of some pixels and panels go on to.
template <class T>
struct Target {
  int64_t pixel, k;  // the first ones
  float* sums;       // between segments
  bool is_first, is_last;
};

// The lines of the residual and of the output, far apart as they are: they arrive while the sums are made.
template <int kRows, int kPanels, class T>
FUSED_RESNET_INLINE void fetch_target(const Shape& s, const Target<T>& target, const Epilogue<T>& epilogue, T* out) {
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = (target.pixel + r) * s.K + target.k;
    for (int j = 0; j < kPanels; ++j) {
      if (epilogue.residual != nullptr) __builtin_prefetch(epilogue.residual + at + j * kPanel);
      __builtin_prefetch(out + at + j * kPanel, 1);
    }
  }
}

template <int kLanes, int kRows, int kPanels, class T>
FUSED_RESNET_INLINE void run_rows(const Shape& s, const Segment& segment, const float* const* places, int64_t pixels,
                                  const float* u, const Target<T>& target, const Epilogue<T>& epilogue, T* out) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int kWide = kPanels * kPanel / kLanes;
  if (target.is_last) fetch_target<kRows, kPanels>(s, target, epilogue, out);
  V sums[kRows][kWide] = {};
  if (!target.is_first) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWide; ++j) load<kLanes>(target.sums + (r * kWide + j) * kLanes, &sums[r][j]);
    }
  }
  for (int64_t tap = 0; tap < segment.taps; ++tap) {
    multiply<kLanes, kRows, kPanels>(places + tap * pixels, segment.c, segment.channels,
                                     u + tap * s.tap_channels() * kPanel, s.panel_floats(), sums);
  }
  if (!target.is_last) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kWide; ++j) store<kLanes>(sums[r][j], target.sums + (r * kWide + j) * kLanes);
    }
    return;
  }
  V bias[kWide] = {};
  if (epilogue.bias != nullptr) {
    for (int j = 0; j < kWide; ++j) {
      load_some<kLanes>(epilogue.bias + target.k + j * kLanes, s.K - target.k - j * kLanes, bias + j);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWide; ++j) {
      const int64_t k = target.k + j * kLanes;
      if (k < s.K) finish<kLanes>(sums[r][j] + bias[j], epilogue, (target.pixel + r) * s.K + k, s.K - k, out);
    }
  }
}

template <int kLanes, int kPanels, int kRows, class T>
FUSED_RESNET_INLINE void run_some_rows(int64_t rows, const Shape& s, const Segment& segment, const float* const* places,
                                       int64_t pixels, const float* u, const Target<T>& target,
                                       const Epilogue<T>& epilogue, T* out) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      return run_rows<kLanes, kRows, kPanels>(s, segment, places, pixels, u, target, epilogue, out);
    }
    run_some_rows<kLanes, kPanels, kRows - 1>(rows, s, segment, places, pixels, u, target, epilogue, out);
  }
}

constexpr int64_t kNearFloats = 1 << 18;  // more weights than these come from far away

// Part `index` of `parts` of the weights that lie behind a segment's, which come next.
template <int kPanels>
FUSED_RESNET_INLINE void fetch_weights(const Shape& s, const Segment& segment, const float* u, int64_t index,
                                       int64_t parts) {
  const int64_t lines = segment.taps * segment.channels, end = lines * (index + 1) / parts;
  for (int64_t line = lines * index / parts; line < end; ++line) {
    for (int j = 0; j < kPanels; ++j) __builtin_prefetch(u + j * s.panel_floats() + (lines + line) * kPanel, 0, 2);
  }
}

// All pixels of a block times kPanels panels, segment by segment.
template <int kLanes, int kPanels, int kMaxRows, class T>
FUSED_RESNET_INLINE void run_panels(const Shape& s, const Segments& segments, const Block& block, int64_t panel,
                                    const float* weight, const Room& room, const Epilogue<T>& epilogue, T* out) {
  const int64_t pixels = block.pixels();
  // rows in equal portions: 7 as 4 + 3 keeps more sums in flight than 6 + 1
  const int64_t portions = (pixels + kMaxRows - 1) / kMaxRows, rows = (pixels + portions - 1) / portions;
  const bool is_far = s.panels() * s.panel_floats() > kNearFloats;
  for (int64_t index = 0; index < segments.count; ++index) {
    const Segment segment = segments.at(s, index);
    const float* u = weight + panel * s.panel_floats() + (segment.tap * s.tap_channels() + segment.c) * kPanel;
    for (int64_t i = 0; i < pixels; i += rows) {
      const Target<T> target{block.begin + i, panel * kPanel, room.sums + i * kPanels * kPanel, index == 0,
                             index == segments.count - 1};
      if (is_far) fetch_weights<kPanels>(s, segment, u, i / rows, portions);
      run_some_rows<kLanes, kPanels, kMaxRows>(std::min(rows, pixels - i), s, segment,
                                               room.places + segment.tap * pixels + i, pixels, u, target, epilogue,
                                               out);
    }
  }
}

template <int kLanes, int kPanels, int kMaxRows, int kDepth, class T>
FUSED_RESNET_INLINE void run_block(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                   const Block& block, const Room& room, T* out) {
  find_places(s, block, as_floats(s, x, input_of(s, block), room.input), room);
  const Segments segments(s, kDepth);
  int64_t panel = block.first;
  for (; panel + kPanels <= block.last; panel += kPanels) {
    run_panels<kLanes, kPanels, kMaxRows>(s, segments, block, panel, weight, room, epilogue, out);
  }
  for (; kPanels > 1 && panel < block.last; ++panel) {
    run_panels<kLanes, 1, kMaxRows>(s, segments, block, panel, weight, room, epilogue, out);
  }
}

template <class T>
FUSED_RESNET_AVX512 void run_block_avx512(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                          const Block& block, const Room& room, T* out) {
  // 12 rows x 2 panels: 24 of 32 zmm hold sums, and 12 of 15 general registers say where the rows lie. 24 KB of weights
  run_block<16, 2, 12, 192>(s, x, weight, epilogue, block, room, out);
}

template <class T>
FUSED_RESNET_AVX2 void run_block_avx2(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                      const Block& block, const Room& room, T* out) {
  // 6 rows x 2 halves of a panel: 12 of 16 ymm hold sums, 2 the halves of the weights, 1 the input. 16 KB of weights
  run_block<8, 1, 6, 256>(s, x, weight, epilogue, block, room, out);
}

template <class T>
void run_block_anywhere(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                        const Block& block, const Room& room, T* out) {
  // 4 rows x 4 quarters of a panel, as in winograd.h
  run_block<4, 1, 4, 256>(s, x, weight, epilogue, block, room, out);
}

}  // namespace direct
}  // namespace fused_resnet
