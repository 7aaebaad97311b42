// The micro-kernels of blocked convolutions, one row each, from which the choice, the tests and the measurements come.
#pragma once

#include <string>
#include <vector>

#include "common/dtype.h"
#include "cpu/blocked/convolution.h"
#include "cpu/dispatch.h"

namespace fused_resnet {
namespace blocked {

struct MicroKernel {
  const char* name;
  InstructionSet set;
  Dtype dtype;
  int max_rows, tiles;  // pixels of a tile, tiles at a time; always with 32 outputs
  bool is_chosen;       // else it runs only where it is named
  const char* registers;
  const char* reason;
  const char* (*why_not)();  // what this process lacks beyond the set, or null
  void (*run)(const Convolution&, const Share&);
};

// As torch calls it.
const char* name_of(Dtype dtype);

// The fastest first.
const std::vector<MicroKernel>& micro_kernels();

// Why this process cannot run it, empty where it can.
std::string why_not(const MicroKernel& kernel);

// The one of this name; without a name, the first that runs here. Throws with the reasons.
const MicroKernel& choose_kernel(const std::string& op, const std::string& name, Dtype dtype);

}  // namespace blocked
}  // namespace fused_resnet
