// Who has seen what of whom: happens-before, by vector clocks (Lamport 1978, Mattern 1989; PTX ISA 8, causality order).
//
// An agent is a thread of a resident block, a warpgroup in whose name wgmma reads, an mbarrier in whose name
// asynchronous copies write, or a whole grid. Time is the machine's own count of publications, so that times of
// different agents can stand in one clock. Threads that met at a barrier share one clock.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "ptx/values.h"

namespace fused_resnet::ptx {

using Time = u32;
using Agent = u16;
constexpr Agent kNobody = 0xffff;

struct Clock {
  std::vector<Time> seen;  // by agent: everything that it did up to and including this time
  int owners = 0;
};

// Counted without atomics: a machine and all its clocks belong to one thread of the host.
class ClockPointer {
 public:
  ClockPointer() = default;
  explicit ClockPointer(Clock* clock) : clock_(clock) { keep(); }
  ClockPointer(const ClockPointer& other) : clock_(other.clock_) { keep(); }
  ClockPointer(ClockPointer&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ~ClockPointer() { drop(); }
  ClockPointer& operator=(const ClockPointer& other) {
    if (clock_ == other.clock_) return *this;
    drop();
    clock_ = other.clock_;
    keep();
    return *this;
  }
  ClockPointer& operator=(ClockPointer&& other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  Clock* get() const { return clock_; }
  Clock* operator->() const { return clock_; }
  Clock& operator*() const { return *clock_; }
  bool is_shared() const { return clock_->owners > 1; }

 private:
  void keep() {
    if (clock_ != nullptr) ++clock_->owners;
  }
  void drop() {
    if (clock_ != nullptr && --clock_->owners == 0) delete clock_;
  }
  Clock* clock_ = nullptr;
};

class View {
 public:
  bool has_seen(Agent agent, Time time) const {
    const Clock* clock = clock_.get();
    return clock != nullptr && agent < clock->seen.size() && clock->seen[agent] >= time;
  }
  bool is_same(const View& other) const { return clock_.get() == other.clock_.get(); }

  // This view also has seen what `other` has. Of two clocks of which one covers the other no copy is made.
  void join(const View& other) {
    if (other.clock_.get() == nullptr || is_same(other)) return;
    if (clock_.get() == nullptr) {
      clock_ = other.clock_;
      return;
    }
    const auto& mine = clock_->seen;
    const auto& more = other.clock_->seen;
    const size_t both = std::min(mine.size(), more.size());
    bool gains = more.size() > mine.size(), keeps = mine.size() > more.size();
    for (size_t i = 0; i < both; ++i) {
      gains |= more[i] > mine[i];
      keeps |= mine[i] > more[i];
    }
    if (!gains) return;
    if (!keeps) {
      clock_ = other.clock_;
      return;
    }
    own();
    auto& seen = clock_->seen;
    if (seen.size() < more.size()) seen.resize(more.size(), 0);
    for (size_t i = 0; i < more.size(); ++i) seen[i] = std::max(seen[i], more[i]);
  }

  // Has also seen all that the agent did up to this time.
  void add(Agent agent, Time time) {
    if (has_seen(agent, time)) return;
    own();
    auto& seen = clock_->seen;
    if (seen.size() <= agent) seen.resize(agent + 1, 0);
    seen[agent] = time;
  }

 private:
  void own() {  // a clock is never changed while it is shared
    if (clock_.get() == nullptr) {
      clock_ = ClockPointer(new Clock);
    } else if (clock_.is_shared()) {
      auto* copy = new Clock;
      copy->seen = clock_->seen;
      clock_ = ClockPointer(copy);
    }
  }
  ClockPointer clock_;
};

// What a thread or an mbarrier hands on: what it has seen through the generic proxy, and which of that the async proxy
// sees as well, in shared and in global memory (PTX ISA 8.6).
struct Views {
  View generic, async, async_global;
  void join(const Views& other) {
    generic.join(other.generic);
    async.join(other.async);
    async_global.join(other.async_global);
  }
  bool is_same(const Views& other) const {
    return generic.is_same(other.generic) && async.is_same(other.async) && async_global.is_same(other.async_global);
  }
};

}  // namespace fused_resnet::ptx
