// What the CPU's operators share: portions of work, scratch memory, and checks of the convolutions' operands.
#pragma once

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/activation.h"
#include "common/checks.h"
#include "common/dtype.h"
#include "cpu/epilogue.h"

namespace fused_resnet {

// As many elements as ATen gives a thread at least (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainSize = 32768;

// A thread's scratch, kept from call to call: it only grows, as far as the largest call needs.
inline float* scratch(const char* op, int64_t floats) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    size = memory == nullptr ? 0 : floats;
    STD_TORCH_CHECK(memory != nullptr, op, ": no memory for ", bytes, " bytes of scratch");
  }
  return memory.get();
}

inline void check_float(const char* op, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name, " must be float32, not ",
                  dtype_text(t));
}

// Bounded, the padding cannot overflow an extent. A window of x reaches over other windows' outputs: x must not be out.
inline void check_input(const char* op, const Tensor& x, const std::vector<int64_t>& padding, const Tensor& out) {
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), op, ": x and out must have one dtype, not ", dtype_text(x),
                  " and ", dtype_text(out));
  check_channels_last(op, "x", x);
  check_channels_last(op, "out", out);
  const char *from = static_cast<const char*>(x.const_data_ptr()), *to = static_cast<const char*>(out.const_data_ptr());
  const int64_t bytes = x.numel() * x.element_size(), out_bytes = out.numel() * out.element_size();
  STD_TORCH_CHECK(bytes == 0 || out_bytes == 0 || from + bytes <= to || to + out_bytes <= from, op,
                  ": out must not be x, or share memory with it");
  check_pair(op, "padding", padding);
  for (const int64_t side : padding) {
    STD_TORCH_CHECK(side >= 0 && side <= INT32_MAX, op, ": padding must be at least 0 and below 2^31, not ", side);
  }
}

inline void check_epilogue(const char* op, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                           const Tensor& out) {
  if (bias.has_value()) {
    check_float(op, *bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out.size(1) && bias->is_contiguous(), op,
                    ": bias must be a contiguous vector with one value for each of ", out.size(1),
                    " output channels, not ", layout_text(*bias));
  }
  if (residual.has_value()) {
    STD_TORCH_CHECK(
        residual->scalar_type() == out.scalar_type() && same_sizes(*residual, out) && is_channels_last(*residual), op,
        ": residual must have out's shape and dtype, in channels_last: ", shape_text(out), " of ", dtype_text(out),
        ", not ", layout_text(*residual), " of ", dtype_text(*residual));
  }
}

template <class T>
Epilogue<T> epilogue_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                        Activation activation) {
  return {bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
          residual.has_value() ? static_cast<const T*>(residual->const_data_ptr()) : nullptr, activation};
}

// Calls run(epilogue) with the epilogue of out's element type, after checking its operands. residual may be out.
template <class Run>
void with_epilogue(const char* op, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   const std::string& activation, const Tensor& out, const Run& run) {
  const Activation parsed = parse_activation(op, activation, Activation::kSilu);
  check_epilogue(op, bias, residual, out);
  if (out.size(0) == 0) return;
  switch (out.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return run(epilogue_of<float>(bias, residual, parsed));
    case torch::headeronly::ScalarType::BFloat16:
      return run(epilogue_of<BFloat16>(bias, residual, parsed));
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32 or bfloat16, not ", dtype_text(out));
  }
}

}  // namespace fused_resnet
