// Who has seen what of whom: happens-before, by vector clocks (Lamport 1978, Mattern 1989; PTX ISA 8, causality order).
//
// An agent is a thread of a resident block, or a phase of an mbarrier, in whose name asynchronous copies write. Time is
// the machine's own count of events that publish something, so that times of different agents can stand in one clock.
// Threads that met at a barrier share one clock; each has its own time beside it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "ptx/values.h"

namespace fused_resnet::ptx {

using Time = u32;
using Agent = u16;
constexpr Agent kNobody = 0xffff;

struct Clock {
  std::vector<Time> seen;  // by agent: everything that it did up to and including this time
};

class View {
 public:
  bool has_seen(Agent agent, Time time) const {
    return clock_ != nullptr && agent < clock_->seen.size() && clock_->seen[agent] >= time;
  }
  // This view also has seen what `other` has. Cheap when they are the same clock.
  void join(const View& other) {
    if (other.clock_ == nullptr || other.clock_ == clock_) return;
    if (clock_ == nullptr) {
      clock_ = other.clock_;
      return;
    }
    auto both = std::make_shared<Clock>(*clock_);
    const auto& more = other.clock_->seen;
    if (both->seen.size() < more.size()) both->seen.resize(more.size(), 0);
    for (size_t i = 0; i < more.size(); ++i) both->seen[i] = std::max(both->seen[i], more[i]);
    clock_ = std::move(both);
  }
  // Has also seen all that the agent did up to this time. Takes a copy of the clock if others share it.
  void add(Agent agent, Time time) {
    if (has_seen(agent, time)) return;
    if (clock_ == nullptr) {
      clock_ = std::make_shared<Clock>();
    } else if (clock_.use_count() > 1) {
      clock_ = std::make_shared<Clock>(*clock_);
    }
    auto& seen = clock_->seen;
    if (seen.size() <= agent) seen.resize(agent + 1, 0);
    seen[agent] = time;
  }

 private:
  std::shared_ptr<Clock> clock_;  // never changed while shared
};

// What a thread or an mbarrier hands on: its views through the generic proxy and through the async proxy (PTX ISA 8.6).
struct Views {
  View generic, async;
  void join(const Views& other) {
    generic.join(other.generic);
    async.join(other.async);
  }
};

}  // namespace fused_resnet::ptx
