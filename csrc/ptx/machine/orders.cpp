// Order through memory: release and acquire patterns (PTX ISA 8.8, 8.9.2, 8.9.4).
//
// A fence.sc counts as fence.acq_rel; the order of fences among themselves (8.9.3) is not made use of.
#include "ptx/machine/machine.h"

namespace fused_resnet::ptx {
namespace {

bool has_fenced(const Warp& warp, int lane) {
  return !warp.fenced[0][lane].generic.is_empty();
}

}  // namespace

// Shared memory of different clusters lies at the same addresses.
u64 Machine::key_of(const Cluster& cluster, u64 key) {
  const bool is_shared = key >= kSharedWindow && key < kLocalWindow;
  return is_shared ? key - kSharedWindow + kSharedLocation + (u64(cluster.number) << 32) : key;
}

Location* Machine::location(const Cluster& cluster, u64 key) {
  if (locations_.empty()) return nullptr;
  const auto found = locations_.find(key_of(cluster, key));
  if (found == locations_.end()) return nullptr;
  found->second.begin(agents_epoch_);
  return &found->second;
}

void Machine::write_strongly(Warp& of, int lane, u64 key, Scope scope, bool releases, bool has_read) {
  if (options.races == 0) return;
  const Block& block = *of.block;
  Location* to = location(*block.cluster, key);
  if (to == nullptr) {
    if (!releases && !has_fenced(of, lane)) return;
    to = &locations_[key_of(*block.cluster, key)];
    to->begin(agents_epoch_);
  }
  if (!has_read) to->overwrite();
  Views handed[kScopes];
  for (int k = 0; k < kScopes; ++k) handed[k] = of.fenced[k][lane];
  const Agent agent = of.agent(lane);
  if (releases) {
    Views all = of.views[lane];
    all.generic.add(agent, publish(of, lane));
    for (int k = 0; k <= level_of(scope); ++k) to->threads[agent].released[k] = all;
  }
  const auto own = to->threads.find(agent);
  if (own != to->threads.end())
    for (int k = 0; k < kScopes; ++k) handed[k].join(own->second.released[k]);
  to->blocks[block_number(block)].join(handed[level_of(Scope::kCta)]);
  if (scope >= Scope::kCluster) to->clusters[block.cluster->number].join(handed[level_of(Scope::kCluster)]);
  if (scope >= Scope::kGpu) to->everywhere.join(handed[level_of(Scope::kGpu)]);
}

void Machine::read_strongly(Warp& of, int lane, u64 key, Scope scope, bool acquires) {
  if (options.races == 0) return;
  const Block& block = *of.block;
  Location* from = location(*block.cluster, key);
  if (from == nullptr) return;
  Location::Own& own = from->threads[of.agent(lane)];
  const auto find = [&](Scope common, const Views& found) { own.found[level_of(common)].join(found); };
  const auto near = from->blocks.find(block_number(block));
  if (near != from->blocks.end()) find(Scope::kCta, near->second);
  const auto around = from->clusters.find(block.cluster->number);
  if (scope >= Scope::kCluster && around != from->clusters.end()) find(Scope::kCluster, around->second);
  if (scope >= Scope::kGpu) find(Scope::kGpu, from->everywhere);
  for (int k = 0; k < kScopes; ++k) {
    if (!acquires)
      of.observed[k][lane].join(own.found[k]);
    else if (k <= level_of(scope))
      of.views[lane].join(own.found[k]);
  }
}

void Machine::write_weakly(const Cluster& cluster, u64 key) {
  Location* at = location(cluster, key);
  if (at != nullptr) at->overwrite();
}

void Machine::fence(Warp& of, int lane, Scope scope, bool acquires, bool releases) {
  if (acquires)
    for (int k = 0; k <= level_of(scope); ++k) of.views[lane].join(of.observed[k][lane]);
  if (!releases) return;
  Views all = of.views[lane];
  all.generic.add(of.agent(lane), publish(of, lane));
  for (int k = 0; k <= level_of(scope); ++k) of.fenced[k][lane] = all;
}

}  // namespace fused_resnet::ptx
