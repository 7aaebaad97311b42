// Tensor maps in memory, and kernels that make them: tensormap.replace (PTX ISA 9.7.9.28), tensormap.cp_fenceproxy
// (9.7.13.16) and fence.proxy.tensormap (9.7.13.4).
//
// A copy reads its map through a proxy of its own. A map that the grid has written is there only for threads that
// executed the acquiring fence since, after the writer's releasing one.
#include "ptx/copies/tensor_maps.h"

#include <array>

#include "ptx/memory/places.h"

namespace fused_resnet::ptx {

struct KnownMaps {
  using Bytes = std::array<u8, kMapBytes>;
  std::map<std::pair<int, u64>, Bytes> acquired;  // by lane and address: what it was at the lane's fence
  Time released[kLanes] = {};                     // up to when a lane's writes were released
};

namespace {

constexpr u64 kMagic = 0x70616d726f736e74ull;
constexpr u32 kMapAlignment = 64;

KnownMaps& known_maps(Warp& warp) {
  if (!warp.known_maps) warp.known_maps = std::make_shared<KnownMaps>();
  return *warp.known_maps;
}

void release(Warp& warp, Lanes lanes) {
  FOR_ACTIVE(lanes) known_maps(warp).released[l] = warp.own[l] + 1;
}

// Whether the last writer's fence came after it wrote; of a block that is over nothing is known.
bool is_released(Machine& machine, const Region& region, u64 address) {
  const u64 word = (address - (region.base & ~u64(3))) / 4;
  if (region.words.empty() || region.split.count(word)) return true;
  const Region::Access& writer = region.words[word].writer;
  for (const auto& cluster : machine.resident)
    for (const auto& block : cluster->blocks) {
      if (machine.block_number(*block) != writer.block) continue;
      Warp& warp = *block->warps[writer.thread / kLanes];
      return warp.known_maps && warp.known_maps->released[writer.thread % kLanes] >= writer.time;
    }
  return true;
}

void check_known(Machine& machine, Warp& warp, int lane, u64 address) {
  if (!machine.is_written_by_grid(warp, address, kMapBytes)) return;
  const auto& acquired = known_maps(warp).acquired;
  const auto found = acquired.find({lane, address});
  if (found == acquired.end() || std::memcmp(found->second.data(), reinterpret_cast<u8*>(address), kMapBytes) != 0)
    machine.report("proxy", "the grid wrote the tensor map, and no fence.proxy.tensormap acquired it since");
}

// A map that tensormap.replace made of zeros may lack some of its fields.
void check_whole(Machine& machine, const PtxTensorMap& map) {
  if (map.magic != kMagic) machine.fault("tensor map", "there is no tensor map at this address");
  if (map.rank < 1 || map.rank > 5) machine.fault("tensor map", format("it has %d dimensions", map.rank));
  if (map.address == 0 || map.address % 16 != 0) machine.fault("tensor map", "its address is no multiple of 16 bytes");
  for (int d = 0; d < map.rank; ++d) {
    if (map.sizes[d] == 0 || map.element_strides[d] < 1 || map.element_strides[d] > 8)
      machine.fault("tensor map", format("dimension %d has size %llu and element stride %d", d,
                                         (unsigned long long)map.sizes[d], map.element_strides[d]));
    if (!map.is_im2col && (map.box[d] < 1 || map.box[d] > 256))
      machine.fault("tensor map", format("its box has %d elements in dimension %d", map.box[d], d));
    if (d > 0 && (map.strides[d - 1] % 16 != 0 || map.strides[d - 1] >> 40 != 0))
      machine.fault("tensor map", format("stride %d is no multiple of 16 bytes below 2**40", d - 1));
  }
  const int row = (map.is_im2col ? map.channels : map.box[0]) * size_of(Type(map.element_type));
  if (row % 16 != 0) machine.fault("tensor map", format("rows of %d bytes, no multiple of 16", row));
}

// ---- tensormap.replace

enum Field : s32 {
  kGlobalAddress,
  kRank,
  kBoxDim,
  kGlobalDim,
  kGlobalStride,
  kElementStride,
  kElementType,
  kInterleaveLayout,
  kSwizzleMode,
  kFillMode,
};

// The table of new_val; of .f32.ftz, .tf32.ftz and the packed types nothing is modelled.
constexpr Type kElementTypes[] = {kU8, kU16, kU32, kS32, kU64, kS64, kF16, kF32, kNoType, kF64, kBF16, kTF32, kNoType};
constexpr u8 kSpans[] = {0, 32, 64, 128};

void set_field(PtxTensorMap& map, Field field, int ordinal, u64 value) {
  switch (field) {
    case kGlobalAddress:
      map.address = value;
      break;
    case kRank:
      map.rank = static_cast<u8>(value + 1);
      break;
    case kBoxDim:
      map.box[ordinal] = static_cast<u16>(std::min<u64>(u32(value), 0xffff));
      break;
    case kGlobalDim:
      map.sizes[ordinal] = u32(value);
      break;
    case kGlobalStride:
      map.strides[ordinal] = value;
      break;
    case kElementStride:
      map.element_strides[ordinal] = static_cast<u8>(std::min<u64>(u32(value), 0xff));
      break;
    case kElementType:
      map.element_type = kElementTypes[value];
      break;
    case kInterleaveLayout:
      break;
    case kSwizzleMode:
      map.swizzle = kSpans[value];
      break;
    case kFillMode:
      map.nan_fill = static_cast<u8>(value);
      break;
  }
}

// a: the space, b: the field, c: its ordinal; the value is the last operand.
void replace(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  u64 room[kLanes];
  const u64* values = read(machine, warp, i.at(i.num_operands() - 1), room);
  FOR_ACTIVE(mask) {
    const Place place = locate(machine, warp, l, Space(i.a), address(warp, i.at(0), l), kMapBytes);
    if (place.space != kShared && place.space != kGlobal)
      machine.fault("tensor map", "it is neither in global nor in the block's shared memory");
    if (place.space == kShared && place.block != warp.block) machine.fault("tensor map", "it is in another block");
    if (place.address % kMapAlignment != 0) machine.fault("misaligned", "a tensor map is aligned to 64 bytes");
    access(machine, warp, l, place, kMapBytes, false, false);
    PtxTensorMap map;
    u8* to = access(machine, warp, l, place, kMapBytes, true, false);
    std::memcpy(&map, to, kMapBytes);
    const PtxTensorMap nothing{};
    if (map.magic != kMagic && std::memcmp(&map, &nothing, kMapBytes) != 0)
      machine.fault("tensor map", "there is neither a tensor map at this address nor zeros");
    if (map.is_im2col) machine.fault("tensor map", "tensormap.replace.tile of an im2col map");
    if (map.magic != kMagic) map.rank = 1;  // the rank counts from zero
    map.magic = kMagic;
    set_field(map, Field(i.b), i.c, values[l]);
    std::memcpy(to, &map, kMapBytes);
  }
}

void check_immediate(const Modifiers& m, Field field, s64 value) {
  const s64 most = field == kElementType ? s64(std::size(kElementTypes)) - 1 : field == kSwizzleMode ? 3 : 1;
  if (field == kInterleaveLayout && value != 0) m.refuse("interleaved layouts: no text says where their slices lie");
  if (value < 0 || value > most || (field == kElementType && kElementTypes[value] == kNoType))
    m.refuse("a value that is not modelled for this field");
}

void decode_replace(Modifiers& m, Instruction& i) {
  if (!m.take("tile") || !m.take("b1024")) m.refuse("it is .tile and of .b1024");
  if (m.peek("swizzle_atomicity")) m.refuse(".swizzle_atomicity needs sm_100a");
  i.b = m.any({"global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
               "interleave_layout", "swizzle_mode", "fill_mode"});
  if (i.b < 0) m.refuse("no field");
  const Field field = Field(i.b);
  i.a = m.take("global") ? kGlobal : m.any({"shared::cta", "shared"}) >= 0 ? kShared : kGeneric;
  if (m.type() != (field == kGlobalAddress || field == kGlobalStride ? kB64 : kB32)) m.refuse("its type");
  const bool has_ordinal = field >= kBoxDim && field <= kElementStride;
  expect_operands(m, i, has_ordinal ? "mis" : field >= kElementType ? "mi" : "ms");
  if (has_ordinal) {
    if (i.at(1).value < 0 || i.at(1).value > (field == kGlobalStride ? 3 : 4)) m.refuse("its ordinal");
    i.c = static_cast<int>(i.at(1).value);
  }
  if (field >= kElementType) check_immediate(m, field, i.at(1).value);
  i.handler = replace;
}

// ---- the proxy

// The warp copies one map, from shared to global memory, and releases it.
void cp_fenceproxy(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  const int first = __builtin_ctz(mask);
  const u64 to = address(warp, i.at(0), first), from = address(warp, i.at(1), first);
  FOR_ACTIVE(mask)
  if (address(warp, i.at(0), l) != to || address(warp, i.at(1), l) != from)
    machine.fault("tensor map", "the lanes of a warp name different maps");
  if (to % kMapAlignment != 0) machine.fault("misaligned", "a tensor map is aligned to 64 bytes");
  const Place source = locate(machine, warp, first, kShared, from, kMapBytes);
  const u8* bytes = access(machine, warp, first, source, kMapBytes, false, false);
  std::memcpy(access(machine, warp, first, {kGlobal, to}, kMapBytes, true, false), bytes, kMapBytes);
  release(warp, mask);
}

// The fence reads nothing itself: that its thread was ordered after the writer is for the copy to check.
void acquire_map(Machine& machine, Warp& warp, const Instruction& i, Lanes mask) {
  FOR_ACTIVE(mask) {
    const u64 place = address(warp, i.at(0), l);
    const Region* region = machine.region_of(place, kMapBytes);
    if (region == nullptr) machine.fault("out of bounds", "a fence for a tensor map that is not in global memory");
    if (place % kMapAlignment != 0) machine.fault("misaligned", "a tensor map is aligned to 64 bytes");
    const u8* bytes = reinterpret_cast<const u8*>(place);
    if (machine.is_written_by_grid(warp, place, kMapBytes) && !is_released(machine, *region, place))
      machine.report("proxy", "the tensor map's writer executed no fence.proxy.tensormap that releases it");
    std::copy(bytes, bytes + kMapBytes, known_maps(warp).acquired[{l, place}].begin());
  }
}

void release_maps(Machine&, Warp& warp, const Instruction&, Lanes mask) {
  release(warp, mask);
}

}  // namespace

PtxTensorMap map_at(Machine& machine, Warp& warp, int lane, u64 address, u64* global) {
  if (address < warp.block->grid->launch->parameter_bytes)
    machine.fault("tensor map", "an address of .param; wanted: a generic one, as cvta.param makes it");
  const Place place = locate(machine, warp, lane, kGeneric, address, kMapBytes);
  if (place.space != kParam && place.space != kGlobal)
    machine.fault("tensor map", "it is neither a parameter nor in global or constant memory");
  if (address % kMapAlignment != 0) machine.fault("tensor map", "it is not aligned to 64 bytes");
  PtxTensorMap map;
  if (place.space == kParam) {
    std::memcpy(&map, warp.block->grid->parameters + place.address, kMapBytes);
  } else {
    std::memcpy(&map, machine.global(warp, lane, address, kMapBytes, false, nullptr, kMapAlignment), kMapBytes);
    check_known(machine, warp, lane, address);
    *global = address;
  }
  check_whole(machine, map);
  return map;
}

void decode_tensormap(Modifiers& m, Instruction& i) {
  if (m.take("replace")) return decode_replace(m, i);
  if (!m.take("cp_fenceproxy") || !m.precedes("global", "shared::cta")) m.refuse();
  m.take("global");
  m.take("shared::cta");
  if (!m.take("tensormap::generic") || !m.take("release") || take_scope(m) == Scope::kWeak) m.refuse();
  if (!m.take("sync") || !m.take("aligned")) m.refuse("needs .sync.aligned");
  expect_operands(m, i, "mmi");
  if (i.at(2).value != kMapBytes) m.refuse("its size is 128");
  i.convergence = Convergence::kAligned;
  i.counted = Class::kFence;
  i.handler = cp_fenceproxy;
}

void decode_tensormap_fence(Modifiers& m, Instruction& i) {
  if (!m.take("proxy") || !m.take("tensormap::generic")) m.refuse();
  const int order = m.any({"acquire", "release"});
  if (order < 0 || take_scope(m) == Scope::kWeak) m.refuse();
  expect_operands(m, i, order == 0 ? "mi" : "");
  if (order == 0 && i.at(1).value != kMapBytes) m.refuse("its size is 128");
  i.handler = order == 0 ? acquire_map : release_maps;
}

}  // namespace fused_resnet::ptx
