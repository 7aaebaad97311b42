// Grouped 3x3 convolution, stride 1 or 2, with as many output channels as input channels in a group (its width), and
// the epilogue act(conv + bias + residual), in channels_last; activations fp32 or bf16, weights and sums fp32.
//
// A slice of channels (16, or one group if that is wider) of the output reads the same slice of the input. The rows of
// x that one output row needs lie in a ring, widened to fp32 with zeros around them; each serves up to three output
// rows. A vector of output channels is summed for several columns at once, in registers: for each channel c of a group,
// every lane takes channel c of its own group (a permutation where a vector holds several groups, else a broadcast),
// which serves all taps of a filter row. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace grouped {

constexpr int kTaps = 3;    // of the filter, in both directions
constexpr int kPanel = 16;  // channels that lie together in the ring and in the weights

// Weights lie as [C/16, rounded up][r][c of the group][s][16 output channels].
struct Shape {
  int64_t N, H, W, C, width, P, Q, stride_h, stride_w, padding_h, padding_w;
  int64_t slice() const { return std::max<int64_t>(kPanel, width); }
  int64_t slices() const { return (C + slice() - 1) / slice(); }
  int64_t rows() const { return N * slices() * P; }               // row = (n, slice, p): what threads share among them
  int64_t columns() const { return (Q - 1) * stride_w + kTaps; }  // of x with its padding, as far as they are read
  int64_t row_floats() const { return columns() * slice(); }
  int64_t row_products() const { return Q * slice() * width * kTaps * kTaps; }
};

inline int64_t scratch_floats(const Shape& s) {
  return kTaps * s.row_floats();
}

// In each group of kWidth lanes, the c-th of them everywhere.
template <int kWidth, int kC, class V, int... kLane>
FUSED_RESNET_INLINE void spread(const V& v, V* to, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  *to = __builtin_shufflevector(v, v, (kLane / kWidth * kWidth + kC)...);
#else
  typedef int Lane __attribute__((vector_size(sizeof(V))));
  *to = __builtin_shuffle(v, Lane{(kLane / kWidth * kWidth + kC)...});
#endif
}

template <int kLanes, int kWidth, int kStride, int kColumns, int kC>
FUSED_RESNET_INLINE void sum_channel(const typename Lanes<kLanes>::Vector* x, const float* weight,
                                     typename Lanes<kLanes>::Vector* sums) {
  using V = typename Lanes<kLanes>::Vector;
  V weights[kTaps];
  for (int s = 0; s < kTaps; ++s) load<kLanes>(weight + s * kPanel, weights + s);
  // neighbours share what they read: the compiler spreads each column once, just before its first use
#pragma GCC unroll 7
  for (int q = 0; q < kColumns; ++q) {
#pragma GCC unroll 3
    for (int s = 0; s < kTaps; ++s) {
      V spread_x;
      spread<kWidth, kC>(x[q * kStride + s], &spread_x, std::make_integer_sequence<int, kLanes>());
      sums[q] += spread_x * weights[s];
    }
  }
}

template <int kLanes, int kWidth, int kStride, int kColumns, int... kC>
FUSED_RESNET_INLINE void sum_channels(const typename Lanes<kLanes>::Vector* x, const float* weight,
                                      typename Lanes<kLanes>::Vector* sums, std::integer_sequence<int, kC...>) {
  (sum_channel<kLanes, kWidth, kStride, kColumns, kC>(x, weight + kC * kTaps * kPanel, sums), ...);
}

// One row of the filter. x: the first column's channels, 16 of them lie together, the next 16 `panel` floats on.
// kWidth: the group's width where a vector holds several groups, else 0.
template <int kLanes, int kWidth, int kStride, int kColumns>
FUSED_RESNET_INLINE void sum_filter_row(const float* x, int64_t panel, int64_t width, const float* weight,
                                        typename Lanes<kLanes>::Vector* sums) {
  using V = typename Lanes<kLanes>::Vector;
  if constexpr (kWidth > 0) {
    constexpr int kInputs = (kColumns - 1) * kStride + kTaps;
    V inputs[kInputs];
#pragma GCC unroll 32
    for (int i = 0; i < kInputs; ++i) load<kLanes>(x + i * kPanel, inputs + i);
    sum_channels<kLanes, kWidth, kStride, kColumns>(inputs, weight, sums, std::make_integer_sequence<int, kWidth>());
  } else {
    for (int64_t first = 0; first < width; first += kPanel, x += panel) {
      for (int64_t c = 0; c < std::min<int64_t>(width, kPanel); ++c, weight += kTaps * kPanel) {
        V weights[kTaps];
        for (int s = 0; s < kTaps; ++s) load<kLanes>(weight + s * kPanel, weights + s);
#pragma GCC unroll 7
        for (int q = 0; q < kColumns; ++q) {
#pragma GCC unroll 3
          for (int s = 0; s < kTaps; ++s) sums[q] += x[(q * kStride + s) * kPanel + c] * weights[s];
        }
      }
    }
  }
}

// Where a vector of outputs comes from and goes to.
template <class T>
struct Place {
  const float* x[kTaps];  // in each row of the ring
  const float* weight;
  int64_t k, at;  // its first channel, and the first column's place in out
};

template <int kLanes, int kWidth, int kStride, int kColumns, class T>
FUSED_RESNET_INLINE void run_columns(const Shape& s, const Place<T>& place, const Epilogue<T>& epilogue, T* out) {
  using V = typename Lanes<kLanes>::Vector;
  V sums[kColumns] = {};
#pragma GCC unroll 3
  for (int r = 0; r < kTaps; ++r) {
    sum_filter_row<kLanes, kWidth, kStride, kColumns>(place.x[r], s.columns() * kPanel, s.width,
                                                      place.weight + r * s.width * kTaps * kPanel, sums);
  }
  V bias = V{};
  if (epilogue.bias != nullptr) load_some<kLanes>(epilogue.bias + place.k, s.C - place.k, &bias);
  const int64_t count = s.C - place.k;
  if (count >= kLanes) {  // which the compiler then knows: the whole is a tenth faster
    for (int q = 0; q < kColumns; ++q) finish<kLanes>(sums[q] + bias, epilogue, place.at + q * s.C, kLanes, out);
  } else {
    for (int q = 0; q < kColumns; ++q) finish<kLanes>(sums[q] + bias, epilogue, place.at + q * s.C, count, out);
  }
}

template <int kLanes, int kWidth, int kStride, int kColumns, class T>
FUSED_RESNET_INLINE void run_some_columns(int64_t count, const Shape& s, const Place<T>& place,
                                          const Epilogue<T>& epilogue, T* out) {
  if constexpr (kColumns > 0) {
    if (count == kColumns) return run_columns<kLanes, kWidth, kStride, kColumns>(s, place, epilogue, out);
    run_some_columns<kLanes, kWidth, kStride, kColumns - 1>(count, s, place, epilogue, out);
  }
}

// Pixels `pixel` apart in x, their first `channels` channels and then zeros, one panel each.
template <int kLanes, class T>
FUSED_RESNET_INLINE void fill_panel(const T* x, int64_t pixel, int64_t channels, int64_t count, float* row) {
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < kPanel; j += kLanes) {
      typename Lanes<kLanes>::Vector v;
      load_some<kLanes>(x + i * pixel + j, channels - j, &v);
      store<kLanes>(v, row + i * kPanel + j);
    }
  }
}

// A slice of row h of image n, which may lie outside, with the padding beside it.
template <int kLanes, class T>
FUSED_RESNET_INLINE void fill_row(const Shape& s, const T* x, int64_t n, int64_t h, int64_t c, float* row) {
  const int64_t columns = s.columns(), begin = std::min(h < 0 || h >= s.H ? columns : s.padding_w, columns);
  const int64_t end = std::max(begin, std::min(s.W + s.padding_w, columns));
  for (int64_t k = c; k < c + s.slice(); k += kPanel, row += columns * kPanel) {
    std::memset(row, 0, sizeof(float) * begin * kPanel);
    std::memset(row + end * kPanel, 0, sizeof(float) * (columns - end) * kPanel);
    if (begin == end) continue;
    const T* from = x + ((n * s.H + h) * s.W + begin - s.padding_w) * s.C + k;
    if (s.C - k >= kPanel) {
      fill_panel<kLanes>(from, s.C, kPanel, end - begin, row + begin * kPanel);
    } else {
      fill_panel<kLanes>(from, s.C, s.C - k, end - begin, row + begin * kPanel);
    }
  }
}

// What the next output row will need of these columns: waiting for it here would take as long as the sums.
template <class T>
FUSED_RESNET_INLINE void prefetch(const Shape& s, const T* x, int64_t n, int64_t top, int64_t c, int64_t begin,
                                  int64_t end) {
  for (int64_t h = std::max<int64_t>(0, top + kTaps); h < std::min(s.H, top + kTaps + s.stride_h); ++h) {
    for (int64_t w = begin; w < std::min(s.W, end); ++w) __builtin_prefetch(x + ((n * s.H + h) * s.W + w) * s.C + c);
  }
}

// Rows [begin, end) of `Shape::rows`: what one thread computes.
template <int kLanes, int kMaxColumns, int kWidth, int kStride, class T>
FUSED_RESNET_INLINE void run_rows(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                  int64_t begin, int64_t end, float* ring, T* out) {
  const int64_t per_image = s.slices() * s.P;
  // columns in equal portions: 10 as 5 + 5 keeps more sums in flight than 7 + 3
  const int64_t portions = (s.Q + kMaxColumns - 1) / kMaxColumns, portion = (s.Q + portions - 1) / portions;
  int64_t filled = 0;  // rows of x, counted from the padding's first, that are or were in the ring
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / per_image, c = row % per_image / s.P * s.slice(), p = row % s.P, top = p * s.stride_h;
    const auto in_ring = [&](int64_t h) { return ring + h % kTaps * s.row_floats(); };
    if (p == 0 || row == begin) filled = top;
    for (filled = std::max(filled, top); filled < top + kTaps; ++filled) {
      fill_row<kLanes>(s, x, n, filled - s.padding_h, c, in_ring(filled));
    }
    for (int64_t q = 0; q < s.Q; q += portion) {
      prefetch(s, x, n, top - s.padding_h, c, q * kStride, (q + portion) * kStride);
      for (int64_t k = 0; k < std::min(s.slice(), s.C - c); k += kLanes) {
        const int64_t from = q * kStride * kPanel + (kWidth > 0 ? k : k / s.width * s.width);
        const Place<T> place{{in_ring(top) + from, in_ring(top + 1) + from, in_ring(top + 2) + from},
                             weight + (c + k) / kPanel * kPanel * kTaps * kTaps * s.width + k % kPanel,
                             c + k,
                             ((n * s.P + p) * s.Q + q) * s.C + c + k};
        run_some_columns<kLanes, kWidth, kStride, kMaxColumns>(std::min(portion, s.Q - q), s, place, epilogue, out);
      }
    }
  }
}

template <int kLanes, int kMaxColumns, int kStride, class T>
FUSED_RESNET_INLINE void run_rows(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                  int64_t begin, int64_t end, float* ring, T* out) {
  if constexpr (kLanes > 4) {
    if (s.width == 4) return run_rows<kLanes, kMaxColumns, 4, kStride>(s, x, weight, epilogue, begin, end, ring, out);
  }
  if constexpr (kLanes > 8) {
    if (s.width == 8) return run_rows<kLanes, kMaxColumns, 8, kStride>(s, x, weight, epilogue, begin, end, ring, out);
  }
  run_rows<kLanes, kMaxColumns, 0, kStride>(s, x, weight, epilogue, begin, end, ring, out);
}

template <int kLanes, int kMaxColumns, class T>
FUSED_RESNET_INLINE void run_rows(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                  int64_t begin, int64_t end, float* ring, T* out) {
  if (s.stride_w == 1) return run_rows<kLanes, kMaxColumns, 1>(s, x, weight, epilogue, begin, end, ring, out);
  run_rows<kLanes, kMaxColumns, 2>(s, x, weight, epilogue, begin, end, ring, out);
}

template <class T>
FUSED_RESNET_AVX512 void run_rows_avx512(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                         int64_t begin, int64_t end, float* ring, T* out) {
  // 7 columns divide maps of 7, 14, 28 and 56. At stride 2 they need the most: 7 of 32 zmm hold sums, 15 columns of x,
  // 3 the weights of a filter row and 1 what is spread of x
  run_rows<16, 7>(s, x, weight, epilogue, begin, end, ring, out);
}

template <class T>
FUSED_RESNET_AVX2 void run_rows_avx2(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue,
                                     int64_t begin, int64_t end, float* ring, T* out) {
  // 6 of 16 ymm hold sums, 3 the weights and 1 what is spread of x; the other 6 take turns with 8 columns of x at
  // stride 1 and 13 at stride 2
  run_rows<8, 6>(s, x, weight, epilogue, begin, end, ring, out);
}

template <class T>
void run_rows_anywhere(const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue, int64_t begin,
                       int64_t end, float* ring, T* out) {
  // a vector lies in one group, so that x is broadcast: 4 sums, 3 weights and 1 value of x, of 16 registers or more
  run_rows<4, 4>(s, x, weight, epilogue, begin, end, ring, out);
}

}  // namespace grouped
}  // namespace fused_resnet
