// AMX's tiles for the tests: one product by the emulation, and by the instructions where there are some.
#include "cpu/blocked/tiles.h"

#include <pybind11/numpy.h>

#include <stdexcept>

#include "host_checks/bindings.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

using namespace blocked;
using Bits = py::array_t<uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

// Rows of a and of the sums beyond `rows` keep what the caller gave: neither is read or written.
template <class Tiles>
void multiply(const Bits& a, const Bits& b, int rows, int64_t stride, float* sums) {
  const auto count = static_cast<uint8_t>(rows);
  Tiles tiles(TileRows{count, 0, 0, 0, count, 0, kMaxTileRows, 0});
  tiles.template load<0>(sums, kRowBytes);
  tiles.template load<4>(a.data(), stride);
  tiles.template load<6>(b.data(), kRowBytes);
  tiles.template dot_bf16<0, 4, 6>();
  tiles.template store<0>(sums, kRowBytes);
}

// a: rows of 32 bf16, `stride` bytes apart; b: 16 rows of 16 pairs; sums: 16 x 16. Returns the new sums.
Floats tile_product(const Bits& a, const Bits& b, const Floats& sums, int rows, int64_t stride, bool is_emulated) {
  Floats result(sums.request());
  if (is_emulated) {
    multiply<EmulatedTiles>(a, b, rows, stride, result.mutable_data());
    return result;
  }
#if FUSED_RESNET_HAS_TILES
  if (why_no_amx() == nullptr) {
    multiply<AmxTiles>(a, b, rows, stride, result.mutable_data());
    return result;
  }
#endif
  throw std::runtime_error(why_no_amx());
}

}  // namespace

void bind_tiles(py::module_& m) {
  m.def("tile_product", &tile_product);
  m.def("why_no_amx", [] { return why_no_amx(); });
}

}  // namespace fused_resnet
