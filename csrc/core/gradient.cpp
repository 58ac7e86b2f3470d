#include "core/gradient.h"

#include <cmath>

#include "core/device.h"
#include "core/weight.h"

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

bool finite_score(const void* score, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? std::isfinite(*static_cast<const double*>(score))
                                  : std::isfinite(*static_cast<const float*>(score));
}

// A new tensor like `like` (dtype, dense strides) holding scale * from, or 0 where the gate is closed.
Tensor selected_like(const Described& like, const Described& from, const Gate& gate, double scale) {
  Tensor result = empty_like(like);
  reconstruct_into(describe(result, "result"), nullptr, &from, gate, scale);
  return result;
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
    if (w.known_closed()) expect_finite_score(w, describe(*grads.score, "score gradient"));
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

Tensor dot_like(const Described& score, const Described& a, const Described& b, double scale) {
  Tensor result = empty_like(score);
  dot_into(describe(result, "score gradient"), a, b, scale);
  return result;
}

void dot_into(const Described& result, const Described& a, const Described& b, double scale) {
  Dot args;
  args.walk = make_walk<2>(a.sizes, {a.strides, b.strides});
  args.a = args.walk.numel ? a.data() : nullptr;
  args.b = args.walk.numel ? b.data() : nullptr;
  args.a_dtype = a.dtype;
  args.b_dtype = b.dtype;
  args.scale = scale;
  args.result = result.data();
  args.result_dtype = result.dtype;
  const int64_t chunks = dot_chunks(args.walk);
  if (cuda::runs(a.place.cuda)) {
    const int64_t size = chunks, stride = 1;
    const Tensor partials = empty_strided(Span(&size, 1), Span(&stride, 1), Dtype::kFloat64, a.place);
    args.partials = static_cast<double*>(partials.data_ptr());
    cuda::dot(args, a.place.index, stream_of(a.place));
  } else {
    std::vector<double> partials(static_cast<size_t>(chunks));
    args.partials = partials.data();
    cpu::dot(args);
  }
}

// Inf and NaN survive products and sums, so a finite result proves a finite delta for free.
void expect_finite_score(const GatedWeight& w, const Described& gradient) {
  if (!w.delta->place.cuda && !finite_score(gradient.data(), gradient.dtype)) expect_finite_delta(w);
}

void expect_finite_delta(const GatedWeight& w) {
  if (w.delta->place.cuda) return;
  const Walk<1> walk = make_walk<1>(w.delta->sizes, {w.delta->strides});
  if (walk.numel && !cpu::all_finite(walk, w.delta->data(), w.delta->dtype)) {
    fail(
        "delta: expected finite values in a closed layer during training, because its score's "
        "gradient is <G, delta>; got Inf or NaN");
  }
}

Grads pack_grads(const GatedWeight& w, Dtype compute, const OptionalTensor& dinput, const WeightGrads& grads,
                 const OptionalTensor& dbias) {
  const Place place = w.weight.place;
  const auto or_nothing = [&](const OptionalTensor& tensor, Dtype dtype) {
    return tensor ? *tensor : no_tensor(dtype, place);
  };
  return {or_nothing(dinput, compute), or_nothing(grads.delta, w.delta ? w.delta->dtype : w.weight.dtype),
          or_nothing(grads.score, w.score ? w.score->dtype : Dtype::kFloat32), or_nothing(dbias, compute),
          or_nothing(grads.weight, w.weight.dtype)};
}

}  // namespace taps
