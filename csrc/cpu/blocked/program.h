// What cpu_region runs, read from integers and checked: a program must not become a wrong memory access.
//
//   program = version, dtype, number of buffers, buffers, steps                  0 fp32, 2 bf16, 3 int8
//   buffer  = N, C, H, W, halo, pitch, offset in the workspace in bytes
//   step    = 0, input tensor, first image, buffer, taps, stride, padding        an input, unfolded along its lines
//           | 1, buffer, output tensor, first image                              to NHWC
//           | 2, buffer                                                          zeros into the halo
//           | 3, out, residual or -1, activation, splits channels, weight, bias or -1, number of segments, segments
//           | 4, is a maximum, counts padding, in, out, window                   pooling
//           | 5, in, out, window, dilation                                       the phases that the window meets
//           | 6, in, out, adds to what out holds, activation, weight, bias or -1, height and width of the padding
//                                                                                3x3 by Winograd's F(4x4, 3x3)
//           | 7, in, output tensor, first image, scale / pixels, is signed       int8: the mean of each map, in fp32
//           | 8, out, input tensor, first image, taps, stride, padding, activation, weight, bias or -1, window,
//             dilation, is a maximum, counts padding, window, lines of a band    an input's convolution and pooling
//           | 9, in, output tensor, first image, weight, constants               int8: a linear layer of means, in fp32
//           | 10, in, out, first channel, height and width of the stride and of the factor, zeroes out
//                                                                                pixels copied, see copying.h
//           | 11, out, x, gate, residual or -1, function, activation             y = act(x * f(gate) + residual)
//           | 12, in, vector, scale / pixels, is signed                          int8: as 7, within the region
//           | 13, channels in and out, vectors in and out, 256 / scale, is signed, activation, weight, constants
//                                                                                int8: a linear layer of vectors
//           | 14, out, x, activation, constants                                  y = act(x * scale + shift)
//   segment = in, channels of the map that `in` has the phases of or 0, window, dilation, groups
//   window  = R, S, and height and width of the stride and of the padding
//
// In int8 there are no steps of Winograd, poolings are maxima, and some steps say more. An unfolding says rows and
// padding of the height after its padding, in step 8 also the lines of the map. At their end an input says 1 / scale
// and whether its bytes are signed, an output scale and the same, a pooling the same alone, and step 8 what an input
// and a convolution say. A convolution has one segment and no activation, its bias are the constants of `Requantizing`,
// and at its end stand R, low, high, whether what they bound surely fits int32, whether its input is signed, and
// whether its residual is. A gate is a vector there, has no activation, and says at its end the scale of x over that of
// out, R, low, high, whether x is signed and whether its residual is. A norm has none either, and says R, low, high and
// whether x is signed. A vector is a buffer (N, 4 C, 1, 1) of fp32, C a multiple of 64; a norm's constants are two.
// Numbers that are no integers are the bits of their fp32.
//
// fused_resnet/regions/program.py writes it.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <variant>
#include <vector>

#include "common/checks.h"
#include "cpu/blocked/bands.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/copying.h"
#include "cpu/blocked/gating.h"
#include "cpu/blocked/kernels.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/linear.h"
#include "cpu/blocked/pooling.h"
#include "cpu/blocked/reading.h"
#include "cpu/winograd.h"

namespace fused_resnet {
namespace blocked {

constexpr const char* kRegion = "cpu_region";
constexpr int64_t kProgramVersion = 6;

struct Buffer {
  Layout layout;
  int64_t offset;
};

struct ReadInput {
  Image image;
  Buffer buffer;
  Unfolding unfolding;
};
struct ToNhwc {
  Buffer buffer;
  char* output;
  float scale;  // in int8
  bool is_signed;
};
struct ToMeans {
  Averaging averaging;
  bool is_signed;
};
struct ZeroHalo {
  Buffer buffer;
};
struct Convolve {
  Convolution convolution;
  bool splits_channels;
};
struct Pool {
  Pooling pooling;
  int64_t images;
  bool is_signed;  // in int8
};
struct SplitPhases {
  Buffer from, to;
  Phases phases;
};
struct Copy {
  Buffer from, to;
  Copying copying;
};
struct ByWinograd {
  winograd::Shape shape;
  const char* input;
  const float *weights, *bias;
  char* out;
  bool adds_out;
  Activation activation;
};
using Step = std::variant<ReadInput, ToNhwc, ZeroHalo, Convolve, Pool, SplitPhases, ByWinograd, ToMeans, PooledStem,
                          LinearOfMeans, Copy, Gating, LinearOfVectors, Norm>;

struct RegionTensors {
  const std::vector<Tensor>&inputs, &weights, &biases;
  Tensor workspace;
  const std::vector<Tensor>& outputs;
};

// What a program is for; throws where it is none, or of another version.
Dtype dtype_of(const Tensor& program);

// Reads a program and checks all of it. What its steps point to lives as long as it does. They are kept, not read again
// between convolutions: code and numbers that convolutions have moved out of the caches would be fetched each time.
class Program {
 public:
  Program(const Tensor& program, const RegionTensors& tensors, const MicroKernel& kernel);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const std::deque<Step>& steps() const { return steps_; }
  char* memory(const Buffer& buffer) const { return workspace_ + buffer.offset; }

 private:
  struct Window {
    int64_t R, S, stride_h, stride_w, padding_h, padding_w, dilation_h = 1, dilation_w = 1;

    // Outputs along a side, 0 where the window does not fit.
    int64_t outputs_h(int64_t H) const { return outputs(H + 2 * padding_h - dilation_h * (R - 1) - 1, stride_h); }
    int64_t outputs_w(int64_t W) const { return outputs(W + 2 * padding_w - dilation_w * (S - 1) - 1, stride_w); }
    static int64_t outputs(int64_t room, int64_t stride) { return room < 0 ? 0 : room / stride + 1; }
    Phases phases() const {
      return {{R, stride_h, padding_h, dilation_h}, {S, stride_w, padding_w, dilation_w}, stride_h, stride_w};
    }
  };

  Step read_step();
  int64_t read();
  int64_t read_between(const char* what, int64_t least, int64_t most);
  float read_fp32(const char* what);
  bool read_is_signed() { return read_between("whether bytes are signed", 0, 1) == 1; }
  const Buffer& read_buffer();
  const Tensor& read_tensor(const char* what, const std::vector<Tensor>& tensors);
  Window read_window();
  Window read_dilated_window();
  Step read_input();
  Unfolding read_unfolding();
  Quantizer read_quantizer();
  Step read_phases();
  Step read_winograd();
  Step read_pooled_stem();
  Step read_copy();
  Activation read_activation();
  const float* read_bias(int64_t panels);
  const float* read_constants(int64_t panels);
  void read_buffers();
  Buffer read_new_buffer();
  Step read_convolution();
  Step read_means();
  Step read_linear();
  Step read_gate();
  Step read_norm();
  void check_map(const char* what, const Buffer& map, const Buffer& out) const;
  Step read_means_within();
  Step read_linear_of_vectors();
  Buffer read_vector(const char* what, int64_t C);
  void set_linear(int64_t N, int64_t C, int64_t K, Linear* linear);
  void read_bounds(Requantizing* r);
  void read_requantizing(const float* constants, Convolution* c);
  Step read_pooling();
  void read_kind(Pooling* p);
  void set_window(const Window& w, const Layout& l, const Buffer& out, Pooling* p) const;
  int64_t read_segment(const Buffer& out, Segment* segment, bool* runs_on);
  int64_t read_phased(const Window& w, const Buffer& input, int64_t channels, const Buffer& out, Segment* segment,
                      bool* runs_on);
  int64_t set_groups(int64_t in, int64_t out, int64_t channels);
  void set_steps(const Window& w, Segment* segment);
  void set_offsets(const Layout& l, const Window& w, Segment* segment);
  void read_residual(const Buffer& out, Convolution* c, bool* runs_on);
  bool passes_panels(const Convolution& c) const;
  void set_next();
  const int64_t* keep(std::vector<int64_t>* numbers);
  void set_chunk(Convolution* c) const;
  void check_weights(const Tensor& weight, Convolution* c) const;
  void check_disjoint(const char* what, const Buffer& a, const Buffer& out) const;
  int64_t read_first_image(const char* what, const Tensor& tensor, int64_t C, int64_t W, const Layout& l);
  Step read_output();
  void check_output_dtype(const Tensor& output) const;
  bool is_int8() const { return kernel_.dtype == kInt8; }
  View view(const Buffer& buffer) const { return View(buffer.layout, memory(buffer)); }

  const int64_t *at_, *end_;
  const RegionTensors& tensors_;
  const MicroKernel& kernel_;
  char* workspace_;
  int64_t workspace_bytes_;
  std::vector<Buffer> buffers_;
  int64_t most_steps_ = 0;
  std::vector<int64_t> offsets_, first_blocks_;  // of the convolution that is being read
  std::deque<std::vector<int64_t>> kept_;        // the same of those before
  std::deque<Step> steps_;
};

}  // namespace blocked
}  // namespace fused_resnet
