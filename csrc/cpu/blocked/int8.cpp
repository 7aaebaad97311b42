#include "cpu/blocked/int8.h"

#include "cpu/blocked/dot.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_resnet {
namespace blocked {
namespace {

// Whether CPUID's leaf 7 has these bits in one of its registers a, b, c, d.
bool has_bits(unsigned subleaf, int which, unsigned bits) {
  unsigned registers[4] = {};
#if defined(__x86_64__)
  __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
#endif
  return (~registers[which] & bits) == 0;
}

}  // namespace

const char* why_no_avx512_vnni() {
  constexpr unsigned kVnni = 1u << 11;
  return has_bits(0, 2, kVnni) ? nullptr : "this CPU has no AVX-512 VNNI";
}

const char* why_no_avx_vnni() {
  constexpr unsigned kVnni = 1u << 4;
  return has_bits(1, 0, kVnni) ? nullptr : "this CPU has no AVX-VNNI";
}

#if defined(__x86_64__)
FUSED_RESNET_AVX512 void run_avx512_vnni(const Convolution& c, const Share& share) {
  run_share<DotKernel<VnniDot<64>, 16, 2, 14, 8, 16>, uint8_t>(c, share);
}

FUSED_RESNET_AVX2 void run_avx_vnni(const Convolution& c, const Share& share) {
  run_share<DotKernel<VnniDot<32>, 8, 1, 6, 16, 32>, uint8_t>(c, share);
}

FUSED_RESNET_AVX2 void run_avx2_int8(const Convolution& c, const Share& share) {
  run_share<DotKernel<MaddDot<32>, 8, 1, 2, 16, 32>, uint8_t>(c, share);
}
#else
// Never run: no CPU has what they need.
void run_avx512_vnni(const Convolution& c, const Share& share) {
  run_int8_anywhere(c, share);
}
void run_avx_vnni(const Convolution& c, const Share& share) {
  run_int8_anywhere(c, share);
}
void run_avx2_int8(const Convolution& c, const Share& share) {
  run_int8_anywhere(c, share);
}
#endif

void run_int8_anywhere(const Convolution& c, const Share& share) {
  run_share<DotKernel<MaddDot<16>, 4, 1, 1, 16, 32>, uint8_t>(c, share);
}

}  // namespace blocked
}  // namespace fused_resnet
