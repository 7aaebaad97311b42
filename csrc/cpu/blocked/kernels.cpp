#include "cpu/blocked/kernels.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu/blocked/amx.h"
#include "cpu/blocked/fma.h"
#include "cpu/blocked/int8.h"
#include "cpu/blocked/pair_products.h"

namespace fused_resnet {
namespace blocked {
namespace {

#if FUSED_RESNET_HAS_TILES
template <bool kSilu>
FUSED_RESNET_AVX512 void run_amx_bf16_with(const Convolution& c, const Share& share) {
  run_tiles<AmxTiles, Avx512Rows<kSilu>>(c, share);
}

void run_amx_bf16(const Convolution& c, const Share& share) {
  c.activation == Activation::kSilu ? run_amx_bf16_with<true>(c, share) : run_amx_bf16_with<false>(c, share);
}
#else
constexpr void (*run_amx_bf16)(const Convolution&, const Share&) = nullptr;
#endif

void run_emulated_amx_bf16(const Convolution& c, const Share& share) {
  c.activation == Activation::kSilu ? run_tiles<EmulatedTiles, PlainRows<true>>(c, share)
                                    : run_tiles<EmulatedTiles, PlainRows<false>>(c, share);
}

#if defined(__x86_64__)
FUSED_RESNET_AVX512 void run_avx512_bf16(const Convolution& c, const Share& share) {
  run_share<FmaKernel<Bf16Products, 16, 2, 14, 8, 16>, BFloat16>(c, share);
}
#else
constexpr void (*run_avx512_bf16)(const Convolution&, const Share&) = nullptr;
#endif

void run_bf16_anywhere(const Convolution& c, const Share& share) {
  run_share<FmaKernel<WidenedBf16Products, 4, 1, 4, 16, 32>, BFloat16>(c, share);
}

FUSED_RESNET_AVX512 void run_avx512_fp32(const Convolution& c, const Share& share) {
  run_share<FmaKernel<Fp32Products, 16, 2, 14, 8, 16>, float>(c, share);
}

FUSED_RESNET_AVX2 void run_avx2_fp32(const Convolution& c, const Share& share) {
  run_share<FmaKernel<Fp32Products, 8, 1, 6, 16, 32>, float>(c, share);
}

void run_fp32_anywhere(const Convolution& c, const Share& share) {
  run_share<FmaKernel<Fp32Products, 4, 1, 4, 16, 32>, float>(c, share);
}

// FUSED_RESNET_CPU_ISA=avx512 means AVX-512 and no more; narrower limits end it through the set. Asked once.
bool is_without_amx() {
  static const bool is_without = [] {
    const char* limit = std::getenv("FUSED_RESNET_CPU_ISA");
    return limit != nullptr && std::string(limit) == "avx512";
  }();
  return is_without;
}

const char* why_no_amx_here() {
  return is_without_amx() ? "FUSED_RESNET_CPU_ISA=avx512" : why_no_amx();
}

const char* why_no_amx_int8_here() {
  return is_without_amx() ? "FUSED_RESNET_CPU_ISA=avx512" : why_no_amx_int8();
}

const char* nothing() {
  return nullptr;
}

}  // namespace

const char* name_of(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? "bfloat16" : dtype == kInt8 ? "int8" : "float32";
}

const std::vector<MicroKernel>& micro_kernels() {
  using Set = InstructionSet;
  static const std::vector<MicroKernel> kernels = {
      {"amx_bf16", Set::kAvx512, Dtype::kBFloat16, 16, 2, true, "4 tiles of sums, 2 of pixels, 2 of weights",
       "each load serves two products, and no other shape of 8 tiles has so few loads", why_no_amx_here, run_amx_bf16},
      {"avx512_bf16", Set::kAvx512, Dtype::kBFloat16, 14, 1, true, "28 zmm of sums, 2 of weights, 1 pixel",
       "as avx512_fp32, with two channels to a lane; by itself only where that is faster", why_no_avx512_bf16,
       run_avx512_bf16, pair_products_pay},
      {"amx_bf16_emulated", Set::kPortable, Dtype::kBFloat16, 16, 2, false, "as amx_bf16, in memory",
       "the same source without the instructions: for tests", nothing, run_emulated_amx_bf16},
      {"portable_bf16", Set::kPortable, Dtype::kBFloat16, 4, 1, false, "as portable_fp32",
       "avx512_bf16 without the instruction: for tests", nothing, run_bf16_anywhere},
      {"avx512_fp32", Set::kAvx512, Dtype::kFloat32, 14, 1, true, "28 zmm of sums, 2 of weights, 1 pixel",
       "14 divides the widths of ResNet's maps, and 28 sums hide a multiply-add's latency", nothing, run_avx512_fp32},
      {"avx2_fp32", Set::kAvx2, Dtype::kFloat32, 6, 1, true, "12 ymm of sums, 2 of weights, 1 pixel",
       "the most sums that 16 registers leave, with two vectors for each pixel that is read", nothing, run_avx2_fp32},
      {"portable_fp32", Set::kPortable, Dtype::kFloat32, 4, 1, true, "16 vectors of sums, 4 of weights, 1 pixel",
       "fits the 32 registers of 64-bit Arm", nothing, run_fp32_anywhere},
      {"amx_int8", Set::kAvx512, kInt8, 16, 2, true, "4 tiles of sums, 2 of pixels, 2 of weights",
       "as amx_bf16, with four products to a sum", why_no_amx_int8_here, run_amx_int8},
      {"amx_int8_emulated", Set::kPortable, kInt8, 16, 2, false, "as amx_int8, in memory",
       "the same source without the instructions: for tests", nothing, run_emulated_amx_int8},
      {"avx512_vnni", Set::kAvx512, kInt8, 14, 1, true, "28 zmm of sums, 2 of weights, 1 pixel",
       "as avx512_fp32, with four products to a lane", why_no_avx512_vnni, run_avx512_vnni},
      {"avx_vnni", Set::kAvx2, kInt8, 6, 1, true, "12 ymm of sums, 2 of weights, 1 pixel",
       "as avx2_fp32, with four products to a lane", why_no_avx_vnni, run_avx_vnni},
      {"avx2_int8", Set::kAvx2, kInt8, 2, 1, true, "8 ymm of halves of sums, 4 of weights, 1 pixel",
       "VPMADDWD is exact, and VPMADDUBSW saturates", nothing, run_avx2_int8},
      {"portable_int8", Set::kPortable, kInt8, 1, 1, true, "8 vectors of halves of sums", "any vectors of 16 bytes",
       nothing, run_int8_anywhere},
  };
  return kernels;
}

std::string why_not(const MicroKernel& kernel) {
  if (kernel.set > best_instruction_set()) {
    return std::string("it needs ") + kInstructionSetNames[static_cast<int>(kernel.set)] + ", this process uses " +
           kInstructionSetNames[static_cast<int>(best_instruction_set())] + ": " + chosen_instructions().why;
  }
  const char* why = kernel.why_not();
  return why == nullptr ? "" : why;
}

bool is_chosen(const MicroKernel& kernel) {
  return kernel.is_chosen && (kernel.pays == nullptr || !why_not(kernel).empty() || kernel.pays());
}

const MicroKernel& choose_kernel(const std::string& op, const std::string& name, Dtype dtype) {
  std::string reasons;
  for (const MicroKernel& kernel : micro_kernels()) {
    if (kernel.dtype != dtype || (name.empty() ? !kernel.is_chosen : name != kernel.name)) continue;
    std::string why = why_not(kernel);
    if (why.empty() && name.empty() && !is_chosen(kernel)) why = "it is not faster than fp32 here";
    if (why.empty()) return kernel;
    reasons += std::string(reasons.empty() ? "" : "; ") + kernel.name + ": " + why;
  }
  if (reasons.empty()) reasons = "there is no kernel " + name;
  throw std::runtime_error(op + ": no kernel for " + name_of(dtype) + " runs here: " + reasons);
}

}  // namespace blocked
}  // namespace fused_resnet
