// From G = dL/dW_t to the gradients of delta, score and weight, without a weight-sized tensor
// besides them:
//
//     dDelta = g * G        ds = <G, Delta>, also when closed        dW = G
#include "rebuild.h"

namespace taps {

namespace {

// G may live in a result only where that result is G: same type, and not a known zero.
bool delta_holds(const WeightSide& side) {
  return side.want_delta && !side.w.known_closed() && side.w.delta->dtype == side.compute;
}

bool weight_holds(const WeightSide& side) { return side.want_weight && side.w.weight.dtype == side.compute; }

bool same_layout(const Described& a, const Described& b) {
  return make_walk<2>(a.sizes, {a.strides, b.strides}).flat();
}

}  // namespace

Holder holder_for(const WeightSide& side) {
  return delta_holds(side) ? Holder::kDelta : weight_holds(side) ? Holder::kWeight : Holder::kScratch;
}

WeightGrads settle(const WeightSide& side, const Tensor& g, Holder holder) {
  const GatedWeight& w = side.w;
  const Described gradient = describe(g, "gradient");
  if (holder == Holder::kFresh) {  // adopt it where it already is what the caller will see
    holder = holder_for(side);
    const auto fits = [&](const Described& like) {
      return is_dense(like.sizes, like.strides) && same_layout(gradient, like);
    };
    if ((holder == Holder::kDelta && !fits(*w.delta)) || (holder == Holder::kWeight && !fits(w.weight))) {
      holder = Holder::kScratch;
    }
  }

  WeightGrads grads;
  if (side.want_score) {
    grads.score = dot_like(*w.score, gradient, *w.delta, side.scale);
    // Inf and NaN survive products and sums, so a finite result proves a finite delta for free.
    if (w.known_closed() && !w.delta->place.cuda && !finite_score(grads.score->data_ptr(), w.score->dtype)) {
      expect_finite_delta(w);
    }
  }
  Gate all;
  all.open = true;
  if (side.want_delta && holder != Holder::kDelta) {
    grads.delta = w.known_closed() ? zeros_like(*w.delta) : selected_like(*w.delta, gradient, w.gate, side.scale);
  }
  if (side.want_weight && holder != Holder::kWeight) {
    grads.weight = selected_like(w.weight, gradient, all, side.scale);
  }
  // Last, because these change G in place.
  if (holder == Holder::kDelta) {
    grads.delta = g;
    if (w.gate.on_device() || side.scale != 1.0) {
      reconstruct_into(gradient, nullptr, &gradient, w.gate, side.scale);
    }
  }
  if (holder == Holder::kWeight) {
    grads.weight = g;
    if (side.scale != 1.0) reconstruct_into(gradient, nullptr, &gradient, all, side.scale);
  }
  return grads;
}

}  // namespace taps
