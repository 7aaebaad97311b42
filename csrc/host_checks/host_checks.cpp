// fused_resnet._host_checks: the kernels' index maths, and which tiles they choose, for tests on the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/configs.h"
#include "cuda/sm80/tile_layout.h"
#include "host_checks/bindings.h"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

// x (N, H, W, C) and weight (K, R, S, C/groups), as they lie in memory.
ConvShape make_shape(std::vector<int64_t> x, std::vector<int64_t> weight, std::pair<int, int> stride,
                     std::pair<int, int> padding, std::pair<int, int> dilation, int groups) {
  ConvShape s{};
  const std::string reason =
      derive({x.at(0), x.at(3), x.at(1), x.at(2), weight.at(0), weight.at(1), weight.at(2), stride.first, stride.second,
              padding.first, padding.second, dilation.first, dilation.second, groups},
             &s);
  if (!reason.empty()) throw py::value_error(reason);
  return s;
}

// The operator cuda_conv_why_not, for sizes that fit each other: x (N, C, H, W), weight (K, C/groups, R, S).
std::string cuda_conv_why_not(std::vector<int64_t> x, std::vector<int64_t> weight, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                              int element_bytes) {
  return conv_why_not({x.at(0), x.at(1), x.at(2), x.at(3), weight.at(0), weight.at(2), weight.at(3), stride.at(0),
                       stride.at(1), padding.at(0), padding.at(1), dilation.at(0), dilation.at(1), groups},
                      element_bytes);
}

// The element of x that row m of a tile starting at `origin` meets at reduction index k, or -1 for a padding zero.
int64_t input_offset(const ConvShape& s, int64_t origin, int row, int k, int group) {
  const InputRow window = input_row(s, row_origin(s, origin), row, group);
  const Tap tap = filter_tap(s, k);
  return is_inside(s, window, tap) ? window.offset + tap.offset : -1;
}

// Which of sm90's tiles there are, what is legal of both tables, and how tiles are handed out.
void bind_sm90(py::module_& m) {
  py::list tiles;
  for (int i = 0; i < sm90::kNumTiles; ++i) tiles.append(sm90::kFirstTile + i);
  m.attr("SM90_TILES") = tiles;
  m.def("sm90_tile", [](int index) {
    if (!sm90::is_tile(index)) throw py::index_error("there is no tile " + std::to_string(index));
    const sm90::Tile& t = sm90::kTiles[index - sm90::kFirstTile];
    py::dict d;
    d["block_m"] = t.block_m, d["block_n"] = t.block_n, d["stages"] = t.stages;
    d["resident_blocks"] = t.resident_blocks, d["cluster"] = t.cluster, d["threads"] = sm90::num_threads(t);
    d["smem_bytes"] = sm90::smem_bytes(t, 2), d["registers"] = sm90::launch_registers(t);
    d["producer_registers"] = sm90::producer_registers(t), d["consumer_registers"] = sm90::consumer_registers(t);
    return d;
  });
  m.def("sm90_why_not", &sm90::why_not, py::arg("shape"), py::arg("element_bytes"), py::arg("is_aligned"));
  m.def("sm90_tile_place", [](int rows, int columns, int index) {
    const sm90::TilePlace place = sm90::tile_place({rows, columns}, index);
    return std::make_pair(place.row, place.column);
  });
  m.def(
      "all_configs",
      [](const ConvShape& s, int element_bytes, const DeviceLimits& device, bool is_aligned) {
        std::vector<std::pair<int, int>> pairs;
        for (const auto& [tile, splits] : legal_configs(s, element_bytes, device, is_aligned, true)) {
          pairs.emplace_back(tile, splits);
        }
        return pairs;
      },
      py::arg("shape"), py::arg("element_bytes"), py::arg("device"), py::arg("is_aligned"));
}

// The grouped convolution's tiles, and what it declines.
void bind_grouped(py::module_& m) {
  py::list tiles;
  for (int i = 0; i < grouped::kNumTiles; ++i) tiles.append(grouped::kFirstTile + i);
  m.attr("GROUPED_TILES") = tiles;
  m.def("grouped_why_not", &grouped::why_not, py::arg("shape"), py::arg("element_bytes"), py::arg("is_aligned"));
  m.def("grouped_blocks", [](int tile, const ConvShape& s, int element_bytes, const DeviceLimits& device) {
    if (!grouped::is_tile(tile)) throw py::index_error("there is no tile " + std::to_string(tile));
    const grouped::Tile& t = grouped::kTiles[tile - grouped::kFirstTile];
    return std::make_tuple(grouped::num_blocks(t, s, element_bytes, device), grouped::num_slabs(s, element_bytes),
                           grouped::num_tiles(t, s), grouped::blocks_per_sm(t, s, element_bytes, device));
  });
}

const Tile& tile_at(int index) {
  if (index < 0 || index >= kNumTiles)
    throw py::index_error("there is no tile " + std::to_string(index) + " among " + std::to_string(kNumTiles));
  return kTiles[index];
}

}  // namespace

PYBIND11_MODULE(_host_checks, m) {
  bind_tiles(m);
  bind_sm90(m);
  bind_grouped(m);
  m.def("fast_divide", [](uint32_t n, uint32_t d) { return FastDivisor(d).divide(n); });

  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init(&make_shape), py::arg("x"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"))
      .def_readonly("P", &ConvShape::P)
      .def_readonly("Q", &ConvShape::Q)
      .def_readonly("reduction", &ConvShape::reduction)
      .def_property_readonly("num_rows", &num_rows)
      .def(
          "spans_fit", [](const ConvShape& s, int unit) { return why_span_too_long(s, unit).empty(); }, py::arg("unit"))
      .def("input_offset", &input_offset, py::arg("origin"), py::arg("row"), py::arg("k"), py::arg("group"));

  m.def("cuda_conv_why_not", &cuda_conv_why_not);

  m.attr("NUM_TILES") = kNumTiles;
  m.attr("STAGE_ROW_BYTES") = kStageRowBytes;
  m.def("tile", [](int index) {
    const Tile& t = tile_at(index);
    py::dict d;
    d["block_m"] = t.block_m, d["block_n"] = t.block_n, d["warps_m"] = t.warps_m, d["warps_n"] = t.warps_n;
    d["stages"] = t.stages, d["any_alignment"] = t.any_alignment, d["resident_blocks"] = t.resident_blocks;
    d["threads"] = num_threads(t), d["smem_bytes"] = smem_bytes(t), d["live_registers"] = live_registers(t);
    d["registers"] = registers_per_thread(t), d["staging_pitch"] = staging_pitch(t);
    return d;
  });
  py::class_<DeviceLimits>(m, "DeviceLimits")
      .def(py::init<int, int, int, int>(), py::arg("num_sms"), py::arg("smem_per_block"), py::arg("smem_per_sm"),
           py::arg("capability"));
  m.def("why_illegal", [](int tile, const DeviceLimits& device, bool is_aligned) -> std::optional<std::string> {
    const char* reason = why_illegal(tile_at(tile), device, is_aligned);
    return reason ? std::optional<std::string>(reason) : std::nullopt;
  });
  m.def(
      "legal_configs",
      [](int64_t rows, int64_t columns, int64_t reduction_bytes, int64_t groups, const DeviceLimits& device,
         bool is_aligned) {
        std::vector<std::pair<int, int>> pairs;  // tile, splits
        for (const auto& [tile, splits] : legal_configs({rows, columns, reduction_bytes, groups}, device, is_aligned)) {
          pairs.emplace_back(tile, splits);
        }
        return pairs;
      },
      py::arg("rows"), py::arg("columns"), py::arg("reduction_bytes"), py::arg("groups"), py::arg("device"),
      py::arg("is_aligned"));
  m.def("blocks_per_sm", [](int tile, const DeviceLimits& device) { return blocks_per_sm(tile_at(tile), device); });
  m.attr("MOST_SPLITS") = kMostSplits;
  m.attr("MOST_PARTIAL_BYTES") = kMostPartialBytes;
  m.def("stage_range", [](int num_stages, int splits, int split) {
    const StageRange range = stage_range(num_stages, splits, split);
    return std::make_pair(range.first, range.last);
  });

  m.def("chunk_position", &chunk_position);
  using Pair = std::pair<int, int>;  // row, chunk or row, column
  m.def("copy_source", [](int thread) { return Pair(copy_row(thread), copy_chunk(thread)); });
  m.def("ldmatrix_a", [](int lane, int step) {
    const ChunkSource source = ldmatrix_a(lane, step);
    return Pair(source.row, source.chunk);
  });
  m.def("ldmatrix_b", [](int lane, int step) {
    const ChunkSource source = ldmatrix_b(lane, step);
    return Pair(source.row, source.chunk);
  });
  m.def("accumulator_position",
        [](int lane, int i) { return Pair(accumulator_row(lane, i), accumulator_column(lane, i)); });
  m.def("staging_position", &staging_position);
  m.def("block_origin", [](const ConvShape& s, int64_t block, int block_m, int block_n) {
    const BlockOrigin o = block_origin(s, block, block_m, block_n);
    return std::make_tuple(o.m, o.k, o.group);
  });
}
