// The activations, and what the operators call them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fused_resnet {

enum class Activation : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2, kSilu = 3 };
constexpr const char* kActivationNames[] = {"none", "relu", "relu6", "silu"};

// The activation of this name, for kernels that know them up to `last`.
inline Activation parse_activation(const std::string& op, const std::string& name, Activation last) {
  std::string known;
  for (int i = 0; i <= static_cast<int>(last); ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
    known += (i == 0 ? "" : ", ") + std::string(kActivationNames[i]);
  }
  throw std::runtime_error(op + ": unknown activation " + name + "; known ones are " + known);
}

}  // namespace fused_resnet
