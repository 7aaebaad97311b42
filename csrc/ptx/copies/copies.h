// Asynchronous copies: cp.async (PTX ISA 9.7.9.25.3), bulk copies (9.7.9.25.4), tensor copies (9.7.9.27).
#pragma once

#include <vector>

#include "ptx/copies/mbarriers.h"

namespace fused_resnet::ptx {

enum class Reduction : s32 { kNone = -1, kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor };

// Bytes of a bulk copy that are contiguous in global memory and, but for the swizzle, in shared memory.
struct Piece {
  u32 offset;  // in shared memory, from the tile's begin
  u64 global;  // 0: outside of the tensor
  u32 bytes;
};

struct Target {  // of a copy to shared memory; a multicast copy has several
  Block* block;
  u32 address, mbarrier;
};

enum class Route : u8 {
  kGlobalToShared,  // completes on an mbarrier
  kSharedToShared,  // likewise, in a block of the cluster
  kSharedToGlobal,  // completes in a bulk group
  kArrival,         // cp.async.mbarrier.arrive: when the thread's cp.async copies so far are over
  kFromRegisters,   // st.async and red.async to shared memory
};

struct BulkCopy {
  Route route;
  Warp* warp;
  int lane, pc;
  u32 bytes;                    // in shared memory: of a box all of it, even where it lies outside of the tensor
  u32 source = 0;               // of copies from shared memory, the issuing block's
  std::vector<Target> targets;  // of copies to shared memory
  std::vector<Piece> pieces;
  int swizzle = 0;
  Reduction reduction = Reduction::kNone;
  Type type = kNoType;    // of a reduction's elements
  u64 fill = 0;           // an element outside of the tensor
  u32 fill_bytes = 1;     // its size
  std::vector<u8> data;   // what was taken from shared memory
  bool is_taken = false;  // from shared memory: the source is free
  bool is_free = false;   // the thread has waited for that
  bool has_landed = false;
  u64 map = 0;         // its tensor map in global memory, which must not change until it has been read
  u32 num_copies = 0;  // of kArrival: cp.async copies of the thread that come before
};

// The address of the swizzled place in shared memory: bits 7 to 9 go into bits 4 to 6, and so on (PTX ISA 5.5.6).
u32 swizzled(u32 address, int span);

// copies.cpp: checks the copy's places, marks them as in flight and leaves it pending.
void issue(Machine& machine, std::shared_ptr<BulkCopy> copy);
// Elements of `type` are combined into `to`, in random order. Bulk fp32 additions flush subnormals.
void reduce(Machine& machine, Reduction reduction, Type type, u8* to, const u8* from, u32 bytes);
Reduction take_reduction(Modifiers& modifiers);
// The table of types in 9.7.9.25.4.2; .b32 and .b64 are those of .and, .or and .xor.
bool is_known(Reduction reduction, Type type, bool in_global);
// Reads the destination's and the mbarrier's operands; `ranks`: of a multicast copy, or 0. `own`: .shared::cta, which
// is the executing block's alone.
std::vector<Target> targets_of(Machine& machine, Warp& warp, int lane, const Instruction& i, int to, int mbarrier,
                               u32 ranks, bool own);

// The thread waits until at most so many of its last groups are pending; with .read only until their sources are free.
void wait_for_groups(Machine& machine, Warp& warp, int lane, size_t may_stay, bool only_read);

void decode_cp_async(Modifiers&, Instruction&);            // cp_async.cpp
void decode_bulk_copy(Modifiers&, Instruction&);           // bulk_copies.cpp
void decode_tensor_copy(Modifiers&, Instruction&);         // tensor_copies.cpp
void land_arrival(Machine& machine, BulkCopy& copy);       // cp_async.cpp
void land_store(Machine& machine, const BulkCopy& store);  // async_stores.cpp
bool has_copies_in_flight(const BulkCopy& arrival);
void check_cp_async_at_exit(Machine& machine, Warp& warp, Lanes exiting);
// In the byte counts of writable regions: from here to the copy's end, or no longer.
void mark_in_global(Machine& machine, u64 address, u32 bytes, bool is_write, int change);

}  // namespace fused_resnet::ptx
