// What the CPU's own convolutions are written in: vectors of as many fp32 lanes as an instruction set has, activations
// in fp32 or bf16, and the epilogue act(sum + bias + residual). No torch here.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace fused_resnet {

#define FUSED_RESNET_INLINE inline __attribute__((always_inline))

// From the narrowest to the widest, and what FUSED_RESNET_CPU_ISA calls them.
enum class InstructionSet { kPortable, kAvx2, kAvx512 };
constexpr const char* kInstructionSetNames[] = {"portable", "avx2", "avx512"};

#if defined(__x86_64__)
#define FUSED_RESNET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")))
#define FUSED_RESNET_AVX2 __attribute__((target("avx2,fma")))
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

template <int kLanes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(4 * kLanes)));
  typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
};

// bfloat16 as its bits.
struct BFloat16 {
  uint16_t bits;
};

template <int kLanes>
FUSED_RESNET_INLINE void load(const float* from, typename Lanes<kLanes>::Vector* to) {
  *to = *reinterpret_cast<const typename Lanes<kLanes>::Unaligned*>(from);
}

template <int kLanes>
FUSED_RESNET_INLINE void load(const BFloat16* from, typename Lanes<kLanes>::Vector* to) {
  using L = Lanes<kLanes>;
  const auto narrow = *reinterpret_cast<const typename L::Narrow*>(from);
  *to = reinterpret_cast<typename L::Vector>(__builtin_convertvector(narrow, typename L::Bits) << 16);
}

template <int kLanes>
FUSED_RESNET_INLINE void store(const typename Lanes<kLanes>::Vector& value, float* to) {
  *reinterpret_cast<typename Lanes<kLanes>::Unaligned*>(to) = value;
}

// Nearest, ties to even; NaN by itself, since rounding could carry it to infinity.
template <int kLanes>
FUSED_RESNET_INLINE void store(const typename Lanes<kLanes>::Vector& value, BFloat16* to) {
  using L = Lanes<kLanes>;
  const auto bits = reinterpret_cast<typename L::Bits>(value);
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto quiet = typename L::Bits{} + 0x7fc0;
  *reinterpret_cast<typename L::Narrow*>(to) =
      __builtin_convertvector(value != value ? quiet : rounded, typename L::Narrow);
}

// Lanes from `count` on are zero, and their memory is not touched.
template <int kLanes, class T>
FUSED_RESNET_INLINE void load_some(const T* from, int64_t count, typename Lanes<kLanes>::Vector* to) {
  if (count >= kLanes) return load<kLanes>(from, to);
  T some[kLanes] = {};
  if (count > 0) std::memcpy(some, from, sizeof(T) * count);
  load<kLanes>(some, to);
}

template <int kLanes, class T>
FUSED_RESNET_INLINE void store_some(const typename Lanes<kLanes>::Vector& value, int64_t count, T* to) {
  if (count >= kLanes) return store<kLanes>(value, to);
  T some[kLanes];
  store<kLanes>(value, some);
  std::memcpy(to, some, sizeof(T) * count);
}

enum class Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2 };

template <class T>
struct Epilogue {
  const float* bias;  // one value per output channel, or null
  const T* residual;  // as the output, or null; may be the output
  Activation activation;
};

// Writes act(sum + residual) to out[at], the first `count` lanes; sum has the bias in it. NaN compares false and stays.
template <int kLanes, class T>
FUSED_RESNET_INLINE void finish(const typename Lanes<kLanes>::Vector& sum, const Epilogue<T>& epilogue, int64_t at,
                                int64_t count, T* out) {
  using V = typename Lanes<kLanes>::Vector;
  V value = sum;
  if (epilogue.residual != nullptr) {
    V residual;
    load_some<kLanes>(epilogue.residual + at, count, &residual);
    value += residual;
  }
  if (epilogue.activation != Activation::kNone) value = value < 0.f ? V{} : value;
  if (epilogue.activation == Activation::kRelu6) value = value > 6.f ? V{} + 6.f : value;
  store_some<kLanes>(value, count, out + at);
}

}  // namespace fused_resnet
