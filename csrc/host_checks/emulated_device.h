// The names of device.cuh and sm80/instructions.cuh for the host: a block of CUDA threads as fibers, so that the
// kernels' own source runs without a GPU. Slow, exact about who holds what, and unforgiving: shared memory starts as
// NaN, asynchronous copies land as early or as late as the hardware may land them, warps run in either order, and a
// missing barrier shows.
//
// The warp-wide instructions are written from the PTX ISA (sections on ldmatrix and on mma fragments), not from
// tile_layout.h.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/epilogue.cuh"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace fused_resnet {

// The freedom the hardware has and a kernel must not depend on.
struct Schedule {
  bool copies_land_early = false;  // at the copy instead of at the wait
  bool last_warp_first = false;
};

class EmulatedBlock {
 public:
  static constexpr int kWarp = 32;
  static constexpr size_t kStackBytes = 128 * 1024;
  static constexpr size_t kSlotBytes = 64;

  int64_t block = 0, num_blocks = 1;
  int num_threads = 0;

  // Where asynchronous copies may read.
  struct Range {
    const void *first, *last;
  };
  std::vector<Range> readable;

  static EmulatedBlock*& current() {
    static thread_local EmulatedBlock* block = nullptr;
    return block;
  }

  // Runs kernel() in every thread of every block, and after_block() after each. Throws what the kernel throws, or if it
  // deadlocks.
  template <class Kernel, class AfterBlock>
  static void run_grid(int64_t blocks, int threads, size_t shared_bytes, Schedule schedule,
                       const std::vector<Range>& readable, const Kernel& kernel, const AfterBlock& after_block) {
    for (int64_t i = 0; i < blocks; ++i) {
      EmulatedBlock block(threads, shared_bytes, schedule);
      block.block = i;
      block.num_blocks = blocks;
      block.readable = readable;
      block.entry_ = [](void* k) { (*static_cast<const Kernel*>(k))(); };
      block.kernel_ = const_cast<Kernel*>(&kernel);
      block.run();
      after_block();
    }
  }

  int thread() const { return running_; }
  unsigned char* shared() { return shared_; }

  void require(bool is_fine, const char* what) {
    if (!is_fine && failure_ == nullptr) failure_ = what;
  }

  // [p, p + bytes) must be an aligned part of shared memory
  void require_shared(const void* p, size_t bytes) {
    const auto* byte = static_cast<const unsigned char*>(p);
    require(byte >= shared_ && byte + bytes <= shared_ + shared_bytes_, "access outside shared memory");
    require(reinterpret_cast<uintptr_t>(p) % bytes == 0, "misaligned shared memory access");
  }

  void sync_block() { wait(++fibers_[running_]->block_arrivals, &Fiber::block_arrivals, 0, num_threads); }

  // Every lane gives a value and sees those of all lanes, as warp-wide instructions do.
  template <class Value>
  const Value* exchange(const Value& value) {
    static_assert(sizeof(Value) <= kSlotBytes, "slot too small");
    const int first = running_ / kWarp * kWarp;
    const int64_t arrival = ++fibers_[running_]->warp_arrivals;
    // two sets of slots: a lane may enter the next exchange while others still read this one, never the one after
    Value* slots = reinterpret_cast<Value*>(slots_[running_ / kWarp][arrival % 2]);
    slots[running_ - first] = value;
    wait(arrival, &Fiber::warp_arrivals, first, first + kWarp);
    return slots;
  }

  void copy_async(void* shared, const void* global, bool is_valid, size_t bytes) {
    require_shared(shared, bytes);
    if (is_valid) {
      const auto* byte = static_cast<const unsigned char*>(global);
      const bool is_inside = std::any_of(readable.begin(), readable.end(),
                                         [&](const Range& r) { return byte >= r.first && byte + bytes <= r.last; });
      require(is_inside, "asynchronous copy from outside the operands");
      require(reinterpret_cast<uintptr_t>(global) % bytes == 0, "misaligned asynchronous copy");
    }
    Fiber& fiber = *fibers_[running_];
    fiber.open.push_back({shared, is_valid ? global : nullptr, bytes});
    if (schedule_.copies_land_early) land(fiber.open.back());
  }
  void commit() {
    Fiber& fiber = *fibers_[running_];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
  }
  void wait_groups(size_t pending) {
    Fiber& fiber = *fibers_[running_];
    while (fiber.groups.size() > pending) {
      if (!schedule_.copies_land_early) {
        for (const Copy& copy : fiber.groups.front()) land(copy);
      }
      fiber.groups.pop_front();
    }
  }

 private:
  struct Copy {
    void* shared;
    const void* global;  // null: zeros
    size_t bytes;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    int64_t block_arrivals = 0, warp_arrivals = 0;
    bool is_done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  EmulatedBlock(int threads, size_t shared_bytes, Schedule schedule)
      : num_threads(threads), schedule_(schedule), shared_bytes_(shared_bytes), memory_(shared_bytes + 128, 0xff) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    shared_ = memory_.data() + (128 - address % 128) % 128;
    for (int i = 0; i < threads; ++i) fibers_.push_back(std::make_unique<Fiber>());
    slots_.resize((threads + kWarp - 1) / kWarp);
  }

  static void land(const Copy& copy) {
    if (copy.global != nullptr) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(copy.shared, 0, copy.bytes);
    }
  }

  static void start() {
    EmulatedBlock* self = current();
    Fiber& fiber = *self->fibers_[self->running_];
    self->entry_(self->kernel_);
    fiber.is_done = true;
    swapcontext(&fiber.context, &self->scheduler_);
  }

  void run() {
    EmulatedBlock* outer = current();
    current() = this;
    for (auto& fiber : fibers_) {
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStackBytes;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, &EmulatedBlock::start, 0);
    }
    const int warps = static_cast<int>(slots_.size());
    bool progress = true, all_done = false;
    while (progress && failure_ == nullptr) {
      progress = false;
      all_done = true;
      for (int i = 0; i < warps; ++i) {
        const int warp = schedule_.last_warp_first ? warps - 1 - i : i;
        while (run_warp(warp)) progress = true;  // as far ahead of the others as it can get
      }
      for (auto& fiber : fibers_) all_done = all_done && fiber->is_done;
      if (all_done) break;
    }
    current() = outer;
    if (failure_ != nullptr) throw std::runtime_error(failure_);
    if (!all_done) throw std::runtime_error("deadlock: threads wait at different barriers");
    for (auto& fiber : fibers_) {
      if (!fiber->open.empty()) throw std::runtime_error("asynchronous copies never committed");
      for (auto& group : fiber->groups) {
        if (!group.empty()) throw std::runtime_error("asynchronous copies never waited for");
      }
    }
  }

  bool run_warp(int warp) {
    bool progress = false;
    for (int i = warp * kWarp; i < std::min((warp + 1) * kWarp, num_threads); ++i) {
      Fiber& fiber = *fibers_[i];
      if (fiber.is_done || failure_ != nullptr || !is_ready(i)) continue;
      running_ = i;
      swapcontext(&scheduler_, &fiber.context);
      progress = true;
    }
    return progress;
  }

  struct Barrier {
    int64_t Fiber::* counter = nullptr;
    int64_t arrival = 0;
    int first = 0, last = 0;
  };

  bool is_ready(int i) {
    if (barriers_.empty()) barriers_.resize(fibers_.size());
    const Barrier& b = barriers_[i];
    if (b.counter == nullptr) return true;
    for (int j = b.first; j < b.last; ++j) {
      if (!fibers_[j]->is_done && (*fibers_[j]).*b.counter < b.arrival) return false;
    }
    return true;
  }

  void wait(int64_t arrival, int64_t Fiber::* counter, int first, int last) {
    const int self = running_;
    if (barriers_.empty()) barriers_.resize(fibers_.size());
    barriers_[self] = {counter, arrival, first, last};
    swapcontext(&fibers_[self]->context, &scheduler_);
    barriers_[self] = {};
    running_ = self;
  }

  Schedule schedule_;
  size_t shared_bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* shared_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Barrier> barriers_;
  struct alignas(16) WarpSlots {
    unsigned char sets[2][kWarp * kSlotBytes];
    unsigned char* operator[](int64_t i) { return sets[i]; }
  };
  std::vector<WarpSlots> slots_;
  ucontext_t scheduler_;
  int running_ = 0;
  const char* failure_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* kernel_ = nullptr;
};

inline int thread_index() {
  return EmulatedBlock::current()->thread();
}
inline int64_t block_index() {
  return EmulatedBlock::current()->block;
}
inline int64_t num_grid_blocks() {
  return EmulatedBlock::current()->num_blocks;
}
inline int threads_per_block() {
  return EmulatedBlock::current()->num_threads;
}
inline void sync_block() {
  EmulatedBlock::current()->sync_block();
}
inline unsigned char* shared_memory() {
  return EmulatedBlock::current()->shared();
}
template <int kBytes>
void copy_async(void* shared, const void* global, bool is_valid) {
  EmulatedBlock::current()->copy_async(shared, global, is_valid, kBytes);
}
inline void commit_copies() {
  EmulatedBlock::current()->commit();
}
template <int kPending>
void wait_copies() {
  EmulatedBlock::current()->wait_groups(kPending);
}

// ldmatrix .x4: lanes 8j .. 8j+7 hold the row addresses of matrix j; lane l receives word l % 4 of row l / 4 of each.
inline void load_matrices(uint32_t (&r)[4], const void* shared) {
  EmulatedBlock* block = EmulatedBlock::current();
  block->require_shared(shared, 16);
  const int lane = block->thread() % 32;
  const void* const* addresses = block->exchange(shared);
  for (int j = 0; j < 4; ++j) {
    std::memcpy(&r[j], static_cast<const unsigned char*>(addresses[8 * j + lane / 4]) + 4 * (lane % 4), 4);
  }
}

// cvt.rna.tf32: to 10 bits of mantissa, nearest, ties away from zero.
template <class Element>
void prepare_fragment(uint32_t (&)[4]) {}
template <>
inline void prepare_fragment<float>(uint32_t (&r)[4]) {
  for (uint32_t& bits : r) {
    if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  }
}

// mma m16n8k16 (half) or m16n8k8 (TF32), row.col. With g = lane / 4, t = lane % 4 and words of 4 bytes along k:
// a0 = (g, t), a1 = (g + 8, t), a2 = (g, t + 4), a3 = (g + 8, t + 4); b0 = (t, g), b1 = (t + 4, g);
// d0, d1 = (g, 2t), (g, 2t + 1); d2, d3 the same in row g + 8.
template <class Element>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  EmulatedBlock* block = EmulatedBlock::current();
  const int lane = block->thread() % 32, g = lane / 4, t = lane % 4;
  const Fragments* all = block->exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(Element));
  for (int i = 0; i < 4; ++i) {
    const int high_row = i / 2, column = 2 * t + i % 2;
    float sum = 0.0f;
    for (int word = 0; word < 8; ++word) {
      Element from_a[kPerWord], from_b[kPerWord];
      std::memcpy(from_a, &all[4 * g + word % 4].a[high_row + 2 * (word / 4)], 4);
      std::memcpy(from_b, &all[4 * column + word % 4].b[word / 4], 4);
      for (int e = 0; e < kPerWord; ++e) sum += static_cast<float>(from_a[e]) * static_cast<float>(from_b[e]);
    }
    d[i] += sum;
  }
}

}  // namespace fused_resnet
