// What both libraries need around their kernels: the digest of the schemas they implement, and second-line checks.
// The first line is in Python; here a wrong call must not become a wrong memory access. Every text has the values.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// Read from the file by fused_resnet.kernels.compiled before the library is loaded.
#define FUSED_RESNET_EMBED_DIGEST(library)                                                          \
  extern "C" __attribute__((used, visibility("default"))) const char fused_resnet_schema_digest[] = \
      "fused_resnet schemas of " library ": " FUSED_RESNET_SCHEMA_DIGEST;

namespace fused_resnet {

using torch::stable::Tensor;

// (2, 3) for people.
template <class Numbers>
std::string in_parentheses(const Numbers& numbers) {
  std::string text;
  for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "(" + text + ")";
}

inline std::string shape_text(const Tensor& t) {
  return in_parentheses(t.sizes());
}

inline std::string layout_text(const Tensor& t) {
  return shape_text(t) + " with strides " + in_parentheses(t.strides());
}

inline std::string dtype_text(const Tensor& t) {
  return torch::headeronly::toString(t.scalar_type());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// Same shape and memory order; strides of dimensions of size 1 mean nothing.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (!same_sizes(a, b)) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// Whether the elements fill one block of memory, each once, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) > 1) dimensions.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// NHWC in memory (KRSC for a weight), densely.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (t.size(i) > 1 && t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

// Three tensors that can be walked together in memory order.
inline void check_pointwise(const char* op, const Tensor& a, const Tensor& b, const Tensor& out) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() == out.scalar_type(), op,
                  ": the tensors must have one dtype, not ", dtype_text(a), ", ", dtype_text(b), " and ",
                  dtype_text(out));
  STD_TORCH_CHECK(a.numel() == 0 || (same_layout(a, b) && same_layout(a, out)), op,
                  ": the tensors must have one shape and one layout, not ", layout_text(a), ", ", layout_text(b),
                  " and ", layout_text(out));
  STD_TORCH_CHECK(a.numel() == 0 || is_dense(a), op, ": the tensors must be dense, not ", layout_text(a));
}

inline void check_channels_last(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_channels_last(t), op, ": ", name, " must be channels_last in memory, not ", layout_text(t));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& expected) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op, ": ", name,
                  " must have the shape ", in_parentheses(expected), ", not ", shape_text(t));
}

inline void check_pair(const char* op, const char* name, const std::vector<int64_t>& values) {
  STD_TORCH_CHECK(values.size() == 2, op, ": ", name, " must have 2 values, not ", values.size());
}

}  // namespace fused_resnet
