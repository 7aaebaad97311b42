// Who has seen what of whom: happens-before, by vector clocks (Lamport 1978, Mattern 1989; PTX ISA 8, causality order).
//
// An agent is a thread of a resident block, a warpgroup in whose name wgmma reads, an mbarrier in whose name
// asynchronous copies write, or a whole grid. Time is the machine's own count of publications, so that times of
// different agents can stand in one clock. Threads that met at a barrier share one clock.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "ptx/values.h"

namespace fused_resnet::ptx {

using Time = u32;
using Agent = u16;
constexpr Agent kNobody = 0xffff;

// Agents are numbered anew when no block is resident (an epoch). Of those of epochs before, what was handed on through
// memory is kept.
using Times = std::vector<Time>;
using Epochs = std::map<u32, std::shared_ptr<const Times>>;

struct Clock {
  Times seen;                           // by agent: everything that it did up to and including this time
  std::shared_ptr<const Epochs> older;  // by epoch; null: nothing
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
  bool has_seen_in(u32 epoch, Agent agent, Time time) const {
    if (clock_.get() == nullptr || clock_->older == nullptr) return false;
    const auto found = clock_->older->find(epoch);
    return found != clock_->older->end() && agent < found->second->size() && (*found->second)[agent] >= time;
  }
  bool is_empty() const { return clock_.get() == nullptr; }
  bool is_same(const View& other) const { return clock_.get() == other.clock_.get(); }

  // What it has seen was of agents of this epoch, which is over.
  void retire(u32 epoch) {
    if (is_empty()) return;
    auto* next = new Clock;
    auto all = clock_->older == nullptr ? std::make_shared<Epochs>() : std::make_shared<Epochs>(*clock_->older);
    (*all)[epoch] = std::make_shared<const Times>(clock_->seen);
    next->older = std::move(all);
    clock_ = ClockPointer(next);
  }

  // This view also has seen what `other` has. Of two clocks of which one covers the other no copy is made.
  void join(const View& other) {
    if (other.clock_.get() == nullptr || is_same(other)) return;
    if (clock_.get() == nullptr) {
      clock_ = other.clock_;
      return;
    }
    if (clock_->older != other.clock_->older) {
      own();
      merge(clock_->seen, other.clock_->seen);
      clock_->older = merged(clock_->older, other.clock_->older);
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
    merge(clock_->seen, more);
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
  static void merge(Times& to, const Times& from) {
    if (to.size() < from.size()) to.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }
  static bool covers(const Epochs& all, const Epochs& some) {
    return std::all_of(some.begin(), some.end(), [&](const auto& one) {
      const auto found = all.find(one.first);
      return found != all.end() && found->second == one.second;
    });
  }
  static std::shared_ptr<const Epochs> merged(const std::shared_ptr<const Epochs>& a,
                                              const std::shared_ptr<const Epochs>& b) {
    if (b == nullptr || (a != nullptr && covers(*a, *b))) return a;
    if (a == nullptr || covers(*b, *a)) return b;
    auto all = std::make_shared<Epochs>(*a);
    for (const auto& [epoch, times] : *b) {
      auto& mine = (*all)[epoch];
      auto both = mine == nullptr ? std::make_shared<Times>() : std::make_shared<Times>(*mine);
      merge(*both, *times);
      mine = std::move(both);
    }
    return all;
  }
  void own() {  // a clock is never changed while it is shared
    if (clock_.get() == nullptr) {
      clock_ = ClockPointer(new Clock);
    } else if (clock_.is_shared()) {
      auto* copy = new Clock;
      copy->seen = clock_->seen;
      copy->older = clock_->older;
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
  void retire(u32 epoch) {
    generic.retire(epoch);
    async.retire(epoch);
    async_global.retire(epoch);
  }
  bool is_same(const Views& other) const {
    return generic.is_same(other.generic) && async.is_same(other.async) && async_global.is_same(other.async_global);
  }
};

}  // namespace fused_resnet::ptx
