// What the requests of a warp cost: sectors of global memory, wavefronts of shared memory.
#include <algorithm>

#include "ptx/machine/operands.h"

namespace fused_resnet::ptx {
namespace {

constexpr u32 kSector = 32, kBanks = 32, kBank = 4;

}  // namespace

void Machine::count_global(const u64* addresses, Lanes mask, u32 bytes, bool is_write) {
  static thread_local std::vector<u64> sectors;
  sectors.clear();
  FOR_ACTIVE(mask)
  for (u64 sector = addresses[l] / kSector; sector <= (addresses[l] + bytes - 1) / kSector; ++sector)
    if (sectors.empty() || sectors.back() != sector) sectors.push_back(sector);
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  (is_write ? counts.global_store_sectors : counts.global_load_sectors) += sectors.size();
  for (const u64 sector : sectors) {
    Region* region = region_of(sector * kSector, 1);
    if (region == nullptr) region = region_of(sector * kSector + kSector - 1, 1);
    if (region == nullptr) continue;
    auto& touched = is_write ? region->sectors_written : region->sectors_read;
    touched[sector - region->base / kSector] = true;
  }
}

// A request of more than 4 bytes a lane is served in parts of 128 bytes: half warps of 8 bytes, quarters of 16. A part
// takes as many wavefronts as the fullest bank has different words.
void Machine::count_shared(const u32* addresses, Lanes mask, u32 bytes, bool is_write) {
  const int lanes = bytes <= 4 ? kLanes : bytes <= 8 ? kLanes / 2 : kLanes / 4;
  u64 wavefronts = 0, ideal = 0;
  for (int first = 0; first < kLanes; first += lanes) {
    u32 words[kBanks][kLanes], filled[kBanks] = {}, most = 0;
    for (int l = first; l < first + lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      for (u32 word = addresses[l] / kBank; word <= (addresses[l] + std::min(bytes, 16u) - 1) / kBank; ++word) {
        const u32 bank = word % kBanks;
        u32* end = words[bank] + filled[bank];
        if (std::find(words[bank], end, word) != end) continue;
        *end = word;
        most = std::max(most, ++filled[bank]);
      }
    }
    wavefronts += most;
    ideal += most > 0;
  }
  (is_write ? counts.shared_store_wavefronts : counts.shared_load_wavefronts) += wavefronts;
  (is_write ? counts.shared_store_ideal : counts.shared_load_ideal) += ideal;
}

}  // namespace fused_resnet::ptx
