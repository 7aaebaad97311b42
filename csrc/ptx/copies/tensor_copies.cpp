// Tensor copies: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor, prefetch (PTX ISA 5.5, 9.7.9.27).
//
// A box of a tensor is walked in the order in which it lies in shared memory, and becomes pieces that are contiguous in
// global memory, or lie outside of the tensor and are filled. What lies outside counts as bytes all the same.
#include <algorithm>

#include "ptx/copies/copies.h"
#include "ptx/copies/tensor_maps.h"

namespace fused_resnet::ptx {
namespace {

enum Mode : s32 { kTile, kIm2col };
enum Kind : s32 { kLoad, kStore, kPrefetch };
constexpr s32 kOffsets = 4, kMulticast = 8, kOwnBlock = 16;  // beside the kind

struct Position {
  s64 of[5];  // innermost first
};

u64 nan_of(int type) {
  switch (type) {
    case kF16:
    case kBF16:
      return 0x7fff;
    case kF64:
      return 0x7fffffffffffffffull;
    default:
      return 0x7fffffff;
  }
}

int bytes_of_element(const PtxTensorMap& map) {
  return size_of(Type(map.element_type));
}

// What no published text explains is refused until a GPU decides it.
void check_map(Machine& machine, const PtxTensorMap& map, const Instruction& i, Mode mode) {
  if (map.rank != i.a) machine.fault("tensor map", format("it has %d dimensions, the instruction %d", map.rank, i.a));
  if ((mode == kIm2col) != (map.is_im2col != 0))
    machine.fault("tensor map", mode == kIm2col ? "an im2col copy by a tiled map" : "a tiled copy by an im2col map");
  const int row = (mode == kIm2col ? map.channels : map.box[0]) * bytes_of_element(map);
  if (map.swizzle != 0 && row != map.swizzle)
    machine.fault("tensor map", format("rows of %d bytes at a swizzle of %d are not understood", row, map.swizzle));
}

// The global address of a position; the innermost coordinate is taken as it is.
u64 address_of(const PtxTensorMap& map, const Position& position) {
  s64 offset = position.of[0] * bytes_of_element(map);
  for (int d = 1; d < map.rank; ++d) offset += position.of[d] * s64(map.strides[d - 1]);
  return map.address + u64(offset);
}

// `count` elements along the innermost dimension, clipped to the tensor.
void add_row(const PtxTensorMap& map, Position position, s64 count, std::vector<Piece>& pieces, u32& offset) {
  bool is_inside = true;
  for (int d = 1; d < map.rank; ++d) is_inside = is_inside && position.of[d] >= 0 && position.of[d] < s64(map.sizes[d]);
  const s64 begin = position.of[0], end = begin + count;
  const s64 first = is_inside ? std::clamp<s64>(begin, 0, s64(map.sizes[0])) : end;
  const s64 last = is_inside ? std::clamp<s64>(end, 0, s64(map.sizes[0])) : end;
  const auto add = [&](s64 from, s64 to, bool is_filled) {
    if (to <= from) return;
    position.of[0] = from;
    const u32 bytes = u32(to - from) * u32(bytes_of_element(map));
    pieces.push_back({offset, is_filled ? 0 : address_of(map, position), bytes});
    offset += bytes;
  };
  if (last <= first) return add(begin, end, true);
  add(begin, first, true);
  add(first, last, false);
  add(last, end, true);
}

// 5.5.3: a box of the tensor, each dimension but the innermost traversed with its element stride.
u32 walk_tile(const PtxTensorMap& map, const Position& base, std::vector<Piece>& pieces) {
  s64 counts[5] = {1, 1, 1, 1, 1};
  s64 rows = 1;
  for (int d = 1; d < map.rank; ++d) {
    counts[d] = (map.box[d] + map.element_strides[d] - 1) / map.element_strides[d];
    rows *= counts[d];
  }
  u32 offset = 0;
  for (s64 row = 0; row < rows; ++row) {
    Position position = base;
    s64 rest = row;
    for (int d = 1; d < map.rank; ++d) {
      position.of[d] += rest % counts[d] * map.element_strides[d];
      rest /= counts[d];
    }
    add_row(map, position, map.box[0], pieces, offset);
  }
  return offset;
}

// 5.5.4: pixels of the bounding box between the corners, W fastest, from one image into the next. The offsets, of a
// filter's tap, are added to where a pixel is read. Dimensions: channels, then W, H, D, then the image.
u32 walk_im2col(Machine& machine, const PtxTensorMap& map, const Position& base, const u32* offsets,
                std::vector<Piece>& pieces) {
  const int spatial = map.rank - 2;
  for (int d = 0; d < spatial; ++d)
    if (base.of[1 + d] < map.lower[d] || base.of[1 + d] >= s64(map.sizes[1 + d]) + map.upper[d])
      machine.fault("tensor map", format("coordinate %d of an im2col copy is %lld, outside of the bounding box", 1 + d,
                                         (long long)base.of[1 + d]));
  Position pixel = base;
  u32 offset = 0;
  for (int k = 0; k < map.pixels; ++k) {
    Position read = pixel;
    for (int d = 0; d < spatial; ++d) read.of[1 + d] += offsets[d];
    add_row(map, read, map.channels, pieces, offset);
    int d = 0;
    for (; d < spatial; ++d) {
      pixel.of[1 + d] += map.element_strides[1 + d];
      if (pixel.of[1 + d] < s64(map.sizes[1 + d]) + map.upper[d]) break;
      pixel.of[1 + d] = map.lower[d];
    }
    if (d == spatial) ++pixel.of[1 + spatial];
  }
  return offset;
}

// The operands' places: tensor and coordinates, offsets of im2col or -1, the multicast's ranks or -1.
struct Places {
  int shared, tensor, mbarrier, offsets, ranks;
};

Places places_of(const Instruction& i) {
  const Kind kind = Kind(i.c & 3);
  const bool has_offsets = i.c & kOffsets, is_multicast = i.c & kMulticast;
  if (kind == kStore) return {1, 0, -1, -1, -1};
  if (kind == kPrefetch) return {-1, 0, -1, has_offsets ? 1 : -1, -1};
  return {0, 1, 2, has_offsets ? 3 : -1, is_multicast ? (has_offsets ? 4 : 3) : -1};
}

u64 value_of(Machine& machine, Warp& warp, const PtxOperand& operand, int lane) {
  if (operand.kind == kMemory) return address(warp, operand, lane);
  u64 room[kLanes];
  return read(machine, warp, operand, room)[lane];
}

// 9.7.9.27.1.1: im2col's offsets have 16, 8 or 5 bits each.
void read_offsets(Machine& machine, Warp& warp, const Instruction& i, int operand, int lane, u32* offsets) {
  const int bits = i.a == 3 ? 16 : i.a == 4 ? 8 : 5;
  for (int d = 0; d < i.a - 2; ++d) {
    offsets[d] = u32(value_of(machine, warp, i.at(operand, d), lane)) & 0xffff;
    if (offsets[d] >> bits != 0)
      machine.fault("tensor map", format("an im2col offset of %u, more than %d bits", offsets[d], bits));
  }
}

// 9.7.9.27.1.3: .b32 and .b64 are a map's integers of that size; there is no sum of .f64.
bool is_known_of_tensors(Reduction reduction, Type type) {
  if (reduction < Reduction::kAnd) return type != kF64 && is_known(reduction, type, true);
  return type == kU32 || type == kS32 || type == kU64 || type == kS64;
}

// 9.7.9.27.1.1, the restrictions on copies to global memory.
void check_store(Machine& machine, const PtxTensorMap& map, const Position& base, const BulkCopy& copy) {
  for (int d = 0; d < map.rank; ++d) {
    if (base.of[d] < 0) machine.fault("tensor map", "a negative coordinate of a copy to global memory");
    if (d > 0 && map.element_strides[d] != 1)
      machine.fault("tensor map", "element strides of a copy to global memory are not understood");
  }
  for (int d = 0; map.is_im2col && d < map.rank - 2; ++d)
    if (map.lower[d] < 0 || map.upper[d] > 0)
      machine.fault("tensor map", "the bounding box of a copy to global memory leaves the tensor");
  if (copy.reduction != Reduction::kNone && !is_known_of_tensors(copy.reduction, copy.type))
    machine.fault("tensor map", format("there is no such reduction of elements of .%s", name_of(copy.type)));
}

std::shared_ptr<BulkCopy> made(Machine& machine, Warp& warp, const Instruction& i, int lane, const Places& places) {
  auto copy = std::make_shared<BulkCopy>();
  const u64 place = value_of(machine, warp, i.at(places.tensor, 0), lane);
  const PtxTensorMap map = map_at(machine, warp, lane, place, &copy->map);
  const Mode mode = Mode(i.b);
  check_map(machine, map, i, mode);
  Position base{};
  for (int d = 0; d < i.a; ++d) base.of[d] = s32(value_of(machine, warp, i.at(places.tensor, 1 + d), lane));
  copy->warp = &warp;
  copy->lane = lane;
  copy->pc = machine.pc;
  copy->swizzle = map.swizzle;
  copy->fill = map.nan_fill ? nan_of(map.element_type) : 0;
  copy->fill_bytes = u32(bytes_of_element(map));
  copy->reduction = Reduction(i.d);
  copy->type = Type(map.element_type);
  u32 offsets[3] = {};
  if (places.offsets >= 0) read_offsets(machine, warp, i, places.offsets, lane, offsets);
  copy->bytes =
      mode == kTile ? walk_tile(map, base, copy->pieces) : walk_im2col(machine, map, base, offsets, copy->pieces);
  if (Kind(i.c & 3) == kStore) check_store(machine, map, base, *copy);
  return copy;
}

// a: the rank, b: the mode, c: what kind and more, d: the reduction.
void tensor_copy(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  const Places places = places_of(i);
  const Kind kind = Kind(i.c & 3);
  FOR_ACTIVE(mask) {
    auto copy = made(machine, warp, i, l, places);
    if (kind == kPrefetch) continue;  // all that it changes is time
    u32 place;
    if (kind == kLoad) {
      const u32 ranks = places.ranks < 0 ? 0 : u32(value_of(machine, warp, i.at(places.ranks), l)) & 0xffff;
      if (places.ranks >= 0 && ranks == 0) machine.fault("tensor map", "multicast to no block");
      copy->route = Route::kGlobalToShared;
      copy->targets = targets_of(machine, warp, l, i, places.shared, places.mbarrier, ranks, i.c & kOwnBlock);
      place = copy->targets[0].address;
    } else {
      copy->route = Route::kSharedToGlobal;
      place = copy->source = place_of(machine, warp, kSharedCta, address(warp, i.at(places.shared), l)).address;
      auto& pieces = copy->pieces;  // what lies outside is not written
      pieces.erase(std::remove_if(pieces.begin(), pieces.end(), [](const Piece& p) { return p.global == 0; }),
                   pieces.end());
    }
    if (place % 128 != 0) machine.fault("misaligned", format("shared %u of a tensor copy, not of 128 bytes", place));
    issue(machine, std::move(copy));
  }
}

void expect_tensor_operands(Modifiers& m, Instruction& i, bool has_hint) {
  const Places places = places_of(i);
  std::string shape = Kind(i.c & 3) == kLoad ? "mTm" : Kind(i.c & 3) == kStore ? "Tm" : "T";
  if (places.offsets >= 0) shape += 'S';
  if (places.ranks >= 0) shape += 's';
  if (has_hint) shape += 's';
  if (i.num_operands() != int(shape.size())) m.refuse(format("%d operands", i.num_operands()));
  if (i.count(places.tensor) != 1 + i.a) m.refuse(format("%d coordinates", i.count(places.tensor) - 1));
  if (places.offsets >= 0 && i.count(places.offsets) != i.a - 2) m.refuse("im2col offsets");
  for (int k = 0; k < i.num_operands(); ++k)
    if (shape[k] == 'm' && i.at(k).kind != kMemory) m.refuse("operands");
}

}  // namespace

void decode_tensor_copy(Modifiers& m, Instruction& i) {
  const bool is_prefetch = m.take("prefetch");
  i.a = 1 + m.any({"1d", "2d", "3d", "4d", "5d"});
  if (i.a == 0) m.refuse("no dimension");
  const bool without_offsets = m.take("im2col_no_offs");
  i.b = without_offsets || m.take("im2col") ? kIm2col : kTile;
  if (i.b == kTile) m.take("tile");
  if (i.b == kIm2col && i.a < 3) m.refuse("im2col has 3 to 5 dimensions");
  if (!m.take("global")) m.refuse("neither from nor to .global");
  const bool is_store = m.take("bulk_group");
  if (is_prefetch) {
    if (!m.take("L2")) m.refuse();
    i.c = kPrefetch;
  } else if (is_store) {
    if (!m.take("shared::cta")) m.refuse("not from .shared::cta");
    i.c = kStore;
  } else {
    const int to = m.any({"shared::cluster", "shared::cta"});
    if (to < 0) m.refuse("not to shared memory");
    if (!m.take("mbarrier::complete_tx::bytes")) m.refuse("no mechanism of completion");
    i.c = kLoad | (to == 1 ? kOwnBlock : 0);
    if (m.take("multicast::cluster")) i.c |= kMulticast;
    if (to == 1 && i.c & kMulticast) m.refuse("multicast is to .shared::cluster");
  }
  if (i.b == kIm2col && !without_offsets && !is_store) i.c |= kOffsets;
  if ((i.b == kIm2col && without_offsets != is_store) || (i.d != s32(Reduction::kNone) && !is_store)) m.refuse();
  i.handler = tensor_copy;
  expect_tensor_operands(m, i, m.take("L2::cache_hint"));
}

}  // namespace fused_resnet::ptx
