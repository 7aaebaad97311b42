// A whole convolution by Winograd's F(4x4, 3x3), its blocks shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cpu/denormals.h"
#include "cpu/dispatch.h"
#include "cpu/operator.h"
#include "cpu/winograd.h"

namespace fused_resnet {
namespace winograd {

template <class T>
void run(const char* op, const Shape& s, const T* x, const float* weight, const Epilogue<T>& epilogue, T* out) {
  using RunBlock = void (*)(const Shape&, const T*, const float*, const Epilogue<T>&, const Block&, float*, T*);
  static const auto run_block = best_of<RunBlock>(run_block_anywhere<T>, run_block_avx2<T>, run_block_avx512<T>);
  if (s.tiles() == 0) return;
  const Blocks blocks(s, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    FlushDenormals flush;
    for (int64_t index = begin; index < end; ++index) {
      float* own = scratch(op, scratch_floats(s, blocks.tiles, blocks.columns));
      run_block(s, x, weight, epilogue, blocks.at(s, index), own, out);
    }
  });
}

}  // namespace winograd
}  // namespace fused_resnet
