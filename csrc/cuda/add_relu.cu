// Launchers of the addition and its gradient.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/add_relu.cuh"
#include "cuda/launchers.h"

namespace fused_resnet {
namespace {

// Enough blocks to fill the largest devices several times over; the loop takes what is left.
constexpr int64_t kMaxBlocks = 1 << 14;

template <class Op, class Element>
void launch(const void* a, const void* b, void* out, int64_t numel, cudaStream_t stream) {
  const int64_t chunks = (numel + Packed<Element>::kCount - 1) / Packed<Element>::kCount;
  const int64_t blocks = std::min((chunks + kPointwiseThreads - 1) / kPointwiseThreads, kMaxBlocks);
  pointwise_kernel<Element, Op><<<static_cast<unsigned>(blocks), kPointwiseThreads, 0, stream>>>(
      static_cast<const Element*>(a), static_cast<const Element*>(b), static_cast<Element*>(out), numel);
}

template <class Op>
void launch_any(const char* name, const void* a, const void* b, void* out, int64_t numel, Dtype dtype, void* stream) {
  if (numel == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kFloat32:
      launch<Op, float>(a, b, out, numel, cuda_stream);
      break;
    case Dtype::kFloat16:
      launch<Op, Half>(a, b, out, numel, cuda_stream);
      break;
    case Dtype::kBFloat16:
      launch<Op, BFloat16>(a, b, out, numel, cuda_stream);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
  }
}

}  // namespace

void launch_add_relu(const void* a, const void* b, void* out, int64_t numel, Dtype dtype, void* stream) {
  launch_any<AddRelu>("cuda_add_relu", a, b, out, numel, dtype, stream);
}

void launch_add_relu_backward(const void* grad, const void* out, void* grad_input, int64_t numel, Dtype dtype,
                              void* stream) {
  launch_any<AddReluBackward>("cuda_add_relu_backward", grad, out, grad_input, numel, dtype, stream);
}

}  // namespace fused_resnet
