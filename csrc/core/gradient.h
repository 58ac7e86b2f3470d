// From G = dL/dW_t to the gradients of delta, score and weight, without a weight-sized tensor besides them:
//
//     dDelta = g * G        ds = <G, Delta>, also when closed        dW = G
#pragma once

#include "core/check.h"

namespace taps {

// What is asked for on the weight's side, and the scale of the sampled gate gradient.
struct WeightSide {
  const GatedWeight& w;
  bool want_delta, want_score, want_weight;
  double scale;
  Dtype compute;
};

struct WeightGrads {
  OptionalTensor delta, score, weight;
};

// Where G was computed: in scratch memory, in a tensor that may be a result itself, or in one of torch's making.
enum class Holder { kScratch, kDelta, kWeight, kFresh };

// Picks a result that G can be computed into directly, else kScratch.
Holder holder_for(const WeightSide& side);

WeightGrads settle(const WeightSide& side, const Tensor& g, Holder holder);

// scale * <a, b> as a tensor like the score. Differing layouts are walked, never copied.
Tensor dot_like(const Described& score, const Described& a, const Described& b, double scale);

// The same into a score that is there.
void dot_into(const Described& result, const Described& a, const Described& b, double scale);

// Raises where the score's gradient of a closed layer is not finite because its delta is not. CPU only.
void expect_finite_score(const GatedWeight& w, const Described& gradient);

// Raises where the delta of a closed layer holds Inf or NaN: its score would be lost. CPU only; on a GPU the look would
// synchronise, and a NaN score is caught where the gates are read.
void expect_finite_delta(const GatedWeight& w);

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // input, delta, score, bias, weight

// The five results; one that was not asked for is an empty tensor of shape [0].
Grads pack_grads(const GatedWeight& w, Dtype compute, const OptionalTensor& dinput, const WeightGrads& grads,
                 const OptionalTensor& dbias);

}  // namespace taps
