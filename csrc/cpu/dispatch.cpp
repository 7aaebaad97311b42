// What is asked of _C_cpu.so as a whole: which schemas it was compiled for, and which instructions its kernels use.
#include "cpu/dispatch.h"

#include <string>
#include <tuple>

#include "common/checks.h"

FUSED_RESNET_EMBED_DIGEST("cpu")

namespace fused_resnet {
namespace {

// cpu_instruction_set: the name, why that one, and what to warn of, if anything.
std::tuple<std::string, std::string, std::string> instruction_set() {
  const ChosenInstructions& chosen = chosen_instructions();
  return {kInstructionSetNames[static_cast<int>(chosen.set)], chosen.why, chosen.warning};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fused_resnet::instruction_set));
}
