// Gates, y = act(x * f(gate) + residual): one gate for each channel of an image, f a sigmoid. And norms,
// y = act(x * scale + shift), of a channel. No torch here.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/inline.h"
#include "cpu/blocked/convolution.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/requantizing.h"
#include "cpu/epilogue.h"
#include "cpu/vectors.h"

namespace fused_resnet {
namespace blocked {

enum class GateFunction : int32_t { kSigmoid = 0, kHardsigmoid = 1 };

struct Gating {
  Layout layout;                                   // of out
  View x, out, residual;                           // the residual's base may be null; x and residual may be out
  const char* gates = nullptr;                     // before f, of the first image
  int64_t gates_of_image = 0, gates_of_block = 0;  // bytes from one image's, and one block's, to the next
  GateFunction function = GateFunction::kSigmoid;
  Activation activation = Activation::kNone;  // in int8 none: the bounds are it
  float scale = 0.f;                          // in int8: of x over that of out
  Requantizing bytes;                         // in int8: the residual's factor, bounds and signs

  int64_t lines() const { return layout.N * layout.blocks() * layout.H; }
};

// *value = 1 / (1 + exp(-*value)), with one rounding for each operation and in one order, so that all instruction sets
// give the same bits (fused_resnet/operators/quantized.py). The exponential is that of silu.h. NaN stays.
template <int kLanes>
FUSED_RESNET_INLINE void sigmoid(typename Lanes<kLanes>::Vector* value) {
  using V = typename Lanes<kLanes>::Vector;
  using Bits = typename Lanes<kLanes>::Bits;
  constexpr float kLog2E = 1.44269504f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  constexpr float kLeast = -88.02969f, kMost = 88.72283f, kShift = 12582912.f;
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  V y = -*value;
  y = y < kLeast ? V{} + kLeast : y;
  y = y > kMost ? V{} + kMost : y;
  V shifted = V{} + kShift;
  multiply_add<kLanes>(y, V{} + kLog2E, &shifted);
  const V n = shifted - kShift;
  V r = y;
  multiply_add<kLanes>(n, V{} - kLog2High, &r);
  multiply_add<kLanes>(n, V{} - kLog2Low, &r);
  V p = V{} + 1.9875691500e-4f;
  for (const float term : kTerms) {
    V next = V{} + term;
    multiply_add<kLanes>(p, r, &next);
    p = next;
  }
  V exponential = r;
  multiply_add<kLanes>(p, r * r, &exponential);
  exponential += 1.f;
  const Bits exponent = (reinterpret_cast<Bits>(shifted) + 127) << 23;
  V below = V{} + 1.f;
  multiply_add<kLanes>(exponential, reinterpret_cast<V>(exponent), &below);
  *value = 1.f / below;
}

template <int kLanes>
FUSED_RESNET_INLINE void apply(GateFunction function, typename Lanes<kLanes>::Vector* value) {
  using V = typename Lanes<kLanes>::Vector;
  if (function == GateFunction::kSigmoid) return sigmoid<kLanes>(value);
  V y = V{} + 0.5f;
  multiply_add<kLanes>(*value, V{} + 1.f / 6.f, &y);
  y = y < 0.f ? V{} : y;
  *value = y > 1.f ? V{} + 1.f : y;
}

struct Norm {
  Layout layout;  // of out
  View x, out;    // x may be out
  const float *scale, *shift;
  Activation activation = Activation::kNone;  // in int8 none: the bounds are it
  Requantizing bytes;                         // in int8: bounds and x's sign

  int64_t lines() const { return layout.N * layout.blocks() * layout.H; }
};

// A line of one block, counted over the blocks of all images.
struct LineOfBlock {
  int64_t image, block, h;

  LineOfBlock(const Layout& l, int64_t index)
      : image(index / l.H / l.blocks()), block(index / l.H % l.blocks()), h(index % l.H) {}

  char* in(const View& view) const { return view.base + image * view.image + block * view.plane + h * view.line; }
};

// Of floats, T: lines [begin, end), counted over the blocks of all images.
template <int kLanes, class T>
FUSED_RESNET_INLINE void gate_lines(const Gating& s, int64_t begin, int64_t end) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int64_t kBlock = kPixelBytes / sizeof(T), kVectors = kBlock / kLanes;
  V gates[kVectors] = {};
  for (int64_t index = begin; index < end; ++index) {
    const LineOfBlock line(s.layout, index);
    if (index == begin || line.h == 0) {
      const char* from = s.gates + line.image * s.gates_of_image + line.block * s.gates_of_block;
      for (int64_t i = 0; i < kVectors; ++i) {
        load<kLanes>(reinterpret_cast<const T*>(from) + i * kLanes, &gates[i]);
        apply<kLanes>(s.function, &gates[i]);
      }
    }
    const char *x = line.in(s.x), *residual = s.residual.base == nullptr ? nullptr : line.in(s.residual);
    char* out = line.in(s.out);
    for (int64_t at = 0; at < s.layout.W * kPixelBytes; at += kPixelBytes) {
      const T* added = residual == nullptr ? nullptr : reinterpret_cast<const T*>(residual + at);
      const Epilogue<T> epilogue{nullptr, added, s.activation};
      for (int64_t i = 0; i < kVectors; ++i) {
        V value;
        load<kLanes>(reinterpret_cast<const T*>(x + at) + i * kLanes, &value);
        value *= gates[i];
        finish<kLanes>(value, epilogue, i * kLanes, kLanes, reinterpret_cast<T*>(out + at));
      }
    }
  }
}

// The same of norms.
template <int kLanes, class T>
FUSED_RESNET_INLINE void norm_lines(const Norm& s, int64_t begin, int64_t end) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int64_t kBlock = kPixelBytes / sizeof(T), kVectors = kBlock / kLanes;
  const Epilogue<T> epilogue{nullptr, nullptr, s.activation};
  for (int64_t index = begin; index < end; ++index) {
    const LineOfBlock line(s.layout, index);
    V scale[kVectors], shift[kVectors];
    for (int64_t i = 0; i < kVectors; ++i) {
      load<kLanes>(s.scale + line.block * kBlock + i * kLanes, &scale[i]);
      load<kLanes>(s.shift + line.block * kBlock + i * kLanes, &shift[i]);
    }
    const char* x = line.in(s.x);
    char* out = line.in(s.out);
    for (int64_t at = 0; at < s.layout.W * kPixelBytes; at += kPixelBytes) {
      for (int64_t i = 0; i < kVectors; ++i) {
        V value, y = shift[i];
        load<kLanes>(reinterpret_cast<const T*>(x + at) + i * kLanes, &value);
        multiply_add<kLanes>(value, scale[i], &y);
        finish<kLanes>(y, epilogue, i * kLanes, kLanes, reinterpret_cast<T*>(out + at));
      }
    }
  }
}

// From bytes to 32 bits and back. GCC 12 goes value by value there, so AVX-512 is told how, and others go by 16 bits.
template <int kLanes>
FUSED_RESNET_INLINE void widen(const typename Ints<kLanes>::Bytes& bytes, typename Ints<kLanes>::Vector* to) {
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    asm("vpmovzxbd %1, %0" : "=v"(*to) : "v"(bytes));
    return;
  }
#endif
  using Shorts = typename VectorOf<int16_t, 2 * kLanes>::Vector;
  *to = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), typename Ints<kLanes>::Vector);
}

template <int kLanes>
FUSED_RESNET_INLINE void narrow(const typename Ints<kLanes>::Vector& values, typename Ints<kLanes>::Bytes* to) {
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    asm("vpmovdb %1, %0" : "=v"(*to) : "v"(values));
    return;
  }
#endif
  using Shorts = typename VectorOf<int16_t, 2 * kLanes>::Vector;
  *to = __builtin_convertvector(__builtin_convertvector(values, Shorts), typename Ints<kLanes>::Bytes);
}

// In bytes: numbers as floats, and floats within the bounds as the bytes nearest to them, half to even.
template <int kLanes>
FUSED_RESNET_INLINE void load_bytes(const char* from, int32_t flip, typename Lanes<kLanes>::Vector* to) {
  using I = typename Ints<kLanes>::Vector;
  const typename Ints<kLanes>::Bytes bytes = *reinterpret_cast<const typename Ints<kLanes>::UnalignedBytes*>(from);
  I wide;
  widen<kLanes>(bytes, &wide);
  *to = __builtin_convertvector((wide ^ flip) - flip, typename Lanes<kLanes>::Vector);
}

template <int kLanes>
FUSED_RESNET_INLINE void store_bytes(const Requantizing& r, typename Lanes<kLanes>::Vector y, char* to) {
  constexpr float kShift = 12582912.f;  // as in Quantizer
  y = y > r.low ? y : typename Lanes<kLanes>::Vector{} + r.low;
  y = y < r.high ? y : typename Lanes<kLanes>::Vector{} + r.high;
  const auto shifted = reinterpret_cast<typename Ints<kLanes>::Vector>(y + kShift);
  typename Ints<kLanes>::Bytes bytes;
  narrow<kLanes>(shifted, &bytes);
  *reinterpret_cast<typename Ints<kLanes>::UnalignedBytes*>(to) = bytes;
}

// Of bytes, q = rint(min(max(fma(skip, R, float(x) * (f(gate) * scale)), low), high)); their gates are fp32.
template <int kLanes>
FUSED_RESNET_INLINE void gate_bytes(const Gating& s, int64_t begin, int64_t end) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int64_t kVectors = kPixelBytes / kLanes;
  const int32_t flip = s.bytes.is_input_signed ? 0x80 : 0, residual_flip = s.bytes.is_residual_signed ? 0x80 : 0;
  const V factor = V{} + s.bytes.residual;
  V gates[kVectors] = {};
  for (int64_t index = begin; index < end; ++index) {
    const LineOfBlock line(s.layout, index);
    if (index == begin || line.h == 0) {
      const char* from = s.gates + line.image * s.gates_of_image + line.block * s.gates_of_block;
      for (int64_t i = 0; i < kVectors; ++i) {
        load<kLanes>(reinterpret_cast<const float*>(from) + i * kLanes, &gates[i]);
        apply<kLanes>(s.function, &gates[i]);
        gates[i] *= s.scale;
      }
    }
    const char *x = line.in(s.x), *residual = s.residual.base == nullptr ? nullptr : line.in(s.residual);
    char* out = line.in(s.out);
    for (int64_t at = 0; at < s.layout.W * kPixelBytes; at += kPixelBytes) {
      for (int64_t i = 0; i < kVectors; ++i) {
        V y, skip;
        load_bytes<kLanes>(x + at + i * kLanes, flip, &y);
        y *= gates[i];
        if (residual != nullptr) {
          load_bytes<kLanes>(residual + at + i * kLanes, residual_flip, &skip);
          multiply_add<kLanes>(skip, factor, &y);
        }
        store_bytes<kLanes>(s.bytes, y, out + at + i * kLanes);
      }
    }
  }
}

// Of bytes, q = rint(min(max(fma(float(x), M, B), low), high)).
template <int kLanes>
FUSED_RESNET_INLINE void norm_bytes(const Norm& s, int64_t begin, int64_t end) {
  using V = typename Lanes<kLanes>::Vector;
  constexpr int64_t kVectors = kPixelBytes / kLanes;
  const int32_t flip = s.bytes.is_input_signed ? 0x80 : 0;
  for (int64_t index = begin; index < end; ++index) {
    const LineOfBlock line(s.layout, index);
    V scale[kVectors], shift[kVectors];
    for (int64_t i = 0; i < kVectors; ++i) {
      load<kLanes>(s.scale + line.block * kPixelBytes + i * kLanes, &scale[i]);
      load<kLanes>(s.shift + line.block * kPixelBytes + i * kLanes, &shift[i]);
    }
    const char* x = line.in(s.x);
    char* out = line.in(s.out);
    for (int64_t at = 0; at < s.layout.W * kPixelBytes; at += kPixelBytes) {
      for (int64_t i = 0; i < kVectors; ++i) {
        V value, y = shift[i];
        load_bytes<kLanes>(x + at + i * kLanes, flip, &value);
        multiply_add<kLanes>(value, scale[i], &y);
        store_bytes<kLanes>(s.bytes, y, out + at + i * kLanes);
      }
    }
  }
}

// The same lines compiled for each instruction set. T: float, BFloat16, or uint8_t of either kind of bytes.
template <int kLanes, class T, class One>
FUSED_RESNET_INLINE void run_lines(const One& s, int64_t begin, int64_t end) {
  constexpr bool is_gate = std::is_same<One, Gating>::value, are_bytes = sizeof(T) == 1;
  if constexpr (is_gate && are_bytes) gate_bytes<kLanes>(s, begin, end);
  if constexpr (is_gate && !are_bytes) gate_lines<kLanes, T>(s, begin, end);
  if constexpr (!is_gate && are_bytes) norm_bytes<kLanes>(s, begin, end);
  if constexpr (!is_gate && !are_bytes) norm_lines<kLanes, T>(s, begin, end);
}

template <class T, class One>
void run_lines_anywhere(const One& s, int64_t begin, int64_t end) {
  run_lines<4, T>(s, begin, end);
}

template <class T, class One>
FUSED_RESNET_AVX2 void run_lines_avx2(const One& s, int64_t begin, int64_t end) {
  run_lines<8, T>(s, begin, end);
}

template <class T, class One>
FUSED_RESNET_AVX512 void run_lines_avx512(const One& s, int64_t begin, int64_t end) {
  run_lines<16, T>(s, begin, end);
}

}  // namespace blocked
}  // namespace fused_resnet
