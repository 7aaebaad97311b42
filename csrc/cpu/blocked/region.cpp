// cpu_region: a piece of a network, from its inputs to its outputs, as one call: the steps of a program over blocked
// activations in a workspace that the caller owns. program.h says what a program is.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "cpu/blocked/kernels.h"
#include "cpu/blocked/program.h"
#include "cpu/denormals.h"
#include "cpu/operator.h"
#include "cpu/winograd_run.h"

namespace fused_resnet {
namespace {

using namespace blocked;

constexpr int64_t kGrainProducts = 1 << 18;  // a few microseconds of arithmetic for each thread at least
constexpr int64_t kGrainBytes = 1 << 16;

// run(begin, end) over portions of count, each of at least kGrainBytes.
template <class Run>
void over(int64_t count, int64_t bytes_each, const Run& run) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / bytes_each);
  torch::stable::parallel_for(0, count, grain, run);
}

class Runner {
 public:
  Runner(const Program& program, const MicroKernel& kernel) : program_(program), kernel_(kernel) {}

  void operator()(const ReadInput& step) const {
    const auto run = reading();
    const Layout& l = step.buffer.layout;
    const View to(l, program_.memory(step.buffer));
    over(l.N * l.H, l.blocks() * l.W * kPixelBytes, [&](int64_t begin, int64_t end) {
      const int64_t floats = step.image.C * step.image.W + kPixelBytes / static_cast<int64_t>(sizeof(float));
      run(l, step.unfolding, step.image, begin, end, reinterpret_cast<char*>(scratch(kRegion, floats)), to);
    });
  }

  void operator()(const SplitPhases& step) const {
    const Layout &from = step.from.layout, &to = step.to.layout;
    const char* in = program_.memory(step.from);
    char* out = program_.memory(step.to);
    over(to.N * to.blocks(), to.H * to.W * kPixelBytes,
         [&](int64_t begin, int64_t end) { split_phases(from, step.phases, to, in, begin, end, out); });
  }

  void operator()(const Copy& step) const {
    const Layout &from = step.from.layout, &to = step.to.layout;
    const char* in = program_.memory(step.from);
    char* out = program_.memory(step.to);
    over(to.N * to.H, from.blocks() * to.W * kPixelBytes,
         [&](int64_t begin, int64_t end) { copy_lines(from, step.copying, to, in, begin, end, out); });
  }

  void operator()(const ToNhwc& step) const {
    const Layout& l = step.buffer.layout;
    const char* from = program_.memory(step.buffer);
    if (kernel_.dtype == kInt8) {
      using Run = void (*)(const Layout&, const char*, float, bool, int64_t, int64_t, float*);
      static const auto run = best_of<Run>(to_floats_anywhere, to_floats_avx2, nullptr);
      auto* to = reinterpret_cast<float*>(step.output);
      return over(l.N * l.H, l.blocks() * l.W * kPixelBytes,
                  [&](int64_t begin, int64_t end) { run(l, from, step.scale, step.is_signed, begin, end, to); });
    }
    over(l.N * l.H, l.blocks() * l.W * kPixelBytes,
         [&](int64_t begin, int64_t end) { to_nhwc(l, from, begin, end, step.output); });
  }

  void operator()(const ToMeans& step) const {
    using Run = void (*)(const Averaging&, int64_t, int64_t);
    static const auto s8 = best_of<Run>(average_anywhere<int8_t>, average_avx2<int8_t>, average_avx512<int8_t>);
    static const auto u8 = best_of<Run>(average_anywhere<uint8_t>, average_avx2<uint8_t>, average_avx512<uint8_t>);
    const Averaging& a = step.averaging;
    const auto run = step.is_signed ? s8 : u8;
    over(a.blocks(), a.layout.plane_bytes(), [&](int64_t begin, int64_t end) { run(a, begin, end); });
  }

  void operator()(const LinearOfMeans& step) const { linear(step, step.maps.image_bytes()); }

  void operator()(const LinearOfVectors& step) const { linear(step, step.input_stride * sizeof(float)); }

  // Each part of a plane applies its gates anew.
  void operator()(const Gating& step) const { by_lines(step); }

  void operator()(const Norm& step) const { by_lines(step); }

  void operator()(const ZeroHalo& step) const {
    const Layout& l = step.buffer.layout;
    char* buffer = program_.memory(step.buffer);
    over(l.N * l.blocks(), (l.pixels() - l.H * l.W) * kPixelBytes + 1,
         [&](int64_t begin, int64_t end) { zero_halo(l, begin, end, buffer); });
  }

  void operator()(const Pool& step) const {
    const auto run = pooling_of(kernel_.dtype, step.is_signed);
    const Pooling& pooling = step.pooling;
    over(pooling.lines(step.images), pooling.Q * pooling.R * pooling.S * kPixelBytes, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      run(pooling, begin, end);
    });
  }

  // Each thread has neighbouring lines of the pooling's output.
  void operator()(const PooledStem& step) const {
    const int64_t P = step.pooling.P, lines = step.input.N * P;
    if (lines == 0) return;
    const int64_t threads = torch::stable::get_num_threads(), share = (lines + threads - 1) / threads;
    torch::stable::parallel_for(0, lines, std::min(step.lines, share), [&](int64_t begin, int64_t end) {
      std::optional<FlushDenormals> flush;
      if (kernel_.dtype != kInt8) flush.emplace();  // whose bytes depend on no mode
      char* memory = reinterpret_cast<char*>(scratch(kRegion, step.scratch_bytes() / 4));
      BandsOfStem bands(step, kernel_, reading(), pooling_of(kernel_.dtype, step.is_signed), memory);
      while (begin < end) {
        const int64_t image = begin / P, last = std::min(end, (image + 1) * P);
        bands.run(image, {begin - image * P, last - image * P});
        begin = last;
      }
    });
  }

  void operator()(const ByWinograd& step) const {
    if (kernel_.dtype == Dtype::kBFloat16) {
      run_winograd<BFloat16>(step);
    } else {
      run_winograd<float>(step);
    }
  }

  void operator()(const Convolve& step) const { convolve(step.convolution, step.splits_channels); }

 private:
  template <class One>
  void by_lines(const One& step) const {
    using Run = void (*)(const One&, int64_t, int64_t);
    static const auto fp32 =
        best_of<Run>(run_lines_anywhere<float, One>, run_lines_avx2<float, One>, run_lines_avx512<float, One>);
    static const auto bf16 =
        best_of<Run>(run_lines_anywhere<BFloat16, One>, run_lines_avx2<BFloat16, One>, run_lines_avx512<BFloat16, One>);
    static const auto bytes =
        best_of<Run>(run_lines_anywhere<uint8_t, One>, run_lines_avx2<uint8_t, One>, run_lines_avx512<uint8_t, One>);
    const auto run = kernel_.dtype == kInt8 ? bytes : kernel_.dtype == Dtype::kBFloat16 ? bf16 : fp32;
    over(step.lines(), step.layout.W * kPixelBytes, [&](int64_t begin, int64_t end) {
      std::optional<FlushDenormals> flush;
      if (kernel_.dtype != kInt8) flush.emplace();  // whose bytes depend on no mode
      run(step, begin, end);
    });
  }

  template <class Layer>
  void linear(const Layer& step, int64_t input_bytes) const {
    using Split = void (*)(const Layer&, int64_t, int64_t, char*);
    using Finish = void (*)(const Linear&, const char*, int64_t, int64_t);
    static const auto split = best_of<Split>(split_anywhere<Layer>, split_avx2<Layer>, nullptr);
    static const auto finish = best_of<Finish>(finish_linear_anywhere, finish_linear_avx2, nullptr);
    if (step.images == 0) return;
    char* halves = reinterpret_cast<char*>(scratch(kRegion, step.scratch_bytes() / 4));
    char* sums = halves + step.halves.bytes();
    over(step.images, input_bytes, [&](int64_t begin, int64_t end) { split(step, begin, end, halves); });
    Convolution c = step.convolution;
    c.segments[0].input = View(step.halves, halves);
    c.out = View(step.sums, sums);
    convolve(c, true);
    over(step.images, step.sums.bytes() / step.images,
         [&](int64_t begin, int64_t end) { finish(step, sums, begin, end); });
  }

  // Each thread has one share: a part of the pixels, or of the output channels; of both where there are too few.
  void convolve(const Convolution& c, bool splits_channels) const {
    const int64_t groups = (c.tiles() + kernel_.tiles - 1) / kernel_.tiles;
    if (groups == 0) return;
    const int64_t products = c.tiles() * c.tiling.rows() * c.panels * c.steps * kStepBytes / 4;
    const int64_t threads =
        std::min<int64_t>(torch::stable::get_num_threads(), (products + kGrainProducts - 1) / kGrainProducts);
    // in bytes two panels lie in one line of a cache
    const int64_t together = kernel_.dtype == kInt8 ? 2 : 1, panels = (c.panels + together - 1) / together;
    const auto panel_at = [&](int64_t part, int64_t parts) {
      return std::min(part * panels / parts * together, c.panels);
    };
    const int64_t first = std::min(threads, splits_channels ? panels : groups);
    const int64_t second = std::clamp<int64_t>(threads / first, 1, splits_channels ? groups : panels);
    const int64_t panel_parts = splits_channels ? first : second, group_parts = first * second / panel_parts;
    torch::stable::parallel_for(0, first * second, 1, [&](int64_t begin, int64_t end) {
      std::optional<FlushDenormals> flush;
      if (kernel_.dtype != kInt8) flush.emplace();  // whose bytes depend on no mode
      for (int64_t index = begin; index < end; ++index) {
        const int64_t group = index / panel_parts, panel = index % panel_parts;
        run(c, {group * groups / group_parts, (group + 1) * groups / group_parts, panel_at(panel, panel_parts),
                panel_at(panel + 1, panel_parts)});
      }
    });
  }

  // Of groups, neighbouring panels that read the same blocks of their input at a time.
  void run(const Convolution& c, const Share& share) const {
    if (c.first_blocks == nullptr) return kernel_.run(c, share);
    const int64_t panel_bytes = c.steps * kStepBytes;
    for (int64_t panel = share.panel_begin, next; panel < share.panel_end; panel = next) {
      next = panel + 1;
      Convolution part = c;
      const auto has_same = [&](int s) { return first_block(c, s, next) == first_block(c, s, panel); };
      while (next < share.panel_end && has_same(0) && has_same(c.num_segments - 1)) ++next;
      for (int s = 0; s < c.num_segments; ++s) {
        part.segments[s].input.base += first_block(c, s, panel) * c.segments[s].input.plane;
      }
      if (next < share.panel_end) part.next_weights = c.weights + next * panel_bytes, part.next_bytes = panel_bytes;
      kernel_.run(part, {share.group_begin, share.group_end, panel, next});
    }
  }

  static int64_t first_block(const Convolution& c, int segment, int64_t panel) {
    return c.first_blocks[segment * c.panels + panel];
  }

  static BandsOfStem::Read reading() {
    static const auto run = best_of<BandsOfStem::Read>(read_lines_anywhere, read_lines_avx2, read_lines_avx512);
    return run;
  }

  static BandsOfStem::Pool pooling_of(Dtype dtype, bool is_signed) {
    using Run = BandsOfStem::Pool;
    static const auto fp32 = best_of<Run>(pool_anywhere<float>, pool_avx2<float>, pool_avx512<float>);
    static const auto bf16 = best_of<Run>(pool_anywhere<BFloat16>, pool_avx2<BFloat16>, pool_avx512<BFloat16>);
    static const auto s8 =
        best_of<Run>(pool_bytes_anywhere<int8_t>, pool_bytes_avx2<int8_t>, pool_bytes_avx512<int8_t>);
    static const auto u8 =
        best_of<Run>(pool_bytes_anywhere<uint8_t>, pool_bytes_avx2<uint8_t>, pool_bytes_avx512<uint8_t>);
    if (dtype == kInt8) return is_signed ? s8 : u8;
    return dtype == Dtype::kBFloat16 ? bf16 : fp32;
  }

  template <class T>
  static void run_winograd(const ByWinograd& step) {
    T* out = reinterpret_cast<T*>(step.out);
    const Epilogue<T> epilogue{step.bias, step.adds_out ? out : nullptr, step.activation};
    winograd::run(kRegion, step.shape, reinterpret_cast<const T*>(step.input), step.weights, epilogue, out);
  }

  const Program& program_;
  const MicroKernel& kernel_;
};

// The whole program is checked before any of it runs.
void region(Tensor program, std::vector<Tensor> inputs, std::vector<Tensor> weights, std::vector<Tensor> biases,
            std::string kernel_name, Tensor workspace, std::vector<Tensor> outputs) {
  STD_TORCH_CHECK(!outputs.empty(), kRegion, ": a region has at least one output");
  const MicroKernel& kernel = choose_kernel(kRegion, kernel_name, dtype_of(program));
  const RegionTensors tensors{inputs, weights, biases, workspace, outputs};
  const Program read(program, tensors, kernel);
  const Runner run(read, kernel);
  for (const Step& step : read.steps()) std::visit(run, step);
}

// cpu_region_kernels: a line for each row of the table, its last field why it cannot run here.
std::string kernels() {
  std::string lines;
  for (const MicroKernel& kernel : micro_kernels()) {
    const char* taken = is_chosen(kernel) ? "chosen" : "named";
    for (const char* field : {kernel.name, name_of(kernel.dtype), taken, kernel.registers, kernel.reason}) {
      lines += std::string(field) + "\t";
    }
    lines += why_not(kernel) + "\n";
  }
  return lines;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("cpu_region", TORCH_BOX(&fused_resnet::region));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m) {
  m.impl("cpu_region_kernels", TORCH_BOX(&fused_resnet::kernels));
}
