// fused_resnet._host_checks: the index maths, the tile choice and the kernels' own source, run on the host for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cuda/add_relu.cuh"
#include "cuda/sm80/conv_bn_act.cuh"
#include "host_checks/bindings.h"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using OptionalArray = std::optional<FloatArray>;

// Elements between NaN: reading past an end spoils the result, writing past it is found.
template <class Element>
class GuardedBuffer {
 public:
  GuardedBuffer(int64_t size, int misalignment)
      : size_(size), bytes_((size + 2 * kGuard + misalignment) * sizeof(Element) + 16, 0xff) {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    data_ = reinterpret_cast<Element*>(bytes_.data() + (16 - address % 16) % 16) + kGuard + misalignment;
  }
  GuardedBuffer(const FloatArray& values, int misalignment) : GuardedBuffer(values.size(), misalignment) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = static_cast<Element>(values.data()[i]);
  }

  Element* data() { return data_; }
  EmulatedBlock::Range range() const { return {data_, data_ + size_}; }

  // Takes away what a block has written, so that another one is seen to write in the same place.
  void take_written() {
    taken_.resize(size_, {});
    for (int64_t i = 0; i < size_; ++i) {
      if (is_untouched(data_ + i)) continue;
      if (taken_[i].has_value()) throw std::runtime_error("two blocks write one output");
      taken_[i] = data_[i];
      std::memset(static_cast<void*>(data_ + i), 0xff, sizeof(Element));
    }
  }

  void give_back() {
    for (size_t i = 0; i < taken_.size(); ++i) {
      if (taken_[i].has_value()) data_[i] = *taken_[i];
    }
  }

  void copy_to(FloatArray& values) const {
    for (int64_t i = 0; i < size_; ++i) values.mutable_data()[i] = static_cast<float>(data_[i]);
    check();
  }

  void check() const {
    const auto* first = reinterpret_cast<const unsigned char*>(data_);
    const auto* last = first + size_ * sizeof(Element);
    for (const unsigned char& byte : bytes_) {
      if ((&byte < first || &byte >= last) && byte != 0xff) throw std::runtime_error("write outside the output");
    }
  }

 private:
  static constexpr int64_t kGuard = 4096;

  static bool is_untouched(const Element* element) {
    const auto* byte = reinterpret_cast<const unsigned char*>(element);
    return std::all_of(byte, byte + sizeof(Element), [](unsigned char b) { return b == 0xff; });
  }

  int64_t size_;
  std::vector<std::optional<Element>> taken_;
  std::vector<unsigned char> bytes_;
  Element* data_;
};

std::vector<int64_t> sizes(const FloatArray& a) {
  return {a.shape(), a.shape() + a.ndim()};
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw py::value_error("unknown dtype " + name + "; known ones are float32, float16, bfloat16");
}

// Calls f with a value of the element type.
template <class F>
auto with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat16:
      return f(Half());
    case Dtype::kBFloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

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

const Tile& tile_at(int index) {
  if (index < 0 || index >= kNumTiles)
    throw py::index_error("there is no tile " + std::to_string(index) + " among " + std::to_string(kNumTiles));
  return kTiles[index];
}

// run(threads, shared_bytes, kernel) of the tile's kernel for copies of so many bytes.
template <class Element, int kTileIndex = 0, class Run>
void run_conv(int tile, int bytes, const ConvArguments& args, const Run& run) {
  if constexpr (kTileIndex < kNumTiles) {
    constexpr const Tile& t = kTiles[kTileIndex];
    if (tile != kTileIndex) {
      run_conv<Element, kTileIndex + 1>(tile, bytes, args, run);
    } else if (bytes == kChunkBytes) {
      run(num_threads(t), smem_bytes(t), [&] { conv_bn_act_kernel<Element, kTileIndex, kChunkBytes>(args); });
    } else if constexpr (!t.any_alignment) {
      throw py::value_error("this tile is compiled for aligned channels only");
    } else if (bytes == 8) {
      run(num_threads(t), smem_bytes(t), [&] { conv_bn_act_kernel<Element, kTileIndex, 8>(args); });
    } else {
      run(num_threads(t), smem_bytes(t), [&] { conv_bn_act_kernel<Element, kTileIndex, 0>(args); });
    }
  }
}

// x (N, H, W, C), weight (K, R, S, C/groups), residual (N, P, Q, K), vectors (K,), all as fp32 arrays that are rounded
// to `dtype` (`vector_dtype` for the vectors). `misalignment` shifts every buffer by that many elements. With several
// `splits` the second kernel runs after the first.
FloatArray emulate_conv_bn_act(const FloatArray& x, const FloatArray& weight, const OptionalArray& bn_weight,
                               const OptionalArray& bn_bias, const OptionalArray& bn_mean, const OptionalArray& bn_var,
                               double eps, const OptionalArray& bias, const OptionalArray& residual,
                               std::pair<int, int> stride, std::pair<int, int> padding, std::pair<int, int> dilation,
                               int groups, const std::string& activation, const std::string& dtype,
                               const std::string& vector_dtype, int tile, int splits, int misalignment,
                               bool copies_land_early, bool last_warp_first) {
  const ConvShape shape = make_shape(sizes(x), sizes(weight), stride, padding, dilation, groups);
  const Tile& t = tile_at(tile);
  FloatArray result(std::vector<int64_t>{shape.N, shape.P, shape.Q, shape.K});

  const Dtype of_vectors = parse_dtype(vector_dtype);
  std::vector<std::vector<unsigned char>> storage;
  const auto channel_vector = [&](const OptionalArray& values) -> ChannelVector {
    if (!values) return {nullptr, of_vectors};
    return with_element(of_vectors, [&](auto zero) -> ChannelVector {
      using Element = decltype(zero);
      storage.emplace_back(values->size() * sizeof(Element));
      auto* data = reinterpret_cast<Element*>(storage.back().data());
      for (int64_t i = 0; i < values->size(); ++i) data[i] = static_cast<Element>(values->data()[i]);
      return {data, of_vectors};
    });
  };

  with_element(parse_dtype(dtype), [&](auto zero) {
    using Element = decltype(zero);
    constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Element));
    GuardedBuffer<Element> x_buffer(x, misalignment), weight_buffer(weight, misalignment);
    GuardedBuffer<Element> residual_buffer(residual ? *residual : FloatArray(0), misalignment);
    GuardedBuffer<Element> out(result.size(), misalignment);
    GuardedBuffer<float> partials(splits > 1 ? splits * result.size() : 0, misalignment);

    ConvArguments args{};
    args.shape = shape;
    args.splits = splits;
    args.partials = splits > 1 ? partials.data() : nullptr;
    args.epilogue = {channel_vector(bn_weight),
                     channel_vector(bn_bias),
                     channel_vector(bn_mean),
                     channel_vector(bn_var),
                     channel_vector(bias),
                     static_cast<float>(eps),
                     parse_activation("emulate_conv_bn_act", activation, Activation::kSilu),
                     residual ? residual_buffer.data() : nullptr};
    args.x = x_buffer.data();
    args.weight = weight_buffer.data();
    args.out = out.data();
    const auto addresses = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.weight);
    args.has_vector_rows = misalignment % kChunk == 0 && shape.group_filters % kChunk == 0;
    const int64_t blocks = num_blocks(t, gemm_size(shape, sizeof(Element))) * splits;
    const Schedule schedule{copies_land_early, last_warp_first};
    const auto after_block = [&] {
      out.take_written();
      partials.take_written();
    };
    run_conv<Element>(tile, copy_bytes(shape.group_channels, sizeof(Element), addresses), args,
                      [&](int threads, int shared_bytes, const auto& kernel) {
                        EmulatedBlock::run_grid(blocks, threads, shared_bytes, schedule,
                                                {x_buffer.range(), weight_buffer.range()}, kernel, after_block);
                      });
    if (splits > 1) {
      partials.check();
      partials.give_back();
      EmulatedBlock::run_grid(
          num_sum_blocks(shape, kChunk), kSumThreads, 0, schedule, {}, [&] { sum_splits_kernel<Element>(args); },
          [&] { out.take_written(); });
    }
    out.give_back();
    out.copy_to(result);
  });
  return result;
}

// add_relu (or its backward) on 1-D arrays, each buffer shifted by its own number of elements.
FloatArray emulate_add_relu(const FloatArray& a, const FloatArray& b, const std::string& dtype, bool backward,
                            std::tuple<int, int, int> misalignment, int blocks) {
  FloatArray result(a.size());
  with_element(parse_dtype(dtype), [&](auto zero) {
    using Element = decltype(zero);
    GuardedBuffer<Element> from_a(a, std::get<0>(misalignment)), from_b(b, std::get<1>(misalignment));
    GuardedBuffer<Element> out(a.size(), std::get<2>(misalignment));
    const auto kernel = [&] {
      if (backward) {
        pointwise_kernel<Element, AddReluBackward>(from_a.data(), from_b.data(), out.data(), a.size());
      } else {
        pointwise_kernel<Element, AddRelu>(from_a.data(), from_b.data(), out.data(), a.size());
      }
    };
    EmulatedBlock::run_grid(blocks, kPointwiseThreads, 0, {}, {}, kernel, [&] { out.take_written(); });
    out.give_back();
    out.copy_to(result);
  });
  return result;
}

}  // namespace

PYBIND11_MODULE(_host_checks, m) {
  bind_tiles(m);
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

  m.def("emulate_conv_bn_act", &emulate_conv_bn_act, py::arg("x"), py::arg("weight"), py::kw_only(),
        py::arg("bn_weight") = py::none(), py::arg("bn_bias") = py::none(), py::arg("bn_mean") = py::none(),
        py::arg("bn_var") = py::none(), py::arg("eps") = 1e-5, py::arg("bias") = py::none(),
        py::arg("residual") = py::none(), py::arg("stride") = std::make_pair(1, 1),
        py::arg("padding") = std::make_pair(0, 0), py::arg("dilation") = std::make_pair(1, 1), py::arg("groups") = 1,
        py::arg("activation") = "none", py::arg("dtype") = "float16", py::arg("vector_dtype") = "float32",
        py::arg("tile") = 1, py::arg("splits") = 1, py::arg("misalignment") = 0, py::arg("copies_land_early") = false,
        py::arg("last_warp_first") = false);
  m.def("emulate_add_relu", &emulate_add_relu, py::arg("a"), py::arg("b"), py::arg("dtype"), py::arg("backward"),
        py::arg("misalignment"), py::arg("blocks"));
}
