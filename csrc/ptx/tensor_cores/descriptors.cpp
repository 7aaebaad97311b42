// Where the elements of a wgmma's matrices lie in shared memory.
//
// Both layouts are made of chunks of 16 bytes. K-major: a chunk is half of a row's 32 bytes along k, and eight rows are
// a core matrix. MN-major, for elements of two bytes: a chunk has eight neighbouring rows at one k.
//
//                K-major                                    MN-major
//   no swizzle   row % 8: 16 bytes, row / 8: stride,        row / 8: stride, k % 8: 16 bytes,
//                chunk: leading                             k / 8: leading
//   swizzle      row % 8: span, row / 8: stride,            row / 8 % (span / 16): 16 bytes, beyond: leading,
//                chunk: 16 bytes                            k % 8: span, k / 8: stride
//
// The swizzle exchanges chunks within a row of the pattern by the row's number, both taken from the address behind the
// base offset.
#include "ptx/tensor_cores/descriptors.h"

#include <algorithm>

namespace fused_resnet::ptx {
namespace {

constexpr u32 kChunk = 16, kLine = 128;  // bytes; a base offset counts lines
constexpr int kHalves = kChunk / 2;      // elements of MN-major chunks
constexpr int kDepth = 16;               // k of MN-major matrices

u32 swizzled(u32 address, const Descriptor& d) {
  const u32 in_pattern = address - d.base_offset * kLine;
  return address ^ (in_pattern >> 3 & (d.span - 1) & ~(kChunk - 1));
}

u32 k_major_chunk(const Descriptor& d, int row, int chunk) {
  const bool is_plain = d.span == static_cast<int>(kChunk);
  const u32 offset = row / 8 * d.stride + row % 8 * d.span + chunk * (is_plain ? d.leading : kChunk);
  return swizzled(d.start + offset, d);
}

u32 mn_major_chunk(const Descriptor& d, int eight_rows, int k) {
  const int chunks = d.span / static_cast<int>(kChunk);
  const bool is_plain = chunks == 1;
  const u32 along_rows = eight_rows % chunks * kChunk + eight_rows / chunks * (is_plain ? d.stride : d.leading);
  const u32 along_k = k % 8 * d.span + k / 8 * (is_plain ? d.leading : d.stride);
  return swizzled(d.start + along_rows + along_k, d);
}

template <class F>
void for_chunks(const MatrixPart& part, F f) {  // f(address, row, k)
  if (part.is_mn_major) {
    for (int k = 0; k < kDepth; ++k)
      for (int row = part.first; row < part.first + part.rows; row += 8)
        f(mn_major_chunk(part.descriptor, row / 8, k), row, k);
  } else {
    for (int row = part.first; row < part.first + part.rows; ++row)
      for (int chunk = 0; chunk < 2; ++chunk) f(k_major_chunk(part.descriptor, row, chunk), row, chunk);
  }
}

u32 decoded(u64 encoded, int shift) {  // matrix-descriptor-encode(x) = (x & 0x3ffff) >> 4
  return static_cast<u32>(encoded >> shift & 0x3fff) << 4;
}

}  // namespace

Descriptor descriptor_of(u64 encoded) {
  static const int spans[] = {16, 128, 64, 32};
  return {decoded(encoded, 0), decoded(encoded, 16), decoded(encoded, 32), spans[encoded >> 62],
          static_cast<u32>(encoded >> 49 & 7)};
}

void check_descriptor(Machine& machine, u64 encoded) {
  constexpr u64 kReserved = 0x3ffull << 52 | 7ull << 46 | 3ull << 30 | 3ull << 14;
  if (encoded & kReserved) machine.report("descriptor", format("reserved bits of %#llx", (unsigned long long)encoded));
  if (encoded >> 62 == 0 && encoded >> 49 & 7) machine.report("descriptor", "a base offset without a swizzle");
}

// The pattern of eight rows begins at a multiple of its size, or as many lines behind as the base offset says. A matrix
// may begin further on in its first row, as long as it stays in that row.
void check_start(Machine& machine, const MatrixPart& part, int element_bytes) {
  const Descriptor& d = part.descriptor;
  if (d.span == static_cast<int>(kChunk)) return;
  const u32 pattern = 8 * d.span, into_row = d.start % d.span, begin = d.start - into_row;
  const u32 base_offset = begin % pattern == 0 ? 0 : begin / kLine % 8;
  if (d.base_offset != base_offset || (begin % pattern != 0 && begin % kLine != 0) ||
      (begin % pattern != 0 && base_offset == 0)) {
    machine.report("descriptor", format("start %u lies in row %u of the %d-byte swizzle's pattern, with base offset %u",
                                        d.start, begin % pattern / d.span, d.span, d.base_offset));
  }
  const int wanted = part.is_mn_major ? std::min(part.rows * element_bytes, d.span) : kDepthBytes;
  if (into_row + wanted > static_cast<u32>(d.span)) {
    machine.report("descriptor", format("start %u: %d bytes from there leave the pattern's row of %d bytes", d.start,
                                        wanted, d.span));
  }
}

std::vector<Wgmma::Range> ranges_of(const MatrixPart& part) {
  std::vector<Wgmma::Range> ranges;
  for_chunks(part, [&ranges](u32 address, int, int) {
    if (!ranges.empty()) {
      Wgmma::Range& last = ranges.back();
      if (address == last.address + last.bytes || address + kChunk == last.address) {
        last.address = std::min(last.address, address);
        last.bytes += kChunk;
        return;
      }
    }
    ranges.push_back({address, kChunk});
  });
  return ranges;
}

void load(Warp& warp, const MatrixPart& part, Tile* rows) {
  SharedMemory& shared = warp.block->shared;
  for_chunks(part, [&](u32 address, int row, int k) {
    const u8* chunk = shared.at(address, kChunk);
    if (part.is_mn_major) {
      for (int i = 0; i < kHalves; ++i) std::memcpy(rows[row - part.first + i] + 2 * k, chunk + 2 * i, 2);
    } else {
      std::memcpy(rows[row - part.first] + kChunk * k, chunk, kChunk);
    }
  });
}

}  // namespace fused_resnet::ptx
