// The C interface of the emulator: what Python hands over and what it gets back. No Python ABI. Python's side of it is
// fused_resnet/emulation/interface.py.
#pragma once

#include <cstdint>

// The only names that the library shows.
#pragma GCC visibility push(default)
extern "C" {

// One operand, or one element of a vector operand.
struct PtxOperand {
  int32_t kind;   // ptx::OperandKind
  int32_t index;  // the register's, the predicate's or the special register's; of memory: the base register, or -1
  int64_t value;  // an immediate, an offset, or of a predicate: whether it is negated
};

struct PtxRegion {  // global memory that the kernel may touch
  uint64_t base, size;
  int32_t writable;
  const char* name;
};

// A tensor map's 128 bytes, by value: what cuTensorMapEncode* would make, innermost first. How a real one encodes the
// same is not published.
struct PtxTensorMap {
  uint64_t magic, address;
  uint64_t sizes[5], strides[4];      // elements; bytes, of all dimensions but the innermost
  int16_t lower[3], upper[3];         // im2col: corners of W, H, D
  uint16_t box[5], pixels, channels;  // im2col: a box's pixels and channels
  uint8_t element_strides[5];
  uint8_t rank, element_type;  // ptx::Type
  uint8_t swizzle, is_im2col, nan_fill;
};

struct PtxLaunch {
  void* program;
  uint32_t grid[3], block[3], cluster[3];
  uint32_t shared_bytes;  // static and dynamic
  uint32_t registers;     // of a thread, as setmaxnreg counts them; 0: not known
  const uint8_t* parameters;
  uint32_t parameter_bytes;
  const uint32_t* blocks;  // indices of the blocks to run; null: all
  int32_t num_blocks;
};

struct PtxOptions {
  int32_t landing;  // of asynchronous work. 0: as late as the waits allow, 1: at once, 2: at random
  int32_t
      schedule;  // of warps. 0: random quanta, 1: one instruction each in turn, 2: each as far as it goes, 3: backwards
  uint64_t seed;
  uint64_t max_steps;  // warp instructions, all blocks together
  int32_t races;       // 0: data only, 1: races too, 2: also what PTX demands and hardware does not need
  int32_t rounding;    // of tensor-core sums. 0: fp64, else the GPU's: 80, 89, 90
  int32_t overlap;     // of two launches with programmatic dependence. 0: one after the other, 1: interleaved
};

// What was executed, of all blocks that ran. An instruction counts once a warp.
struct PtxCounts {
  uint64_t warp_instructions, thread_instructions;
  uint64_t integer, floating, half, conversion, special, move, compare, control, exchange;
  uint64_t global_loads, global_stores, shared_loads, shared_stores, local_accesses, parameter_loads, atomics;
  uint64_t matrix_loads, matrix_stores, cp_async, bulk_copies, mma, wgmma, tensor_multiply_adds;
  uint64_t barriers, mbarrier_operations, fences, waits;
  // 32-byte sectors that the requests of warps, cp.async and bulk copies touch, each request by itself
  uint64_t global_load_sectors, global_store_sectors;
  // 32-byte sectors that were touched at least once
  uint64_t distinct_load_sectors, distinct_store_sectors;
  // passes of 128 bytes through the 32 banks, and how many there would be without conflicts
  uint64_t shared_load_wavefronts, shared_load_ideal, shared_store_wavefronts, shared_store_ideal;
  uint64_t bulk_bytes;  // between global and shared memory by bulk and tensor copies
};

struct PtxOutcome {
  PtxCounts counts;
  double seconds;  // of CPU time
  int32_t num_reports, faulted;
};

void* ptx_program(int32_t registers, int32_t predicates, int32_t local_bytes);
void ptx_free(void* program);
// Adds an instruction. `counts` has the number of elements of each top-level operand. Null, or what is wrong with it.
const char* ptx_add(void* program, const char* op, int32_t predicate, int32_t negated, const PtxOperand* operands,
                    const int32_t* counts, int32_t num_operands, int32_t line, const char* text, int32_t target);
// Runs the launches, in order. Reports go to `reports`, one a paragraph that begins with "[kind]".
int32_t ptx_launch(const PtxLaunch* launches, int32_t num_launches, const PtxRegion* regions, int32_t num_regions,
                   const PtxOptions* options, PtxOutcome* outcome, char* reports, int32_t size);
}
#pragma GCC visibility pop
