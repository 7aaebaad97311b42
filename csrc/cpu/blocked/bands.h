// A region's first convolution and the pooling of its result, in bands: some lines of the pooling's output at a time.
// What they need of the two maps before lies in a thread's scratch, and never leaves a cache. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/blocked/convolution.h"
#include "cpu/blocked/kernels.h"
#include "cpu/blocked/layout.h"
#include "cpu/blocked/pooling.h"
#include "cpu/blocked/reading.h"

namespace fused_resnet {
namespace blocked {

// Lines [begin, end) of a map, which may lie outside of it.
struct Lines {
  int64_t begin = 0, end = 0;

  int64_t count() const { return std::max<int64_t>(end - begin, 0); }
  Lines within(int64_t H) const { return {std::max<int64_t>(begin, 0), std::min(end, H)}; }
};

// A window along a map's height.
struct Height {
  int64_t taps, stride, padding, dilation;

  Lines needed(const Lines& outputs) const {
    return {outputs.begin * stride - padding, (outputs.end - 1) * stride - padding + (taps - 1) * dilation + 1};
  }
};

struct PooledStem {
  Image image;
  Unfolding unfolding;
  Layout input;             // the unfolded map, whole: it is nowhere
  Layout read, convolved;   // of one image, as many lines as a band needs of either map
  Convolution convolution;  // without its memory and its tiling
  Pooling pooling;          // without its input
  Height of_convolution, of_pooling;
  int64_t lines;           // of a band
  bool is_signed = false;  // in int8

  int64_t line_bytes() const { return image.C * image.W * static_cast<int64_t>(sizeof(float)) + kPixelBytes; }
  int64_t scratch_bytes() const { return read.bytes() + convolved.bytes() + line_bytes(); }
};

// The lines of a map that a band needs. Those that the next band needs, too, move to the begin of the memory.
class Kept {
 public:
  Kept(const Layout& layout, char* memory) : layout_(layout), memory_(memory) {}

  void forget() { lines_ = {}; }

  // Makes room for these lines. Returns those that are not there yet.
  Lines move_to(const Lines& wanted) {
    const int64_t kept = std::clamp<int64_t>(lines_.end - wanted.begin, 0, lines_.count());
    if (kept > 0 && wanted.begin != lines_.begin) {
      const int64_t bytes = ((kept - 1) * layout_.pitch + layout_.W) * kPixelBytes;
      for (int64_t block = 0; block < layout_.blocks(); ++block) {
        std::memmove(at(block, 0), at(block, wanted.begin - lines_.begin), bytes);
      }
    }
    lines_ = wanted;
    return {wanted.begin + kept, wanted.end};
  }

  void zero(const Lines& lines) {
    for (int64_t block = 0; block < layout_.blocks(); ++block) {
      for (int64_t h = lines.begin; h < lines.end; ++h) {
        std::memset(at(block, h - lines_.begin), 0, layout_.W * kPixelBytes);
      }
    }
  }

  // As if the whole map were there.
  View view() const {
    View view(layout_, memory_);
    view.image = 0;
    view.base -= lines_.begin * view.line;
    return view;
  }

 private:
  char* at(int64_t block, int64_t line) const { return memory_ + layout_.at(0, block, line, 0); }

  const Layout& layout_;
  char* memory_;
  Lines lines_;
};

// What one thread computes of a stem, image by image.
class BandsOfStem {
 public:
  using Read = void (*)(const Layout&, const Unfolding&, const Image&, int64_t, int64_t, char*, const View&);
  using Pool = void (*)(const Pooling&, int64_t, int64_t);

  // memory: scratch_bytes() of it, from a multiple of 64 on.
  BandsOfStem(const PooledStem& stem, const MicroKernel& kernel, Read read, Pool pool, char* memory)
      : stem_(stem),
        kernel_(kernel),
        read_(read),
        pool_(pool),
        input_(stem.read, memory),
        convolved_(stem.convolved, memory + stem.read.bytes()),
        line_(memory + stem.read.bytes() + stem.convolved.bytes()) {
    zero_halo(stem.read, 0, stem.read.blocks(), memory);
  }

  // These lines of the pooling's output. The first band makes all that it needs, also what another thread makes.
  void run(int64_t image, const Lines& lines) {
    input_.forget();
    convolved_.forget();
    for (int64_t begin = lines.begin; begin < lines.end; begin += stem_.lines) {
      run_band(image, {begin, std::min(begin + stem_.lines, lines.end)});
    }
  }

 private:
  void run_band(int64_t image, const Lines& band) {
    const Lines missing = convolved_.move_to(stem_.of_pooling.needed(band).within(stem_.pooling.H));
    if (missing.count() > 0) {
      read(image, input_.move_to(stem_.of_convolution.needed(missing)));
      convolve(missing, band);
    }
    Pooling pooling = stem_.pooling;
    pooling.input = convolved_.view();
    for (int64_t block = 0; block < pooling.blocks; ++block) {
      const int64_t first = (image * pooling.blocks + block) * pooling.P;
      pool_(pooling, first + band.begin, first + band.end);
    }
  }

  void read(int64_t image, const Lines& lines) {
    const int64_t H = stem_.input.H;
    const Lines inside = lines.within(H);
    input_.zero({lines.begin, std::min<int64_t>(lines.end, 0)});
    input_.zero({std::max(lines.begin, H), lines.end});
    if (inside.count() == 0) return;
    View to = input_.view();
    read_(stem_.input, stem_.unfolding, stem_.image, image * H + inside.begin, image * H + inside.end, line_, to);
  }

  void convolve(const Lines& lines, const Lines& band) {
    Convolution c = stem_.convolution;
    Segment& segment = c.segments[0];
    c.tiling = Tiling(lines.count(), stem_.convolved.W, stem_.convolved.pitch, false, kernel_.max_rows);
    c.out = convolved_.view();
    c.out.base += lines.begin * c.out.line;
    segment.input = input_.view();
    segment.input.base += lines.begin * segment.stride_h * segment.input.line;
    const int64_t begin = ahead(band.begin);
    c.next_weights += begin;
    c.next_bytes = ahead(band.end) - begin;
    kernel_.run(c, {0, (c.tiles() + kernel_.tiles - 1) / kernel_.tiles, 0, c.panels});
  }

  // The next weights are fetched a part with each band.
  int64_t ahead(int64_t line) const {
    return stem_.convolution.next_bytes / kPixelBytes * line / stem_.pooling.P * kPixelBytes;
  }

  const PooledStem& stem_;
  const MicroKernel& kernel_;
  Read read_;
  Pool pool_;
  Kept input_, convolved_;
  char* line_;
};

}  // namespace blocked
}  // namespace fused_resnet
