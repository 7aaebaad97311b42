// out[i] = max(a[i] + b[i], 0) and its gradient grad[i] * (out[i] > 0), over the elements in memory order.
#pragma once

#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"

namespace fused_resnet {

// The sum is rounded to Element before it is compared, as torch.relu(a + b) does.
struct AddRelu {
  template <class Element>
  FUSED_RESNET_HD static Element apply(Element a, Element b) {
    const auto sum = static_cast<Element>(static_cast<float>(a) + static_cast<float>(b));
    return static_cast<Element>(relu(static_cast<float>(sum)));
  }
};

// NaN in out: torch's threshold_backward lets the gradient through, since NaN <= 0 is false.
struct AddReluBackward {
  template <class Element>
  FUSED_RESNET_HD static Element apply(Element grad, Element out) {
    return static_cast<float>(out) <= 0.0f ? static_cast<Element>(0.0f) : grad;
  }
};

// Elements before the first 16-byte boundary that `a`, `b` and `out` share; numel if they share none.
template <class Element>
FUSED_RESNET_HD int64_t num_head_elements(const void* a, const void* b, const void* out, int64_t numel) {
  const uintptr_t misalignment = reinterpret_cast<uintptr_t>(a) % 16;
  if (reinterpret_cast<uintptr_t>(b) % 16 != misalignment || reinterpret_cast<uintptr_t>(out) % 16 != misalignment) {
    return numel;
  }
  const int64_t head = static_cast<int64_t>((16 - misalignment) % 16 / sizeof(Element));
  return head < numel ? head : numel;
}

constexpr int kPointwiseThreads = 256;

// Grid-stride loop over 16-byte chunks; the head and tail, or everything if the pointers cannot be aligned together,
// one element at a time. Neighbouring threads touch neighbouring addresses in both loops.
template <class Element, class Op>
__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_kernel(const Element* a, const Element* b, Element* out, int64_t numel) {
  constexpr int kCount = Packed<Element>::kCount;
  const int64_t first = block_index() * threads_per_block() + thread_index();
  const int64_t num_threads = num_grid_blocks() * threads_per_block();
  const int64_t head = num_head_elements<Element>(a, b, out, numel);
  const int64_t num_chunks = (numel - head) / kCount;
  const Chunk* a_chunks = reinterpret_cast<const Chunk*>(a + head);
  const Chunk* b_chunks = reinterpret_cast<const Chunk*>(b + head);
  Chunk* out_chunks = reinterpret_cast<Chunk*>(out + head);
  for (int64_t i = first; i < num_chunks; i += num_threads) {
    Packed<Element> from_a, from_b, result;
    from_a.chunk = a_chunks[i];
    from_b.chunk = b_chunks[i];
#pragma unroll
    for (int e = 0; e < kCount; ++e) result.elements[e] = Op::apply(from_a.elements[e], from_b.elements[e]);
    out_chunks[i] = result.chunk;
  }
  const int64_t num_vector_elements = num_chunks * kCount;
  for (int64_t i = first; i < numel - num_vector_elements; i += num_threads) {
    const int64_t at = i < head ? i : i + num_vector_elements;
    out[at] = Op::apply(a[at], b[at]);
  }
}

}  // namespace fused_resnet
