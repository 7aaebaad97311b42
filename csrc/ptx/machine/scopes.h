// Whom a strong operation may meet, and what strong writes leave at an address (PTX ISA 8.4 to 8.9).
#pragma once

#include <map>

#include "ptx/machine/clocks.h"

namespace fused_resnet::ptx {

// .sys is .gpu here: there is one device. kWeak: no strong operation.
enum class Scope : u8 { kWeak, kCta, kCluster, kGpu };
constexpr int kScopes = 3;
inline int level_of(Scope scope) {
  return static_cast<int>(scope) - 1;
}

// Of an access: its scope, and the bytes of its elements.
class Strength {
 public:
  Strength() = default;
  Strength(Scope scope, int bytes)
      : code_(scope == Scope::kWeak ? 0 : static_cast<u8>(static_cast<int>(scope) | bytes << 2)) {}
  Strength(bool is_strong)  // of bulk reductions, which are .relaxed.gpu element by element (PTX ISA 9.7.9.25.4.2)
      : Strength(is_strong ? Scope::kGpu : Scope::kWeak, 0) {}
  Scope scope() const { return static_cast<Scope>(code_ & 3); }
  int bytes() const { return code_ >> 2; }
  bool is_weak() const { return code_ == 0; }
  bool operator==(Strength other) const { return code_ == other.code_; }
  bool operator!=(Strength other) const { return code_ != other.code_; }

 private:
  u8 code_ = 0;
};

// Whether accesses of two threads are morally strong, where `common` is the least scope that has both threads in it.
// Accesses of different sizes never are: they overlap in part (PTX ISA 8.7).
inline bool are_morally_strong(Strength a, Strength b, Scope common) {
  return a.scope() >= common && b.scope() >= common && a.bytes() == b.bytes();
}

// What the strong writes that a read may find at an address hand on. Each scope is apart: whoever acquires must be in
// the scope of whoever has released, and the other way round (8.9.4).
struct Location {
  u32 epoch = 0;
  Views everywhere;               // released at .gpu or .sys
  std::map<u32, Views> clusters;  // at .cluster or wider, by the cluster's number
  std::map<u32, Views> blocks;    // at any scope, by the block's
  struct Own {
    Views released[kScopes], found[kScopes];
  };
  std::map<Agent, Own>
      threads;  // its later strong writes here hand on what it released; its acquires take what it found

  void begin(u32 new_epoch) {
    if (epoch == new_epoch) return;
    everywhere.retire(epoch);
    clusters.clear();
    blocks.clear();
    threads.clear();
    epoch = new_epoch;
  }
  void overwrite() {  // by a write that has read nothing: no read finds those before it
    everywhere = Views();
    clusters.clear();
    blocks.clear();
  }
};

}  // namespace fused_resnet::ptx
