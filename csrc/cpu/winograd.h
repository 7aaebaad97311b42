// 3x3 stride-1 convolution by Winograd's F(4x4, 3x3) (Lavin and Gray 2015, arXiv 1509.09308) with the epilogue
// act(conv + bias + residual), in channels_last; activations fp32 or bf16, everything else fp32: 36 multiplications for
// 16 outputs instead of 144.
//
// Per block of tiles: V = B^T d B of each 6x6 input tile, M = V * U (36 matrix products, tiles x C times C x K),
// y = A^T M A and the epilogue. V and M stay in the cache. U = G g G^T is given, packed as [36][K/16][C][16].
// No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace winograd {

constexpr int kTile = 6, kOut = 4, kPoints = kTile * kTile;
// The polynomials are evaluated at 0, +-1/sqrt(2), +-sqrt(2) and infinity: against 0, +-1, +-2 a fifth of the largest
// error and half of the mean (256 channels of normal data).
constexpr float kRoot2 = 1.41421356f, kRootHalf = 0.70710678f;
constexpr int kPanel = 16;  // columns that lie together in U
constexpr int kPad = 16;    // floats between the 36 matrices, so that their rows do not share cache sets

// How far apart the parts of an activation lie, in elements. Channels lie in blocks of `lanes`: in NHWC in any multiple
// of a vector, since its blocks lie side by side.
struct Strides {
  int64_t image, line, pixel, block, lanes;

  static Strides of_nhwc(int64_t H, int64_t W, int64_t C) { return {H * W * C, W * C, C, kPanel, kPanel}; }
  int64_t at(int64_t n, int64_t h, int64_t w) const { return n * image + h * line + w * pixel; }
  int64_t channel(int64_t c) const { return c / lanes * block + c % lanes; }
};

struct Shape {
  int64_t N, H, W, C, K, P, Q, padding_h, padding_w;
  Strides in, out;
  int64_t tiles_h() const { return (P + kOut - 1) / kOut; }
  int64_t tiles_w() const { return (Q + kOut - 1) / kOut; }
  int64_t tiles() const { return N * tiles_h() * tiles_w(); }
};

// Tiles [tile_begin, tile_end) times columns [k_begin, k_end): what one thread computes at a time.
struct Block {
  int64_t tile_begin, tile_end, k_begin, k_end;
  int64_t tiles() const { return tile_end - tile_begin; }
  int64_t columns() const { return k_end - k_begin; }
};

inline int64_t v_stride(const Shape& s, int64_t tiles) {
  return tiles * s.C + kPad;
}
inline int64_t m_stride(int64_t columns, int64_t tiles) {
  return tiles * columns + kPad;
}
inline int64_t scratch_floats(const Shape& s, int64_t tiles, int64_t columns) {
  return kPoints * (v_stride(s, tiles) + m_stride(columns, tiles));
}

constexpr int64_t kTilesPerBlock = 32;  // V and M of a block stay in L2, and U is read once for all its tiles

// The blocks of a whole problem for a number of threads: equal portions of the tiles, and of the columns too where
// there are fewer portions of tiles than threads. They then transform the same tiles, which costs little.
struct Blocks {
  int64_t tiles, columns, of_tiles, of_columns;  // the largest block's size; how many there are
  int64_t count() const { return of_tiles * of_columns; }

  Blocks(const Shape& s, int64_t threads) {
    of_tiles = (s.tiles() + kTilesPerBlock - 1) / kTilesPerBlock;
    if (of_tiles >= threads) of_tiles = std::min((of_tiles + threads - 1) / threads * threads, s.tiles());
    tiles = (s.tiles() + of_tiles - 1) / of_tiles;
    of_tiles = (s.tiles() + tiles - 1) / tiles;
    const int64_t wanted = (threads + of_tiles - 1) / of_tiles, panels = s.K / kPanel;
    columns = (panels + wanted - 1) / wanted * kPanel;
    if (columns > kPanel)
      columns = (columns + 2 * kPanel - 1) / (2 * kPanel) * (2 * kPanel);  // pairs are multiplied at once
    of_columns = (s.K + columns - 1) / columns;
  }

  Block at(const Shape& s, int64_t index) const {
    const int64_t tile = index / of_columns * tiles, k = index % of_columns * columns;
    return {tile, std::min(tile + tiles, s.tiles()), k, std::min(k + columns, s.K)};
  }
};

// One dimension of B^T d, for a vector of channels.
template <class V>
FUSED_RESNET_INLINE void transform_input_1d(const V* d, int64_t stride, V* t, int64_t t_stride) {
  const V d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
  const V a = d4 - 2.f * d2, b = kRootHalf * d3 - kRoot2 * d1, c = d4 - 0.5f * d2, e = kRoot2 * d3 - kRootHalf * d1;
  t[0] = d0 - 2.5f * d2 + d4;
  t[t_stride] = a + b;
  t[2 * t_stride] = a - b;
  t[3 * t_stride] = c + e;
  t[4 * t_stride] = c - e;
  t[5 * t_stride] = d1 - 2.5f * d3 + d5;
}

// One dimension of A^T m.
template <class V>
FUSED_RESNET_INLINE void transform_output_1d(const V* m, int64_t stride, V* y, int64_t y_stride) {
  const V m0 = m[0], m1 = m[stride], m2 = m[2 * stride], m3 = m[3 * stride], m4 = m[4 * stride], m5 = m[5 * stride];
  const V sum12 = m1 + m2, difference12 = m1 - m2, sum34 = m3 + m4, difference34 = m3 - m4;
  y[0] = m0 + sum12 + sum34;
  y[y_stride] = kRootHalf * difference12 + kRoot2 * difference34;
  y[2 * y_stride] = 0.5f * sum12 + 2.f * sum34;
  y[3 * y_stride] = 0.5f * kRootHalf * difference12 + 2.f * kRoot2 * difference34 + m5;
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void transform_input(const Shape& s, const T* x, const Block& block, float* v) {
  using V = typename Lanes<kLanes>::Vector;
  using U = typename Lanes<kLanes>::Unaligned;
  const int64_t per_image = s.tiles_h() * s.tiles_w(), stride = v_stride(s, block.tiles());
  for (int64_t tile = block.tile_begin; tile < block.tile_end; ++tile) {
    const int64_t n = tile / per_image, rest = tile % per_image;
    const int64_t top = rest / s.tiles_w() * kOut - s.padding_h, left = rest % s.tiles_w() * kOut - s.padding_w;
    const int64_t h_begin = std::max<int64_t>(0, -top), h_end = std::min<int64_t>(kTile, s.H - top);
    const int64_t w_begin = std::max<int64_t>(0, -left), w_end = std::min<int64_t>(kTile, s.W - left);
    const bool is_whole = h_begin == 0 && w_begin == 0 && h_end == kTile && w_end == kTile;
    const T* corner = x + s.in.at(n, top, left);
    float* to = v + (tile - block.tile_begin) * s.C;
    for (int64_t c = 0; c < s.C; c += kLanes) {
      const T* from = corner + s.in.channel(c);
      V half[kPoints];
      for (int j = 0; j < kTile; ++j) {
        V d[kTile];
        if (is_whole) {
          for (int i = 0; i < kTile; ++i) load<kLanes>(from + s.in.at(0, i, j), d + i);
        } else {
          for (int i = 0; i < kTile; ++i) {
            const bool is_inside = i >= h_begin && i < h_end && j >= w_begin && j < w_end;
            d[i] = V{};
            if (is_inside) load<kLanes>(from + s.in.at(0, i, j), d + i);
          }
        }
        transform_input_1d(d, 1, half + j, kTile);
      }
      for (int i = 0; i < kTile; ++i) {
        V t[kTile];
        transform_input_1d(half + i * kTile, 1, t, 1);
        for (int j = 0; j < kTile; ++j) *reinterpret_cast<U*>(to + (i * kTile + j) * stride + c) = t[j];
      }
    }
  }
}

// kRows x kPanels panels of one product, over the whole of C.
template <int kLanes, int kRows, int kPanels>
FUSED_RESNET_INLINE void multiply(const float* a, const float* u, float* m, int64_t C, int64_t columns) {
  using V = typename Lanes<kLanes>::Vector;
  using U = typename Lanes<kLanes>::Unaligned;
  constexpr int kWide = kPanels * kPanel / kLanes, kPerPanel = kPanel / kLanes;
  V sums[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWide; ++j) sums[r][j] = V{};
  }
  for (int64_t c = 0; c < C; ++c) {
    V b[kWide];
    for (int j = 0; j < kWide; ++j) {
      b[j] = *reinterpret_cast<const U*>(u + (j / kPerPanel) * C * kPanel + c * kPanel + j % kPerPanel * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const float value = a[r * C + c];
      for (int j = 0; j < kWide; ++j) sums[r][j] += value * b[j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWide; ++j) *reinterpret_cast<U*>(m + r * columns + j * kLanes) = sums[r][j];
  }
}

template <int kLanes, int kPanels, int kRows>
FUSED_RESNET_INLINE void multiply_rows(int64_t rows, const float* a, const float* u, float* m, int64_t C,
                                       int64_t columns) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply<kLanes, kRows, kPanels>(a, u, m, C, columns);
    multiply_rows<kLanes, kPanels, kRows - 1>(rows, a, u, m, C, columns);
  }
}

template <int kLanes, int kPanels, int kMaxRows>
FUSED_RESNET_INLINE void multiply_all(const Shape& s, const float* v, const float* u, const Block& block, float* m) {
  const int64_t tiles = block.tiles(), columns = block.columns();
  // rows in equal portions: 16 as 8 + 8 keeps more sums in flight than 14 + 2
  const int64_t portions = (tiles + kMaxRows - 1) / kMaxRows, rows = (tiles + portions - 1) / portions;
  for (int point = 0; point < kPoints; ++point) {
    const float* a = v + point * v_stride(s, tiles);
    float* to = m + point * m_stride(columns, tiles);
    const float* weights = u + point * s.K * s.C;
    for (int64_t k = 0; k < columns; k += kPanels * kPanel) {
      const float* panel = weights + (block.k_begin + k) * s.C;
      const bool is_whole = k + kPanels * kPanel <= columns;
      for (int64_t first = 0; first < tiles; first += rows) {
        const int64_t count = std::min(rows, tiles - first);
        const float* from = a + first * s.C;
        float* into = to + first * columns + k;
        if (is_whole) {
          multiply_rows<kLanes, kPanels, kMaxRows>(count, from, panel, into, s.C, columns);
        } else {
          multiply_rows<kLanes, 1, kMaxRows>(count, from, panel, into, s.C, columns);
        }
      }
    }
  }
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void transform_output(const Shape& s, const float* m, const Block& block,
                                          const Epilogue<T>& epilogue, T* out) {
  using V = typename Lanes<kLanes>::Vector;
  using U = typename Lanes<kLanes>::Unaligned;
  const int64_t per_image = s.tiles_h() * s.tiles_w(), columns = block.columns();
  const int64_t stride = m_stride(columns, block.tiles());
  for (int64_t tile = block.tile_begin; tile < block.tile_end; ++tile) {
    const int64_t n = tile / per_image, rest = tile % per_image;
    const int64_t top = rest / s.tiles_w() * kOut, left = rest % s.tiles_w() * kOut;
    const int64_t height = std::min<int64_t>(kOut, s.P - top), width = std::min<int64_t>(kOut, s.Q - left);
    const float* from = m + (tile - block.tile_begin) * columns;
    const int64_t corner = s.out.at(n, top, left);
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t to = corner + s.out.channel(block.k_begin + k);
      V half[kOut * kTile];
      for (int j = 0; j < kTile; ++j) {
        V column[kTile];
        for (int i = 0; i < kTile; ++i) column[i] = *reinterpret_cast<const U*>(from + (i * kTile + j) * stride + k);
        transform_output_1d(column, 1, half + j, kTile);
      }
      V bias = V{};
      if (epilogue.bias != nullptr) bias = *reinterpret_cast<const U*>(epilogue.bias + block.k_begin + k);
      for (int64_t i = 0; i < height; ++i) {
        V y[kOut];
        transform_output_1d(half + i * kTile, 1, y, 1);
        for (int64_t j = 0; j < width; ++j) {
          finish<kLanes>(y[j] + bias, epilogue, to + s.out.at(0, i, j), kLanes, out);
        }
      }
    }
  }
}

template <int kLanes, int kPanels, int kMaxRows, class T>
FUSED_RESNET_INLINE void run_block(const Shape& s, const T* x, const float* u, const Epilogue<T>& epilogue,
                                   const Block& block, float* scratch, T* out) {
  float* v = scratch;
  float* m = scratch + kPoints * v_stride(s, block.tiles());
  transform_input<kLanes>(s, x, block, v);
  multiply_all<kLanes, kPanels, kMaxRows>(s, v, u, block, m);
  transform_output<kLanes>(s, m, block, epilogue, out);
}

template <class T>
FUSED_RESNET_AVX512 void run_block_avx512(const Shape& s, const T* x, const float* u, const Epilogue<T>& epilogue,
                                          const Block& block, float* scratch, T* out) {
  // 14 rows x 2 panels: 28 of 32 zmm hold sums, 2 the panels of U, 1 the value of V that meets them
  run_block<16, 2, 14>(s, x, u, epilogue, block, scratch, out);
}

template <class T>
FUSED_RESNET_AVX2 void run_block_avx2(const Shape& s, const T* x, const float* u, const Epilogue<T>& epilogue,
                                      const Block& block, float* scratch, T* out) {
  // 6 rows x 2 halves of a panel: 12 of 16 ymm hold sums, 2 the halves of U, 1 the value of V
  run_block<8, 1, 6>(s, x, u, epilogue, block, scratch, out);
}

template <class T>
void run_block_anywhere(const Shape& s, const T* x, const float* u, const Epilogue<T>& epilogue, const Block& block,
                        float* scratch, T* out) {
  // 4 rows x 4 quarters of a panel: 16 sums, 4 quarters of U and 1 value of V fit the 32 registers of 64-bit Arm;
  // x86-64 has 16 without AVX-512, and keeps a few of these in memory
  run_block<4, 1, 4>(s, x, u, epilogue, block, scratch, out);
}

}  // namespace winograd
}  // namespace fused_resnet
