// Matrices of 8 x 8 between shared memory and registers: ldmatrix, stmatrix, movmatrix (PTX ISA 9.7.14.5.15 to .17).
//
// Lane l has columns 2 (l % 4) and one more of row l / 4 in one register; .trans exchanges rows and columns. Forms of
// bytes (m16n16, m8n16, m16n8) need sm_100 and are refused.
#include "ptx/tensor_cores/mma.h"

namespace fused_resnet::ptx {
namespace {

constexpr int kSize = 8, kRowBytes = 16;  // of a matrix

using Matrix = u16[kSize][kSize];

// Of the instruction: a: how many matrices, b: whether transposed, c: whether the address is generic.
u64 fragment_of(const Matrix& matrix, int lane, bool transposed) {
  const int row = lane / 4, column = lane % 4 * 2;
  const u16 low = transposed ? matrix[column][row] : matrix[row][column];
  const u16 high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
  return low | static_cast<u64>(high) << 16;
}

void place(u64 fragment, int lane, bool transposed, Matrix* matrix) {
  const int row = lane / 4, column = lane % 4 * 2;
  u16& low = transposed ? (*matrix)[column][row] : (*matrix)[row][column];
  u16& high = transposed ? (*matrix)[column + 1][row] : (*matrix)[row][column + 1];
  low = static_cast<u16>(fragment);
  high = static_cast<u16>(fragment >> 16);
}

// Lane 8 i + r has the address of row r of matrix i. A generic address must be one of this block's shared memory.
void find_rows(Machine& machine, Warp& warp, const Instruction& instruction, int operand, u32* rows) {
  for (int l = 0; l < kSize * instruction.a; ++l) {
    u64 row = address(warp, instruction.at(operand), l);
    if (instruction.c) {
      if (row >> 32 != kSharedWindow >> 32) machine.fault("out of bounds", "a generic address is not in shared memory");
      const SharedPlace place = shared_place(machine, warp, static_cast<u32>(row - kSharedWindow));
      if (place.block != warp.block) machine.fault("out of bounds", "the shared memory of another block");
      row = place.address;
    }
    rows[l] = static_cast<u32>(row);
  }
}

Lanes lanes_with_rows(const Instruction& instruction) {
  return instruction.a == 4 ? kAllLanes : (1u << kSize * instruction.a) - 1;
}

void ldmatrix(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  SharedMemory& shared = warp.block->shared;
  u32 rows[kLanes];
  u64 loaded[4][kLanes], sink[kLanes];
  find_rows(machine, warp, instruction, 1, rows);
  for (int i = 0; i < instruction.a; ++i) {
    Matrix matrix;
    for (int r = 0; r < kSize; ++r) {
      const int lane = i * kSize + r;
      std::memcpy(matrix[r], shared.at(rows[lane], kRowBytes), kRowBytes);
      shared.read(warp, lane, rows[lane], kRowBytes);
    }
    FOR_LANES loaded[i][l] = fragment_of(matrix, l, instruction.b);
  }
  for (int i = 0; i < instruction.a; ++i) {
    u64* to = destination(warp, instruction.at(0, i), sink);
    std::memcpy(to, loaded[i], sizeof loaded[i]);
  }
  machine.count_shared(rows, lanes_with_rows(instruction), kRowBytes, false);
}

void stmatrix(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  SharedMemory& shared = warp.block->shared;
  u32 rows[kLanes];
  u64 room[kLanes];
  find_rows(machine, warp, instruction, 0, rows);
  for (int i = 0; i < instruction.a; ++i) {
    const u64* values = read(machine, warp, instruction.at(1, i), room);
    Matrix matrix;
    FOR_LANES place(values[l], l, instruction.b, &matrix);
    for (int r = 0; r < kSize; ++r) {
      const int lane = i * kSize + r;
      u8* to = shared.at(rows[lane], kRowBytes);
      shared.write(warp, lane, rows[lane], kRowBytes);
      std::memcpy(to, matrix[r], kRowBytes);
    }
  }
  machine.count_shared(rows, lanes_with_rows(instruction), kRowBytes, true);
}

void movmatrix(Machine& machine, Warp& warp, const Instruction& instruction, Lanes mask) {
  expect_whole_warp(machine, mask);
  u64 room[kLanes], sink[kLanes];
  const u64* values = read(machine, warp, instruction.at(1), room);
  Matrix matrix;
  FOR_LANES place(values[l], l, false, &matrix);
  u64* to = destination(warp, instruction.at(0), sink);
  FOR_LANES to[l] = fragment_of(matrix, l, true);
}

void decode_transfer(Modifiers& modifiers, Instruction& instruction, bool is_load) {
  const int count = modifiers.any({"x1", "x2", "x4"});
  if (!modifiers.take("m8n8") || count < 0) modifiers.refuse("shape and number: .m8n8 and .x1, .x2 or .x4");
  instruction.a = 1 << count;
  instruction.b = modifiers.take("trans");
  instruction.c = modifiers.any({"shared", "shared::cta"}) < 0;
  if (modifiers.type() != kB16) modifiers.refuse("type: .b16");
  instruction.handler = is_load ? ldmatrix : stmatrix;
  expect_operands(modifiers, instruction, is_load ? "Dm" : "mS");
  if (instruction.count(is_load ? 0 : 1) != instruction.a) modifiers.refuse("number of registers");
}

}  // namespace

void decode_matrix(Modifiers& modifiers, Instruction& instruction) {
  if (modifiers.name() == "mma") return decode_mma(modifiers, instruction);
  if (!modifiers.take("sync") || !modifiers.take("aligned")) modifiers.refuse("needs .sync.aligned");
  instruction.convergence = Convergence::kAligned;
  if (modifiers.name() != "movmatrix") return decode_transfer(modifiers, instruction, modifiers.name() == "ldmatrix");
  if (!modifiers.take("m8n8") || !modifiers.take("trans") || modifiers.type() != kB16) modifiers.refuse("form");
  instruction.handler = movmatrix;
  expect_operands(modifiers, instruction, "ds");
}

}  // namespace fused_resnet::ptx
