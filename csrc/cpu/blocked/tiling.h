// How the outputs of a convolution are cut into tiles: runs of pixels at a constant distance in the input and next to
// each other in the output, which a micro-kernel computes at a time. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_resnet {
namespace blocked {

// rows pixels from `begin` of a line on. The bits of those that it has to write are set in `written`: pixels that the
// tile before writes, and the halo between two rows of a map, are computed and dropped.
struct Tile {
  int64_t line, begin;
  uint32_t written;
};

// P x Q outputs in lines. A line is a row of outputs or, in row space, the whole map: then a tile passes over the
// `pitch - Q` pixels of halo between two rows. Tiles are of one size, and none reaches beyond the end of a line: the
// last begins earlier instead.
class Tiling {
 public:
  Tiling() = default;

  // can_run_on: whether a step of one output is a step of one input pixel across the ends of rows, too.
  Tiling(int64_t P, int64_t Q, int64_t pitch, bool can_run_on, int64_t max_rows) : Q_(Q), pitch_(pitch) {
    cut(P, Q, max_rows);
    const int64_t by_rows = count();
    if (!can_run_on) return;
    cut(1, (P - 1) * pitch + Q, max_rows);
    if (count() >= by_rows) cut(P, Q, max_rows);
  }

  int64_t count() const { return lines_ * per_line_; }
  int rows() const { return static_cast<int>(rows_); }

  Tile at(int64_t index) const {
    const int64_t first = index % per_line_ * rows_, begin = std::min(first, length_ - rows_);
    Tile tile{index / per_line_, begin, 0};
    int64_t column = begin % pitch_;
    for (int64_t row = 0; row < rows_; row += pitch_ - column, column = 0) {
      if (column < Q_) tile.written |= ones(std::min(Q_ - column, rows_ - row)) << row;
    }
    tile.written &= ~ones(first - begin);
    return tile;
  }

 private:
  static uint32_t ones(int64_t count) { return (uint32_t{1} << count) - 1; }  // of at most 16

  // Portions of equal size: 17 as 9 + 8, which keep more sums in flight than 16 + 1.
  void cut(int64_t lines, int64_t length, int64_t max_rows) {
    lines_ = lines, length_ = length;
    per_line_ = (length + max_rows - 1) / max_rows;
    rows_ = (length + per_line_ - 1) / per_line_;
  }

  int64_t Q_ = 0, pitch_ = 1, lines_ = 0, length_ = 0, per_line_ = 1, rows_ = 0;
};

}  // namespace blocked
}  // namespace fused_resnet
