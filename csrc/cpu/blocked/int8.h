// The micro-kernels of int8, which kernels.cpp lists, and what a CPU must have for them. No torch here.
#pragma once

#include "cpu/blocked/convolution.h"

namespace fused_resnet {
namespace blocked {

void run_amx_int8(const Convolution& c, const Share& share);
void run_emulated_amx_int8(const Convolution& c, const Share& share);
void run_avx512_vnni(const Convolution& c, const Share& share);
void run_avx_vnni(const Convolution& c, const Share& share);
void run_avx2_int8(const Convolution& c, const Share& share);
void run_int8_anywhere(const Convolution& c, const Share& share);

// What this CPU lacks, or null.
const char* why_no_avx512_vnni();
const char* why_no_avx_vnni();

}  // namespace blocked
}  // namespace fused_resnet
