// The forward of a gated convolution as a tile kernel: the linear layer of what each pixel of its result sees.
#pragma once

#include "cuda/linear.cuh"
#include "cuda/pixels.cuh"

namespace taps::dev {

// y = W_t * x + bias, as [pixels, outputs].
template <class S, class T, class W, class D>
struct Convolved : TimesWeight<S, T, W, D, Pixels<S, T>, false> {
  static TAPS_DEVICE void run(const Convolution& p) {
    const Place<S> place(p.rows);
    const Pixels<S, T> left(p, place.row);
    TimesWeight<S, T, W, D, Pixels<S, T>, false>::template run<false>(p, left, place, p.outputs, p.inputs);
  }
};

// Calls `launch(Instance<Body>())` with the kernel that serves a convolution. Tiles and grid are the linear forward's.
template <class T, class Launch>
void with_convolution(const Convolution& p, const Launch& launch) {
  with_types<T>(p, [&](auto w, auto d) {
    if (p.rows <= kFewRows) {
      launch(Instance<Convolved<FewRows, T, decltype(w), decltype(d)>>());
    } else {
      launch(Instance<Convolved<MoreRows, T, decltype(w), decltype(d)>>());
    }
  });
}

}  // namespace taps::dev
