#include "cpu/blocked/amx.h"
#include "cpu/blocked/int8.h"

namespace fused_resnet {
namespace blocked {

#if FUSED_RESNET_HAS_TILES
FUSED_RESNET_AVX512 void run_amx_int8(const Convolution& c, const Share& share) {
  run_byte_tiles<AmxTiles, Avx512ByteRows>(c, share);
}
#else
void run_amx_int8(const Convolution& c, const Share& share) {
  run_int8_anywhere(c, share);  // never: no CPU has what it needs
}
#endif

void run_emulated_amx_int8(const Convolution& c, const Share& share) {
  run_byte_tiles<EmulatedTiles, PlainByteRows>(c, share);
}

}  // namespace blocked
}  // namespace fused_resnet
