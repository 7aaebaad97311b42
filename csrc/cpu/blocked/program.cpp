#include "cpu/blocked/program.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

namespace fused_resnet {
namespace blocked {
namespace {

using torch::headeronly::ScalarType;

// Of each size, of a window's sides and of an image's bytes: so that no product overflows before it is compared.
constexpr int64_t kMost = int64_t{1} << 24, kMostTaps = 1024, kMostImageBytes = int64_t{1} << 56;

// Of inputs that take turns with a panel of weights after the other: about half of a second-level cache.
constexpr int64_t kChunkBytes = 1 << 20;

// Of k steps, and of weights in bytes: where tiles are multiplied, from so many on each panel's weights are read once.
constexpr int64_t kManySteps = 8, kFewWeights = 1 << 15;

// Of weights that are fetched before their convolution begins.
constexpr int64_t kMostAhead = 1 << 18;

// Of bytes: 255 * 127 * kMostProducts stays below 2^31.
constexpr int64_t kMostProducts = 66310;

// Of each map that a band keeps.
constexpr int64_t kMostBandBytes = 1 << 28;

constexpr int64_t kHeader = 2;  // a program's version and dtype

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? ScalarType::BFloat16 : dtype == kInt8 ? ScalarType::Char : ScalarType::Float;
}

int64_t lanes_of(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? 32 : dtype == kInt8 ? 64 : 16;
}

// Of a map whose bytes are summed in int32.
constexpr int64_t kMostSummed = 1 << 23;

// Whether N images of this layout fit `bytes`, without a product that could overflow.
bool fits(const Layout& l, int64_t bytes) {
  const int64_t planes = l.N * l.blocks();
  if (l.pixels() > kMostImageBytes / kPixelBytes / l.blocks()) return false;
  return planes == 0 || l.pixels() <= bytes / kPixelBytes / planes;
}

winograd::Strides strides_of(const Layout& l) {
  const int64_t pixel = l.lanes;
  return {l.image_bytes() / kPixelBytes * pixel, l.pitch * pixel, pixel, l.plane_bytes() / kPixelBytes * pixel,
          l.lanes};
}

std::string text(const Layout& l) {
  return in_parentheses(std::vector<int64_t>{l.N, l.C, l.H, l.W});
}

template <class One>
Convolution* convolution_of(One* step) {
  if constexpr (std::is_same_v<One, Convolve> || std::is_same_v<One, PooledStem> ||
                std::is_same_v<One, LinearOfMeans> || std::is_same_v<One, LinearOfVectors>) {
    return &step->convolution;
  } else {
    return nullptr;
  }
}

// From an image on. Its shape has been checked.
Image image_of(const Tensor& input, int64_t first) {
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, kRegion,
                  ": an input must be float32 or bfloat16, not ", dtype_text(input));
  const auto* begin = static_cast<const char*>(input.const_data_ptr());
  return {begin + first * input.stride(0) * input.element_size(),
          input.size(1),
          input.size(2),
          input.size(3),
          input.stride(0),
          input.stride(1),
          input.stride(2),
          input.stride(3),
          type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16,
          Quantizer{}};
}

// A packed weight's k steps. An empty one may claim any number of them, in no memory.
int64_t steps_in(const Tensor& weight) {
  return weight.dim() == 5 && weight.numel() > 0 ? weight.size(1) : 0;
}

}  // namespace

Dtype dtype_of(const Tensor& program) {
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous(), kRegion,
                  ": program must be a contiguous vector of int64, not ", layout_text(program), " of ",
                  dtype_text(program));
  STD_TORCH_CHECK(program.numel() >= kHeader, kRegion, ": a program has a header of ", kHeader, " integers, not ",
                  program.numel());
  const auto* header = static_cast<const int64_t*>(program.const_data_ptr());
  STD_TORCH_CHECK(header[0] == kProgramVersion, kRegion, ": programs of version ", kProgramVersion,
                  " are run, this one is of version ", header[0]);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, kInt8}) {
    if (header[1] == static_cast<int64_t>(dtype)) return dtype;
  }
  STD_TORCH_CHECK(false, kRegion, ": a program's dtype is 0, 2 or 3, for float32, bfloat16 and int8, not ", header[1]);
}

Program::Program(const Tensor& program, const RegionTensors& tensors, const MicroKernel& kernel)
    : tensors_(tensors), kernel_(kernel) {
  const Tensor& workspace = tensors.workspace;
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.dim() == 1 && workspace.is_contiguous(),
                  kRegion, ": workspace must be a contiguous vector of bytes, not ", layout_text(workspace), " of ",
                  dtype_text(workspace));
  workspace_ = static_cast<char*>(workspace.mutable_data_ptr());
  workspace_bytes_ = workspace.numel();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(workspace_) % kPixelBytes == 0, kRegion,
                  ": workspace must begin at a multiple of 64 bytes");
  at_ = static_cast<const int64_t*>(program.const_data_ptr()) + kHeader;
  end_ = at_ - kHeader + program.numel();
  read_buffers();
  while (at_ != end_) steps_.push_back(read_step());
  set_next();
}

int64_t Program::read() {
  STD_TORCH_CHECK(at_ != end_, kRegion, ": the program ends within a step");
  return *at_++;
}

int64_t Program::read_between(const char* what, int64_t least, int64_t most) {
  const int64_t value = read();
  STD_TORCH_CHECK(value >= least && value <= most, kRegion, ": ", what, " must be from ", least, " to ", most, ", not ",
                  value);
  return value;
}

float Program::read_fp32(const char* what) {
  const auto bits = static_cast<uint32_t>(read_between(what, 0, UINT32_MAX));
  float value;
  std::memcpy(&value, &bits, 4);
  STD_TORCH_CHECK(std::isfinite(value), kRegion, ": ", what, " must be finite, not ", value);
  return value;
}

void Program::read_buffers() {
  const int64_t count = read_between("the number of buffers", 0, kMost);
  for (int64_t i = 0; i < count; ++i) buffers_.push_back(read_new_buffer());
}

Buffer Program::read_new_buffer() {
  Layout l{};
  l.N = read_between("a buffer's N", 0, kMost);
  l.C = read_between("a buffer's C", 1, kMost);
  l.H = read_between("a buffer's H", 1, kMost);
  l.W = read_between("a buffer's W", 1, kMost);
  l.halo = read_between("a buffer's halo", 0, kMost);
  l.pitch = read_between("a buffer's pitch", l.W + l.halo, 4 * kMost);
  l.lanes = lanes_of(kernel_.dtype);
  const int64_t offset = read_between("a buffer's offset", 0, workspace_bytes_);
  STD_TORCH_CHECK(offset % kPixelBytes == 0, kRegion, ": a buffer's offset must be a multiple of 64, not ", offset);
  STD_TORCH_CHECK(fits(l, workspace_bytes_ - offset), kRegion, ": a buffer of ", text(l), " at ", offset,
                  " does not fit the workspace of ", workspace_bytes_, " bytes");
  return {l, offset};
}

const Buffer& Program::read_buffer() {
  return buffers_[read_between("a buffer's number", 0, static_cast<int64_t>(buffers_.size()) - 1)];
}

const Tensor& Program::read_tensor(const char* what, const std::vector<Tensor>& tensors) {
  return tensors[read_between(what, 0, static_cast<int64_t>(tensors.size()) - 1)];
}

Program::Window Program::read_window() {
  Window w{};
  w.R = read_between("a window's height", 1, kMostTaps);
  w.S = read_between("a window's width", 1, kMostTaps);
  w.stride_h = read_between("a stride", 1, kMost);
  w.stride_w = read_between("a stride", 1, kMost);
  w.padding_h = read_between("a padding", 0, kMost);
  w.padding_w = read_between("a padding", 0, kMost);
  return w;
}

void Program::check_disjoint(const char* what, const Buffer& a, const Buffer& out) const {
  const bool overlap = a.offset < out.offset + out.layout.bytes() && out.offset < a.offset + a.layout.bytes();
  STD_TORCH_CHECK(!overlap, kRegion, ": ", what, " of ", text(a.layout), " at ", a.offset, " and the output of ",
                  text(out.layout), " at ", out.offset, " overlap");
}

// Of a tensor (N, C, H, W), from which on the images of the buffer lie in it.
int64_t Program::read_first_image(const char* what, const Tensor& tensor, int64_t C, int64_t W, const Layout& l) {
  const int64_t N = tensor.dim() == 4 ? tensor.size(0) : 0, first = read_between("the first image", 0, N);
  STD_TORCH_CHECK(tensor.dim() != 4 || l.N <= N - first, kRegion, ": ", what, " of ", N, " images has no ", l.N,
                  " from image ", first, " on");
  check_shape(kRegion, what, tensor, {N, C, l.H, W});
  return first;
}

Program::Window Program::read_dilated_window() {
  Window w = read_window();
  w.dilation_h = read_between("a dilation", 1, kMost);
  w.dilation_w = read_between("a dilation", 1, kMost);
  return w;
}

Step Program::read_step() {
  const int64_t step = read_between("a step", 0, 14);
  const bool is_of_int8 = step == 7 || step == 9 || step == 12 || step == 13;
  STD_TORCH_CHECK(is_int8() ? step != 6 : !is_of_int8, kRegion, ": ", kernel_.name, " has no step ", step);
  switch (step) {
    case 0:
      return read_input();
    case 1:
      return read_output();
    case 2:
      return ZeroHalo{read_buffer()};
    case 3:
      return read_convolution();
    case 4:
      return read_pooling();
    case 5:
      return read_phases();
    case 6:
      return read_winograd();
    case 7:
      return read_means();
    case 8:
      return read_pooled_stem();
    case 9:
      return read_linear();
    case 11:
      return read_gate();
    case 12:
      return read_means_within();
    case 13:
      return read_linear_of_vectors();
    case 14:
      return read_norm();
    default:
      return read_copy();
  }
}

Step Program::read_input() {
  const Tensor& input = read_tensor("an input's number", tensors_.inputs);
  const int64_t* first_image = at_;  // whose check needs what follows
  read();
  const Buffer& buffer = read_buffer();
  const Layout& l = buffer.layout;
  const Unfolding u = read_unfolding();
  const int64_t C = l.C / (u.taps * u.rows), W = input.dim() == 4 ? input.size(3) : 0;
  STD_TORCH_CHECK(l.C % (u.taps * u.rows) == 0 && (u.rows == 1 || l.C <= l.lanes) && W > 0 && W <= kMost &&
                      Window::outputs(W + 2 * u.padding - u.taps, u.stride) == l.W,
                  kRegion, ": ", u.taps, " taps of an input of ", W, " columns do not give ", text(l));
  std::swap(at_, first_image);
  Layout lines = l;  // what lies outside of the image is zero, however many there are
  if (u.rows > 1 && input.dim() == 4) lines.H = input.size(2);
  const int64_t first = read_first_image("an input", input, C, W, lines);
  std::swap(at_, first_image);
  Image image = image_of(input, first);
  if (is_int8()) image.quantizer = read_quantizer();
  return ReadInput{image, buffer, u};
}

Quantizer Program::read_quantizer() {
  const float inverse = read_fp32("1 / scale");
  return read_is_signed() ? Quantizer{inverse, -128.f, 127.f} : Quantizer{inverse, 0.f, 255.f};
}

Unfolding Program::read_unfolding() {
  Unfolding u{};
  u.taps = read_between("the taps of an unfolding", 1, kMostTaps);
  u.stride = read_between("the stride of an unfolding", 1, kMost);
  u.padding = read_between("the padding of an unfolding", 0, kMost);
  if (is_int8()) {
    u.rows = read_between("the rows of an unfolding", 1, kPixelBytes);
    u.padding_h = read_between("the padding of an unfolding", 0, kMost);
  }
  return u;
}

Step Program::read_output() {
  const Buffer& buffer = read_buffer();
  const Layout& l = buffer.layout;
  const Tensor& output = read_tensor("an output's number", tensors_.outputs);
  check_output_dtype(output);
  const int64_t first = read_first_image("an output", output, l.C, l.W, l);
  check_channels_last(kRegion, "an output", output);
  const int64_t image_bytes = l.H * l.W * l.C * output.element_size();
  ToNhwc step{buffer, static_cast<char*>(output.mutable_data_ptr()) + first * image_bytes, 0.f, false};
  if (is_int8()) step.scale = read_fp32("a scale"), step.is_signed = read_is_signed();
  return step;
}

void Program::check_output_dtype(const Tensor& output) const {
  const ScalarType type = is_int8() ? ScalarType::Float : scalar_type(kernel_.dtype);
  STD_TORCH_CHECK(output.scalar_type() == type, kRegion, ": an output must be ", torch::headeronly::toString(type),
                  " beside ", kernel_.name, ", not ", dtype_text(output));
}

Step Program::read_means() {
  const Buffer& buffer = read_buffer();
  const Layout& l = buffer.layout;
  const Tensor& output = read_tensor("an output's number", tensors_.outputs);
  check_output_dtype(output);
  const Layout means{l.N, l.C, 1, 1, 0, 1, l.lanes};
  const int64_t first = read_first_image("an output", output, l.C, 1, means);
  check_channels_last(kRegion, "an output", output);
  STD_TORCH_CHECK(l.H * l.W <= kMostSummed, kRegion, ": a mean is of at most ", kMostSummed, " pixels, not ", text(l));
  Averaging a{l, memory(buffer), 0.f, static_cast<float*>(output.mutable_data_ptr()) + first * l.C, l.C};
  a.factor = read_fp32("a scale");
  return ToMeans{a, read_is_signed()};
}

Step Program::read_means_within() {
  const Buffer& buffer = read_buffer();
  const Layout& l = buffer.layout;
  const Buffer vector = read_vector("means", l.C);
  STD_TORCH_CHECK(l.N == vector.layout.N && l.H * l.W <= kMostSummed, kRegion, ": means are of at most ", kMostSummed,
                  " pixels and of as many images, not ", text(l), " to ", text(vector.layout));
  check_disjoint("an input", buffer, vector);
  Averaging a{l, memory(buffer), 0.f, reinterpret_cast<float*>(memory(vector)), values_of_vector(l.C)};
  a.factor = read_fp32("a scale");
  return ToMeans{a, read_is_signed()};
}

// Of so many values of fp32.
Buffer Program::read_vector(const char* what, int64_t C) {
  const Buffer& buffer = read_buffer();
  const Layout& l = buffer.layout;
  STD_TORCH_CHECK(l.C == 4 * values_of_vector(C) && l.H == 1 && l.W == 1 && l.halo == 0, kRegion, ": ", what, " of ", C,
                  " channels are a vector of 4 bytes for each of ", values_of_vector(C), ", not ", text(l));
  return buffer;
}

Step Program::read_linear_of_vectors() {
  LinearOfVectors step{};
  const int64_t C = read_between("a vector's channels", 1, kMostProducts);
  const int64_t K = read_between("a vector's channels", 1, kMost);
  const Buffer input = read_vector("the inputs of a linear layer", C);
  const Buffer output = read_vector("the outputs of a linear layer", K);
  const int64_t N = input.layout.N;
  STD_TORCH_CHECK(N == output.layout.N, kRegion, ": a linear layer of ", N, " vectors does not give ", output.layout.N);
  check_disjoint("an input", input, output);
  step.input = reinterpret_cast<const float*>(memory(input));
  step.output = reinterpret_cast<float*>(memory(output));
  step.input_stride = values_of_vector(C), step.stride = values_of_vector(K);
  const float factor = read_fp32("256 / scale");
  step.is_signed = read_is_signed();
  step.quantizer = step.is_signed ? Quantizer{factor, -32768.f, 32767.f} : Quantizer{factor, 0.f, 65535.f};
  step.activation = read_activation();
  set_linear(N, C, K, &step);
  return step;
}

Step Program::read_linear() {
  LinearOfMeans step{};
  const Buffer& buffer = read_buffer();
  const Layout& l = step.maps = buffer.layout;
  const Tensor& output = read_tensor("an output's number", tensors_.outputs);
  check_output_dtype(output);
  const int64_t K = output.dim() == 4 ? output.size(1) : 0;
  const int64_t first = read_first_image("an output", output, K, 1, {l.N, K, 1, 1, 0, 1, l.lanes});
  check_channels_last(kRegion, "an output", output);
  STD_TORCH_CHECK(K > 0 && l.C <= kMostProducts && l.H * l.W <= kMostPixelsOfAMean, kRegion,
                  ": a linear layer is of the means of at most ", kMostProducts, " maps of at most ",
                  kMostPixelsOfAMean, " pixels, not of ", text(l), " to ", K, " outputs");
  step.input = memory(buffer);
  step.output = static_cast<float*>(output.mutable_data_ptr()) + first * K;
  step.stride = K;
  set_linear(l.N, l.C, K, &step);
  return step;
}

// Reads its weight and its constants.
void Program::set_linear(int64_t N, int64_t C, int64_t K, Linear* linear) {
  const int64_t pixels = 2 * std::max<int64_t>(N, 1), bytes = lanes_of(kInt8);
  linear->images = N;
  linear->halves = {1, C, 1, pixels, 0, pixels, bytes};
  linear->sums = {1, K, 1, pixels, 0, pixels, lanes_of(Dtype::kFloat32)};
  Convolution& c = linear->convolution;
  c.images = 1, c.channels = K, c.panels = (K + kPanel - 1) / kPanel, c.steps = linear->halves.used_blocks();
  check_weights(read_tensor("a weight's number", tensors_.weights), &c);
  c.requantizing.constants = read_constants(c.panels);
  c.keeps_sums = c.panels_outermost = true;
  c.tiling = Tiling(1, pixels, pixels, true, kernel_.max_rows);
  for (int64_t block = 0; block < c.steps; ++block) offsets_.push_back(block * linear->halves.plane_bytes());
  Segment& segment = c.segments[0];
  segment.blocks = segment.steps = c.steps;
  segment.offsets = keep(&offsets_);
  set_chunk(&c);
}

// Whether a map has the shape of `out`, and is it or lies apart from it.
void Program::check_map(const char* what, const Buffer& map, const Buffer& out) const {
  const Layout &m = map.layout, &l = out.layout;
  STD_TORCH_CHECK(m.N == l.N && m.C == l.C && m.H == l.H && m.W == l.W, kRegion, ": ", what, " of ", text(m),
                  " does not give ", text(l));
  if (&map != &out) check_disjoint(what, map, out);
}

Step Program::read_norm() {
  const Buffer &out = read_buffer(), &x = read_buffer();
  check_map("a map before its norm", x, out);
  Norm step{};
  step.layout = out.layout, step.x = view(x), step.out = view(out);
  step.activation = read_activation();
  const Tensor& constants = read_tensor("the constants' number", tensors_.biases);
  STD_TORCH_CHECK(constants.scalar_type() == ScalarType::Float && constants.is_contiguous(), kRegion,
                  ": constants must be contiguous and float32, not ", layout_text(constants), " of ",
                  dtype_text(constants));
  check_shape(kRegion, "a norm's constants", constants, {2, values_of_vector(out.layout.C)});
  step.scale = static_cast<const float*>(constants.const_data_ptr());
  step.shift = step.scale + values_of_vector(out.layout.C);
  if (!is_int8()) return step;
  STD_TORCH_CHECK(step.activation == Activation::kNone, kRegion, ": in int8 a norm has no activation, not ",
                  kActivationNames[static_cast<int>(step.activation)]);
  read_bounds(&step.bytes);
  step.bytes.is_input_signed = read_is_signed();
  return step;
}

Step Program::read_gate() {
  const Buffer &out = read_buffer(), &x = read_buffer();
  const Layout& l = out.layout;
  check_map("a gated map", x, out);
  const Buffer gate = is_int8() ? read_vector("gates", l.C) : read_buffer();
  const Layout& g = gate.layout;
  STD_TORCH_CHECK(g.N == l.N && (is_int8() || (g.C == l.C && g.H == 1 && g.W == 1)), kRegion, ": gates of ", text(g),
                  " are not those of ", text(l));
  check_disjoint("gates", gate, out);
  Gating step{};
  step.layout = l, step.x = view(x), step.out = view(out), step.gates = view(gate).base;
  step.gates_of_image = g.image_bytes(), step.gates_of_block = is_int8() ? 4 * kPixelBytes : g.plane_bytes();
  const int64_t number = read_between("a residual's number", -1, static_cast<int64_t>(buffers_.size()) - 1);
  if (number >= 0) {
    check_map("a residual", buffers_[number], out);
    step.residual = view(buffers_[number]);
  }
  step.function = static_cast<GateFunction>(read_between("a gate's function", 0, 1));
  step.activation = read_activation();
  if (!is_int8()) return step;
  STD_TORCH_CHECK(step.activation == Activation::kNone, kRegion, ": in int8 a gate has no activation, not ",
                  kActivationNames[static_cast<int>(step.activation)]);
  step.scale = read_fp32("a scale");
  read_bounds(&step.bytes);
  step.bytes.is_input_signed = read_is_signed(), step.bytes.is_residual_signed = read_is_signed();
  return step;
}

Step Program::read_phases() {
  const Buffer &from = read_buffer(), &to = read_buffer();
  const Window w = read_dilated_window();
  const Layout &l = from.layout, &t = to.layout;
  Phases phases = w.phases();
  STD_TORCH_CHECK(
      l.N == t.N && t.blocks() == phases.count() * l.blocks() && t.H == w.outputs_h(l.H) && t.W == w.outputs_w(l.W),
      kRegion, ": the phases of ", text(l), " for a window of ", w.R, "x", w.S, " are not ", text(t));
  check_disjoint("an input", from, to);
  return SplitPhases{from, to, std::move(phases)};
}

Step Program::read_convolution() {
  Convolve step{};
  Convolution& c = step.convolution;
  const Buffer& out = read_buffer();
  const Layout& l = out.layout;
  bool runs_on = true;  // whether all that is read and written has out's pitch, and strides of 1
  read_residual(out, &c, &runs_on);
  c.activation = read_activation();
  step.splits_channels = read_between("what threads split", 0, 1) == 1;
  c.images = l.N;
  c.channels = l.C;
  c.panels = (l.C + kPanel - 1) / kPanel;
  c.out = view(out);
  const Tensor& weight = read_tensor("a weight's number", tensors_.weights);
  most_steps_ = steps_in(weight);  // known before any step is written down
  const float* constants = is_int8() ? read_constants(c.panels) : nullptr;
  if (!is_int8()) c.bias = read_bias(c.panels);
  c.num_segments = static_cast<int>(read_between("the number of segments", 1, kMaxSegments));
  for (int s = 0; s < c.num_segments; ++s) c.steps += read_segment(out, &c.segments[s], &runs_on);
  const auto is_first = [](int64_t block) { return block == 0; };
  const bool are_groups = !std::all_of(first_blocks_.begin(), first_blocks_.end(), is_first);
  const int64_t *offsets = keep(&offsets_), *first_blocks = keep(&first_blocks_);
  if (are_groups) c.first_blocks = first_blocks;
  for (int s = 0; s < c.num_segments; offsets += c.segments[s++].steps) c.segments[s].offsets = offsets;
  check_weights(weight, &c);
  if (is_int8()) read_requantizing(constants, &c);
  c.panels_outermost = step.splits_channels || passes_panels(c);
  c.tiling = Tiling(l.H, l.W, l.pitch, runs_on, kernel_.max_rows);
  set_chunk(&c);
  return step;
}

// Whether the tiles of a chunk pass panel by panel although the weights are smaller than the input. That is faster
// where windows are one pixel, reductions long, and weights more than a first-level cache keeps beside pixels: on
// ResNet-50's convolutions, and slower on its others (Xeon with AMX, bf16, batches of 1, 2 and 8, 2026-12). In int8,
// and without tiles, neither order is faster.
bool Program::passes_panels(const Convolution& c) const {
  for (int s = 0; s < c.num_segments; ++s) {
    if (c.segments[s].steps > c.segments[s].blocks) return false;
  }
  const bool is_bf16_by_tiles = kernel_.tiles > 1 && !is_int8();
  return is_bf16_by_tiles && c.steps >= kManySteps && c.panels * c.steps * kStepBytes > kFewWeights;
}

void Program::set_chunk(Convolution* c) const {
  int64_t group_bytes = 0;
  for (int s = 0; s < c->num_segments; ++s) group_bytes += c->segments[s].blocks * c->tiling.rows() * kPixelBytes;
  c->chunk = std::max<int64_t>(1, kChunkBytes / (group_bytes * kernel_.tiles));
}

void Program::read_residual(const Buffer& out, Convolution* c, bool* runs_on) {
  const int64_t number = read_between("a residual's number", -1, static_cast<int64_t>(buffers_.size()) - 1);
  if (number < 0) return;
  const Buffer& residual = buffers_[number];
  const Layout &r = residual.layout, &l = out.layout;
  STD_TORCH_CHECK(r.N == l.N && r.C == l.C && r.H == l.H && r.W == l.W, kRegion, ": a residual of ", text(r),
                  " is added to an output of ", text(l));
  if (&residual != &out) check_disjoint("a residual", residual, out);
  *runs_on &= r.pitch == l.pitch;
  c->residual = view(residual);
}

// Returns its k steps, and appends their offsets.
int64_t Program::read_segment(const Buffer& out, Segment* segment, bool* runs_on) {
  const Buffer& input = read_buffer();
  const Layout &l = input.layout, &to = out.layout;
  const int64_t channels = read_between("the channels of a phased map", 0, l.C), in = channels > 0 ? channels : l.C;
  const Window w = read_dilated_window();
  const int64_t groups = read_between("a convolution's groups", 1, in);
  STD_TORCH_CHECK(in % groups == 0 && to.C % groups == 0, kRegion, ": ", in, " and ", to.C, " channels have no ",
                  groups, " groups");
  segment->blocks = set_groups(in / groups, to.C / groups, to.C);
  check_disjoint("an input", input, out);
  const int64_t products = in / groups * w.R * w.S;
  STD_TORCH_CHECK(!is_int8() || products <= kMostProducts, kRegion, ": sums of ", products,
                  " products may leave int32, at most ", kMostProducts, " stay");
  STD_TORCH_CHECK(l.N == to.N, kRegion, ": a convolution of ", text(l), " does not give ", text(to));
  segment->input = view(input);
  if (channels > 0) return read_phased(w, input, channels, out, segment, runs_on);
  STD_TORCH_CHECK(to.H == w.outputs_h(l.H) && to.W == w.outputs_w(l.W), kRegion, ": a convolution of ", text(l),
                  " with a window of ", w.R, "x", w.S, " does not give ", text(to));
  STD_TORCH_CHECK(std::max(w.padding_h, w.padding_w) <= l.halo, kRegion, ": a padding of ",
                  std::max(w.padding_h, w.padding_w), " needs as much halo, the buffer has ", l.halo);
  *runs_on &= w.stride_h == 1 && w.stride_w == 1 && l.pitch == to.pitch;
  segment->stride_h = w.stride_h, segment->stride_w = w.stride_w;
  set_offsets(l, w, segment);
  return segment->steps;
}

void Program::set_offsets(const Layout& l, const Window& w, Segment* segment) {
  set_steps(w, segment);
  for (int64_t block = 0; block < segment->blocks; ++block) {
    for (int64_t r = 0; r < w.R; ++r) {
      for (int64_t s = 0; s < w.S; ++s) {
        offsets_.push_back(block * l.plane_bytes() +
                           ((r * w.dilation_h - w.padding_h) * l.pitch + (s * w.dilation_w - w.padding_w)) *
                               kPixelBytes);
      }
    }
  }
}

// The same over the phases of a map, each as large as the output.
int64_t Program::read_phased(const Window& w, const Buffer& input, int64_t channels, const Buffer& out,
                             Segment* segment, bool* runs_on) {
  const Layout &l = input.layout, &to = out.layout;
  const Phases phases = w.phases();
  const Layout map{l.N, channels, l.H, l.W, l.halo, l.pitch, l.lanes};
  const auto [least_h, most_h] = std::minmax_element(phases.h.shift.begin(), phases.h.shift.end());
  const auto [least_w, most_w] = std::minmax_element(phases.w.shift.begin(), phases.w.shift.end());
  STD_TORCH_CHECK(l.H == to.H && l.W == to.W && l.blocks() == phases.count() * map.blocks(), kRegion, ": the phases ",
                  text(l), " of ", channels, " channels for a window of ", w.R, "x", w.S, " do not give ", text(to));
  STD_TORCH_CHECK(std::max(*most_h, *most_w) <= 0 && std::min(*least_h, *least_w) >= -l.halo, kRegion,
                  ": the window reaches beyond the halo of ", l.halo, " around its phases");
  *runs_on &= l.pitch == to.pitch;
  set_steps(w, segment);
  for (int64_t block = 0; block < segment->blocks; ++block) {
    for (int64_t r = 0; r < w.R; ++r) {
      for (int64_t s = 0; s < w.S; ++s) {
        offsets_.push_back((phases.index(r, s) * map.blocks() + block) * l.plane_bytes() +
                           phases.h.shift[r] * segment->input.line + phases.w.shift[s] * kPixelBytes);
      }
    }
  }
  return segment->steps;
}

// How many blocks of its input a panel reads: those of its outputs' groups. Appends the first of them for each panel,
// whose others lie within the input. in, out: channels of a group.
int64_t Program::set_groups(int64_t in, int64_t out, int64_t channels) {
  const int64_t lanes = lanes_of(kernel_.dtype), begin = static_cast<int64_t>(first_blocks_.size());
  int64_t count = 0;
  for (int64_t channel = 0; channel < channels; channel += kPanel) {
    const int64_t last_group = (std::min(channel + kPanel, channels) - 1) / out, first = channel / out * in / lanes;
    first_blocks_.push_back(first);
    count = std::max(count, ((last_group + 1) * in + lanes - 1) / lanes - first);
  }
  const int64_t last = (channels / out * in + lanes - 1) / lanes - count;
  for (auto at = first_blocks_.begin() + begin; at != first_blocks_.end(); ++at) *at = std::min(*at, last);
  return count;
}

void Program::set_steps(const Window& w, Segment* segment) {
  segment->steps = segment->blocks * w.R * w.S;
  STD_TORCH_CHECK(segment->steps <= most_steps_, kRegion,
                  ": a weight must have the shape of its convolution, and that of ", segment->steps,
                  " k steps or more has ", most_steps_);
}

// What each convolution fetches for the next one.
void Program::set_next() {
  const Convolution* next = nullptr;
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    Convolution* c = std::visit([](auto& one) { return convolution_of(&one); }, *step);
    if (c == nullptr) continue;
    if (next != nullptr) {
      const int64_t panel_bytes = next->steps * kStepBytes;
      c->next_weights = next->weights;
      c->next_bytes = std::min(next->panels * panel_bytes, std::max(panel_bytes, kMostAhead));
    }
    next = c;
  }
}

const int64_t* Program::keep(std::vector<int64_t>* numbers) {
  kept_.push_back(std::move(*numbers));
  numbers->clear();
  return kept_.back().data();
}

void Program::check_weights(const Tensor& weight, Convolution* c) const {
  STD_TORCH_CHECK(weight.scalar_type() == scalar_type(kernel_.dtype) && weight.is_contiguous(), kRegion,
                  ": a weight must be contiguous and of the dtype of ", kernel_.name, ", not ", layout_text(weight),
                  " of ", dtype_text(weight));
  check_shape(kRegion, "a weight", weight, {c->panels, c->steps, 2, 16, lanes_of(kernel_.dtype)});
  c->weights = static_cast<const char*>(weight.const_data_ptr());
}

Activation Program::read_activation() {
  return static_cast<Activation>(read_between("an activation", 0, static_cast<int64_t>(Activation::kSilu)));
}

const float* Program::read_bias(int64_t panels) {
  const int64_t bias = read_between("a bias's number", -1, static_cast<int64_t>(tensors_.biases.size()) - 1);
  if (bias < 0) return nullptr;
  const Tensor& vector = tensors_.biases[bias];
  STD_TORCH_CHECK(vector.scalar_type() == ScalarType::Float && vector.is_contiguous(), kRegion,
                  ": a bias must be contiguous and float32, not ", layout_text(vector), " of ", dtype_text(vector));
  check_shape(kRegion, "a bias", vector, {panels * kPanel});
  return static_cast<const float*>(vector.const_data_ptr());
}

const float* Program::read_constants(int64_t panels) {
  const Tensor& constants = read_tensor("the constants' number", tensors_.biases);
  STD_TORCH_CHECK(constants.scalar_type() == ScalarType::Float && constants.is_contiguous(), kRegion,
                  ": constants must be contiguous and float32, not ", layout_text(constants), " of ",
                  dtype_text(constants));
  check_shape(kRegion, "a convolution's constants", constants, {panels, Requantizing::kVectors, kPanel});
  return static_cast<const float*>(constants.const_data_ptr());
}

void Program::read_requantizing(const float* constants, Convolution* c) {
  STD_TORCH_CHECK(c->num_segments == 1 && c->activation == Activation::kNone, kRegion,
                  ": in int8 a convolution has one segment and no activation, not ", c->num_segments, " and ",
                  kActivationNames[static_cast<int>(c->activation)]);
  Requantizing& r = c->requantizing;
  r.constants = constants;
  read_bounds(&r);
  r.fits_int32 = read_between("whether values fit int32", 0, 1) == 1;
  r.is_input_signed = read_is_signed(), r.is_residual_signed = read_is_signed();
}

void Program::read_bounds(Requantizing* r) {
  r->residual = read_fp32("a residual's factor");
  r->low = read_fp32("a lower bound"), r->high = read_fp32("an upper one");
  STD_TORCH_CHECK((r->low == 0.f && r->high >= 0.f && r->high <= 255.f) || (r->low == -128.f && r->high == 127.f),
                  kRegion, ": the bounds of bytes are 0 and at most 255, or -128 and 127, not ", r->low, " and ",
                  r->high);
}

Step Program::read_winograd() {
  const Buffer &input = read_buffer(), &out = read_buffer();
  ByWinograd step{};
  step.adds_out = read_between("whether out is added", 0, 1) == 1;
  step.activation = read_activation();
  const Tensor& weight = read_tensor("a weight's number", tensors_.weights);
  step.bias = read_bias((out.layout.C + kPanel - 1) / kPanel);
  const int64_t padding_h = read_between("a padding", 0, kMost), padding_w = read_between("a padding", 0, kMost);
  const Layout &l = input.layout, &to = out.layout;
  STD_TORCH_CHECK(l.C % kPanel == 0 && to.C % kPanel == 0, kRegion, ": Winograd's channels are multiples of ", kPanel,
                  ", not ", l.C, " and ", to.C);
  STD_TORCH_CHECK(l.N == to.N && to.H == l.H + 2 * padding_h - 2 && to.W == l.W + 2 * padding_w - 2, kRegion,
                  ": a 3x3 convolution of ", text(l), " does not give ", text(to));
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous(), kRegion,
                  ": Winograd's weight must be contiguous and float32, not ", layout_text(weight), " of ",
                  dtype_text(weight));
  check_shape(kRegion, "a weight", weight, {winograd::kPoints, to.C / winograd::kPanel, l.C, winograd::kPanel});
  check_disjoint("an input", input, out);
  step.shape = {l.N, l.H, l.W, l.C, to.C, to.H, to.W, padding_h, padding_w, strides_of(l), strides_of(to)};
  step.input = memory(input) + l.pixel(0, 0);
  step.out = memory(out) + to.pixel(0, 0);
  step.weights = static_cast<const float*>(weight.const_data_ptr());
  return step;
}

Step Program::read_pooling() {
  Pool step{};
  read_kind(&step.pooling);
  const Buffer &input = read_buffer(), &out = read_buffer();
  set_window(read_window(), input.layout, out, &step.pooling);
  if (is_int8()) step.is_signed = read_is_signed();
  STD_TORCH_CHECK(step.pooling.is_max || !is_int8(), kRegion, ": in int8 poolings are maxima");
  check_disjoint("an input", input, out);
  step.pooling.input = view(input);
  step.images = input.layout.N;
  return step;
}

void Program::read_kind(Pooling* p) {
  p->is_max = read_between("a pooling's kind", 0, 1) == 1;
  p->counts_padding = read_between("what an average counts", 0, 1) == 1;
}

void Program::set_window(const Window& w, const Layout& l, const Buffer& out, Pooling* p) const {
  const Layout& to = out.layout;
  STD_TORCH_CHECK(l.N == to.N && l.C == to.C, kRegion, ": a pooling of ", text(l), " does not give ", text(to));
  STD_TORCH_CHECK(w.padding_h < w.R && w.padding_w < w.S && (to.H - 1) * w.stride_h - w.padding_h < l.H &&
                      (to.W - 1) * w.stride_w - w.padding_w < l.W,
                  kRegion, ": a window of ", w.R, "x", w.S, " over ", text(l), " lies outside of the map, for ",
                  text(to));
  const bool fits_padded =
      (to.H - 1) * w.stride_h + w.R <= l.H + 2 * w.padding_h && (to.W - 1) * w.stride_w + w.S <= l.W + 2 * w.padding_w;
  STD_TORCH_CHECK(!p->counts_padding || fits_padded, kRegion,
                  ": an average that counts padding must have its windows inside of it");
  p->out = view(out);
  p->blocks = l.blocks(), p->H = l.H, p->W = l.W, p->P = to.H, p->Q = to.W;
  p->R = w.R, p->S = w.S, p->stride_h = w.stride_h, p->stride_w = w.stride_w;
  p->padding_h = w.padding_h, p->padding_w = w.padding_w;
}

Step Program::read_copy() {
  const Buffer &from = read_buffer(), &to = read_buffer();
  const Layout &l = from.layout, &t = to.layout;
  Copying c{};
  c.channel = read_between("a channel", 0, t.C);
  c.stride_h = read_between("a stride", 1, kMost), c.stride_w = read_between("a stride", 1, kMost);
  c.factor_h = read_between("a factor", 1, kMost), c.factor_w = read_between("a factor", 1, kMost);
  c.zeroes = read_between("whether out is zeroed", 0, 1) == 1;
  STD_TORCH_CHECK(l.N == t.N && l.C <= t.C - c.channel && (t.H - 1) / c.factor_h * c.stride_h < l.H &&
                      (t.W - 1) / c.factor_w * c.stride_w < l.W,
                  kRegion, ": ", text(l), " from channel ", c.channel, " on, every ", c.stride_h, "x", c.stride_w,
                  " pixels ", c.factor_h, "x", c.factor_w, " times, does not fill ", text(t));
  check_disjoint("an input", from, to);
  return Copy{from, to, c};
}

Step Program::read_pooled_stem() {
  PooledStem step{};
  const Buffer& out = read_buffer();
  const Tensor& input = read_tensor("an input's number", tensors_.inputs);
  const auto size = [&](int64_t dim) { return input.dim() == 4 ? input.size(dim) : 0; };
  Layout& l = step.input;
  l.N = out.layout.N, l.H = size(2), l.lanes = lanes_of(kernel_.dtype);
  step.image = image_of(input, read_first_image("an input", input, size(1), size(3), l));
  STD_TORCH_CHECK(std::max({size(1), size(2), size(3)}) <= kMost, kRegion, ": an input's sides are at most ", kMost);
  const Unfolding& u = step.unfolding = read_unfolding();
  if (is_int8()) l.H = read_between("the lines of an unfolded map", 1, kMost);
  l.C = size(1) * u.taps * u.rows;
  STD_TORCH_CHECK(u.rows == 1 ? l.H == size(2) : l.C <= l.lanes, kRegion, ": ", u.rows, " rows of ", u.taps,
                  " taps of an input of ", size(1), " channels and ", size(2), " lines do not give ", l.H);
  l.W = Window::outputs(size(3) + 2 * u.padding - u.taps, u.stride);

  Convolution& c = step.convolution;
  c.activation = read_activation();
  const Tensor& weight = read_tensor("a weight's number", tensors_.weights);
  most_steps_ = steps_in(weight);
  c.images = 1;
  c.channels = out.layout.C;
  c.panels = (c.channels + kPanel - 1) / kPanel;
  const float* constants = is_int8() ? read_constants(c.panels) : nullptr;
  if (!is_int8()) c.bias = read_bias(c.panels);
  const Window w = read_dilated_window();
  l.halo = w.padding_w, l.pitch = l.W + l.halo;
  const Layout map{l.N, c.channels, w.outputs_h(l.H), w.outputs_w(l.W), 0, w.outputs_w(l.W), l.lanes};
  STD_TORCH_CHECK(std::min({l.C, l.W, map.H, map.W}) > 0, kRegion, ": ", u.taps, " taps and a window of ", w.R, "x",
                  w.S, " give nothing of ", text(l));

  read_kind(&step.pooling);
  const Window pool = read_window();
  set_window(pool, map, out, &step.pooling);
  step.lines = read_between("the lines of a band", 1, kMost);
  step.of_convolution = {w.R, w.stride_h, w.padding_h, w.dilation_h};
  step.of_pooling = {pool.R, pool.stride_h, pool.padding_h, 1};
  const Lines kept = step.of_pooling.needed({0, std::min(step.lines, out.layout.H)});
  step.convolved = {1, map.C, std::min(kept.count(), map.H), map.W, 0, map.pitch, l.lanes};
  step.read = {1, l.C, step.of_convolution.needed({0, step.convolved.H}).count(), l.W, l.halo, l.pitch, l.lanes};
  STD_TORCH_CHECK(fits(step.read, kMostBandBytes) && fits(step.convolved, kMostBandBytes), kRegion, ": a band of ",
                  step.lines, " lines is too large, with ", text(step.read), " and ", text(step.convolved));

  Segment& segment = c.segments[0];
  segment.stride_h = w.stride_h, segment.stride_w = w.stride_w;
  segment.blocks = step.read.used_blocks();
  set_offsets(step.read, w, &segment);
  segment.offsets = keep(&offsets_);
  c.steps = segment.steps;
  check_weights(weight, &c);
  if (is_int8()) {
    step.image.quantizer = read_quantizer();
    read_requantizing(constants, &c);
    step.is_signed = c.requantizing.low < 0.f;
    STD_TORCH_CHECK(step.pooling.is_max && l.C * w.R * w.S <= kMostProducts, kRegion,
                    ": in int8 poolings are maxima, and"
                    " sums of at most ",
                    kMostProducts, " products stay within int32, not of ", l.C * w.R * w.S);
  }
  return step;
}

}  // namespace blocked
}  // namespace fused_resnet
