// mma.sync.m8n8k4 of .f16, and of .f64 in all shapes (PTX ISA 9.7.14.5.1, .2, .6 to .8): element by element.
#include "ptx/tensor_cores/mma.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kColumns = 8, kMostRows = 16, kMostDepth = 16;

struct Element {
  int row, column;
};

// ---- .f64. `a`: rows, `b`: k. A lane has elements four columns of A apart, and four rows of B.

Element of_a(int lane, int i, int rows) {
  return rows == 8 ? Element{lane / 4, lane % 4} : Element{lane / 4 + 8 * (i % 2), lane % 4 + 4 * (i / 2)};
}
Element of_b(int lane, int i) {
  return {lane % 4 + 4 * i, lane / 4};
}
Element of_c(int lane, int i) {
  return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2};
}

// The order of the sum is not specified: here it is along k.
void multiply_doubles(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  const int rows = instruction.a, depth = instruction.b;
  double a[kMostRows][kMostDepth], b[kMostDepth][kColumns], d[kMostRows][kColumns];
  u64 room[kLanes], sink[kLanes];
  for (int i = 0; i < instruction.count(1); ++i) {
    const u64* values = read(machine, warp, instruction.at(1, i), room);
    FOR_LANES a[of_a(l, i, rows).row][of_a(l, i, rows).column] = as<double>(values[l]);
  }
  for (int i = 0; i < instruction.count(2); ++i) {
    const u64* values = read(machine, warp, instruction.at(2, i), room);
    FOR_LANES b[of_b(l, i).row][of_b(l, i).column] = as<double>(values[l]);
  }
  for (int i = 0; i < instruction.count(3); ++i) {
    const u64* values = read(machine, warp, instruction.at(3, i), room);
    FOR_LANES d[of_c(l, i).row][of_c(l, i).column] = as<double>(values[l]);
  }
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < kColumns; ++column)
      for (int k = 0; k < depth; ++k) d[row][column] = std::fma(a[row][k], b[k][column], d[row][column]);
  for (int i = 0; i < instruction.count(0); ++i) {
    u64* to = destination(warp, instruction.at(0, i), sink);
    FOR_LANES to[l] = bits(d[of_c(l, i).row][of_c(l, i).column]);
  }
  machine.counts.tensor_multiply_adds += u64(rows) * kColumns * depth;
}

// ---- .f16: four products of 8 x 4 by 4 x 8, each of the lanes 4 q to 4 q + 3 and 16 more.

// A of rows, and B of columns: a lane has one line of four; else one of each of four lines.
Element along_k(int lane, int i, bool has_line) {
  const int half = lane < 16 ? 0 : 4;
  return has_line ? Element{lane % 4 + half, i} : Element{i + half, lane % 4};
}
Element of_sum(int lane, int i, bool is_half) {
  const int half = lane < 16 ? 0 : 4;
  if (is_half) return {lane % 4 + half, i};
  return {(lane & 1) + (i & 2) + half, (i & 4) + (lane & 2) + (i & 1)};
}

float half_of(const u64* values, int lane, int i) {
  return float_of(kF16, values[lane] >> 16 * (i % 2) & 0xffff);
}

// `a`: A is .row, `b`: B is .col; third: the type of D, from: of C.
void multiply_halves(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  float a[4][8][4], b[4][8][4], d[4][8][8];
  u64 rooms[8][kLanes], sink[kLanes];
  for (int i = 0; i < 4; ++i) {
    const u64* of_lanes = read(machine, warp, instruction.at(1, i / 2), rooms[0]);
    const u64* of_columns = read(machine, warp, instruction.at(2, i / 2), rooms[1]);
    FOR_LANES {
      const int q = l % 16 / 4;
      const Element in_a = along_k(l, i, instruction.a != 0), in_b = along_k(l, i, instruction.b != 0);
      a[q][in_a.row][in_a.column] = half_of(of_lanes, l, i);
      b[q][in_b.row][in_b.column] = half_of(of_columns, l, i);
    }
  }
  const bool from_half = instruction.from == kF16, to_half = instruction.third == kF16;
  for (int i = 0; i < 8; ++i) {
    const u64* values = read(machine, warp, instruction.at(3, from_half ? i / 2 : i), rooms[0]);
    FOR_LANES {
      const Element at = of_sum(l, i, from_half);
      d[l % 16 / 4][at.row][at.column] = from_half ? half_of(values, l, i) : as<float>(values[l]);
    }
  }
  double sums[4][8][8];
  for (int q = 0; q < 4; ++q)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        double products = 0;
        for (int k = 0; k < 4; ++k) products += double(a[q][row][k]) * double(b[q][column][k]);
        sums[q][row][column] = double(d[q][row][column]) + products;
      }
  for (int i = 0; i < instruction.count(0); ++i) {
    u64* to = destination(warp, instruction.at(0, i), sink);
    FOR_LANES {
      const auto sum = [&](int k) {
        const Element at = of_sum(l, k, to_half);
        return sums[l % 16 / 4][at.row][at.column];
      };
      const float whole = static_cast<float>(sum(i));
      to[l] = to_half ? rounded(kF16, sum(2 * i)) | u64(rounded(kF16, sum(2 * i + 1))) << 16
                      : bits(std::isnan(whole) ? canonical_nan() : whole);
    }
  }
  machine.counts.tensor_multiply_adds += 4 * 8 * 8 * 4;
}

void expect_counts(const Modifiers& m, const Instruction& i, int d, int a, int b, int c) {
  const int wanted[] = {d, a, b, c};
  for (int k = 0; k < 4; ++k)
    if (i.count(k) != wanted[k]) m.refuse(format("operand %d has %d registers, not %d", k + 1, i.count(k), wanted[k]));
}

void decode_doubles(Modifiers& m, Instruction& i) {
  if (!m.take("row") || !m.take("col")) m.refuse("A is .row and B is .col");
  m.take("rn");
  const int shape = m.any({"m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"});
  if (shape < 0 || m.types() != std::vector<Type>(4, kF64)) m.refuse("shape and types");
  i.a = shape == 0 ? 8 : 16;
  i.b = shape == 0 ? 4 : 2 << shape;
  i.handler = multiply_doubles;
  const int sums = i.a * kColumns / kLanes;
  expect_counts(m, i, sums, i.a * i.b / kLanes, kColumns * i.b / kLanes, sums);
}

void decode_halves(Modifiers& m, Instruction& i) {
  const bool row_first = m.precedes("row", "col");
  const bool has_row = m.take("row"), has_rows = has_row && m.take("row");
  const bool has_col = m.take("col"), has_cols = has_col && m.take("col");
  if (has_row + has_rows + has_col + has_cols != 2) m.refuse("A and B are each .row or .col");
  i.a = has_rows || (has_row && row_first);
  i.b = has_cols || (has_col && row_first);
  const std::vector<Type> types = m.types();
  const auto is_sum = [](Type type) { return type == kF16 || type == kF32; };
  if (types.size() != 4 || types[1] != kF16 || types[2] != kF16 || !is_sum(types[0]) || !is_sum(types[3]) ||
      (types[3] == kF32 && types[0] != kF32))
    m.refuse("types");
  i.third = types[0];
  i.from = types[3];
  i.handler = multiply_halves;
  expect_counts(m, i, types[0] == kF16 ? 4 : 8, 2, 2, types[3] == kF16 ? 4 : 8);
}

}  // namespace

bool decode_small_mma(Modifiers& m, Instruction& i) {
  for (const char* narrow : {"s4", "u4", "b1"})
    if (m.peek(narrow)) m.refuse("elements of 4 bits and of 1 bit");
  const bool has_doubles = m.peek("f64");
  if (!has_doubles && !m.peek("m8n8k4")) return false;
  i.convergence = Convergence::kAligned;
  expect_operands(m, i, "DSSS");
  if (has_doubles) {
    decode_doubles(m, i);
  } else {
    m.take("m8n8k4");
    decode_halves(m, i);
  }
  return true;
}

}  // namespace fused_resnet::ptx
