// Which instruction set the CPU's kernels use, and the one place that chooses among a kernel's versions. No torch here.
#pragma once

#include <cstdlib>
#include <string>

namespace fused_resnet {

// From the narrowest to the widest, and what FUSED_RESNET_CPU_ISA calls them.
enum class InstructionSet { kPortable, kAvx2, kAvx512 };
constexpr const char* kInstructionSetNames[] = {"portable", "avx2", "avx512"};

// A function compiled for an instruction set. Elsewhere than on x86-64 it is compiled as it is, and never chosen.
#if defined(__x86_64__)
#define FUSED_RESNET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")))
#define FUSED_RESNET_AVX2 __attribute__((target("avx2,fma")))
#else
#define FUSED_RESNET_AVX512
#define FUSED_RESNET_AVX2
#endif

inline InstructionSet widest_of_this_cpu() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

struct ChosenInstructions {
  InstructionSet set;
  std::string why, warning;  // for people; warning is empty where there is none
};

// The widest that the processor has and a variable allows: FUSED_RESNET_CPU_ISA where it names a set, else, as for
// torch's own kernels, ATEN_CPU_CAPABILITY (default, avx2). Any other value of either limits nothing.
inline ChosenInstructions choose_instructions() {
  ChosenInstructions chosen{widest_of_this_cpu(), "this processor and the kernels have no wider ones", ""};
  const auto limit_to = [&](InstructionSet limit, const char* variable, const std::string& value) {
    if (limit >= chosen.set) return;
    chosen.set = limit;
    chosen.why = std::string(variable) + "=" + value;
  };
  const char* own = std::getenv("FUSED_RESNET_CPU_ISA");
  const std::string wanted = own == nullptr ? "" : own;
  std::string known;
  for (const InstructionSet set : {InstructionSet::kPortable, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    const char* name = kInstructionSetNames[static_cast<int>(set)];
    if (wanted == name) {
      limit_to(set, "FUSED_RESNET_CPU_ISA", wanted);
      return chosen;
    }
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  if (!wanted.empty()) chosen.warning = "FUSED_RESNET_CPU_ISA=" + wanted + " is ignored: it may be one of " + known;
  const char* aten = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = aten == nullptr ? "" : aten;
  if (capability == "default") limit_to(InstructionSet::kPortable, "ATEN_CPU_CAPABILITY", capability);
  if (capability == "avx2") limit_to(InstructionSet::kAvx2, "ATEN_CPU_CAPABILITY", capability);
  return chosen;
}

// Chosen once in a process.
inline const ChosenInstructions& chosen_instructions() {
  static const ChosenInstructions chosen = choose_instructions();
  return chosen;
}

inline InstructionSet best_instruction_set() {
  return chosen_instructions().set;
}

// A kernel's version for the widest set that this process uses. Null where a wider set brings nothing: the next
// narrower one is taken. A further set is a further parameter.
template <class Function>
Function best_of(Function portable, Function avx2, Function avx512) {
  const InstructionSet set = best_instruction_set();
  if (set >= InstructionSet::kAvx512 && avx512 != nullptr) return avx512;
  if (set >= InstructionSet::kAvx2 && avx2 != nullptr) return avx2;
  return portable;
}

}  // namespace fused_resnet
