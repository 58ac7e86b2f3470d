// The left operand of a convolution: its rows are the pixels of the result, its depth what a pixel sees through the
// kernel, in the order kH, kW, C in which a channels_last weight lies, and zero where the kernel is outside the image.
#pragma once

#include "cuda/operands.cuh"

namespace taps::dev {

// Channels are next to each other, in whole pieces of 16 bytes that begin on 16 bytes, so that no piece lies under two
// places of the kernel. A thread fetches the same 16 bytes of one row in every stage: it finds its pixel once, goes
// through the kernel with the position (h, w) that it is at, and where that changes, looks whether it is inside the
// image.
template <class S, class T>
class Pixels {
 public:
  static constexpr int kStride = stride_of<T, T>(S::kDepth, false);
  static constexpr unsigned kBytes = S::kRows * kStride * sizeof(T);

  // The tile begins at row `first`. Sizes and steps, but of whole images, are below 2^31 (conv2d.cpp looks at that).
  TAPS_DEVICE Pixels(const Convolution& p, int64_t first)
      : image_(static_cast<const T*>(p.x.data)),
        step_h_(static_cast<int>(p.x_strides[2])),
        step_w_(static_cast<int>(p.x_strides[3])),
        width_(static_cast<unsigned>(p.size[1])),
        channels_(static_cast<int>(p.channels)),
        down_(static_cast<int>(p.dilation[0])),
        across_(static_cast<int>(p.dilation[1])),
        places_w_(static_cast<int>(p.kernel[1])) {
    const auto pixel = static_cast<unsigned>(first + row());
    const auto rows = static_cast<unsigned>(p.result_size[0]), columns = static_cast<unsigned>(p.result_size[1]);
    const unsigned line = pixel / columns, n = line / rows;
    image_ += n * p.x_strides[0];
    height_ = first + row() < p.rows ? static_cast<unsigned>(p.size[0]) : 0;  // or no position is inside
    h_ = static_cast<int>(line % rows) * static_cast<int>(p.stride[0]) - static_cast<int>(p.padding[0]);
    w_ = static_cast<int>(pixel % columns) * static_cast<int>(p.stride[1]) - static_cast<int>(p.padding[1]);
    end_ = w_ + places_w_ * across_;
  }

  TAPS_DEVICE void seek(int64_t depth) {
    const int at = static_cast<int>(depth) + column(), place = at / channels_;
    c_ = at % channels_;
    h_ += place / places_w_ * down_;
    w_ += place % places_w_ * across_;
    look();
  }

  TAPS_DEVICE bool whole() const { return true; }
  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) { fetch(stage, S::kDepth); }
  // The next stage, of which `depth` is left.
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) {
    if (idle()) return;
    cp_async<16>(as<T>(stage, 0), static_cast<unsigned>(row() * kStride + column()), next_,
                 inside_ && column() < depth ? 16u : 0u);
    next_ += S::kDepth;
    c_ += S::kDepth;
    if (c_ < channels_) return;
    do {  // the next place of the kernel
      c_ -= channels_;
      w_ += across_;
      if (w_ == end_) w_ -= places_w_ * across_, h_ += down_;
    } while (c_ >= channels_);
    look();
  }

  TAPS_DEVICE void fragments(uint32_t (&a)[S::kM][4], sh<unsigned char> stage, unsigned k) const {
    load_rows<S, kStride>(a, as<T>(stage, 0), k);
  }

 private:
  // What this thread's pieces are under the place that it is at.
  TAPS_DEVICE void look() {
    next_ = image_ + (static_cast<int64_t>(h_) * step_h_ + static_cast<int64_t>(w_) * step_w_ + c_);
    inside_ = static_cast<unsigned>(h_) < height_ && static_cast<unsigned>(w_) < width_;
  }

  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T)), kPieces = S::kDepth / kPiece;
  static constexpr int kMost = S::kThreads / kPieces;
  static_assert(kMost * kPieces == S::kThreads && kMost >= S::kRows, "a thread has one row at most");
  static TAPS_DEVICE int row() { return static_cast<int>(tid()) / kPieces; }
  static TAPS_DEVICE int column() { return static_cast<int>(tid()) % kPieces * kPiece; }
  // Whether there are more threads than pieces, and this one has none.
  static TAPS_DEVICE bool idle() { return kMost > S::kRows && row() >= S::kRows; }

  const T *image_, *next_ = nullptr;
  bool inside_ = false;
  int step_h_, step_w_;
  unsigned height_, width_;
  int channels_, down_, across_, places_w_;
  int h_, w_, c_ = 0, end_;  // where this thread's next piece is; where its line of the kernel ends
};

}  // namespace taps::dev
