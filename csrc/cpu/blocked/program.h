// What cpu_region runs, read from integers and checked: a program must not become a wrong memory access.
//
//   program = version, number of buffers, buffers, steps
//   buffer  = N, C, H, W, halo, pitch, offset in the workspace in bytes
//   step    = 0, input tensor, buffer                                            from NHWC
//           | 1, buffer, output tensor                                           to NHWC
//           | 2, buffer                                                          zeros into the halo
//           | 3, out, residual or -1, activation, splits channels, weight, bias or -1, number of segments, segments
//           | 4, is a maximum, counts padding, in, out, window                   pooling
//   segment = in, window, dilation
//   window  = R, S, and height and width of the stride and of the padding
//
// fused_resnet/regions/program.py writes it.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "common/checks.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/kernels.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/pooling.h"

namespace fused_resnet {
namespace blocked {

constexpr const char* kRegion = "cpu_region";
constexpr int64_t kProgramVersion = 1;

struct Buffer {
  Layout layout;
  int64_t offset;
};

struct FromNhwc {
  const char* input;
  Buffer buffer;
};
struct ToNhwc {
  Buffer buffer;
  char* output;
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
};
using Step = std::variant<FromNhwc, ToNhwc, ZeroHalo, Convolve, Pool>;

struct RegionTensors {
  const std::vector<Tensor>&inputs, &weights, &biases;
  Tensor workspace;
  const std::vector<Tensor>& outputs;
};

// Reads a program step by step. What a step points to lives until the next step is read.
class Program {
 public:
  Program(const Tensor& program, const RegionTensors& tensors, const MicroKernel& kernel);

  void rewind() { at_ = first_step_; }
  bool has_more() const { return at_ != end_; }
  Step next();
  char* memory(const Buffer& buffer) const { return workspace_ + buffer.offset; }

 private:
  struct Window {
    int64_t R, S, stride_h, stride_w, padding_h, padding_w;
  };

  int64_t read();
  int64_t read_between(const char* what, int64_t least, int64_t most);
  const Buffer& read_buffer();
  const Tensor& read_tensor(const char* what, const std::vector<Tensor>& tensors);
  Window read_window();
  void read_buffers();
  Buffer read_new_buffer();
  Step read_convolution();
  Step read_pooling();
  int64_t read_segment(const Buffer& out, Segment* segment, bool* runs_on);
  void read_residual(const Buffer& out, Convolution* c, bool* runs_on);
  void check_weights(const Tensor& weight, int64_t bias, Convolution* c) const;
  void check_disjoint(const char* what, const Buffer& a, const Buffer& out) const;
  void check_nhwc(const char* what, const Tensor& tensor, const Buffer& buffer) const;
  View view(const Buffer& buffer) const { return View(buffer.layout, memory(buffer)); }

  const int64_t *at_, *end_, *first_step_;
  const RegionTensors& tensors_;
  const MicroKernel& kernel_;
  char* workspace_;
  int64_t workspace_bytes_;
  std::vector<Buffer> buffers_;
  std::vector<int64_t> offsets_;  // of the convolution that was read last
};

}  // namespace blocked
}  // namespace fused_resnet
