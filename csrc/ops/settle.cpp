// From the gradients of many W_t to those of their Deltas and scores, by few launches.
#include <limits>

#include "core/apart.h"
#include "core/device.h"
#include "core/weight.h"
#include "ops.h"

namespace taps {
namespace {

struct Item {
  std::optional<Described> delta_gradient, score_gradient;  // as far as they are asked for
  Described gradient;
  GatedWeight w;  // the gradient in the place of W, which has its sizes and place
};

Item check_item(const Tensor& delta_gradient, const Tensor& score_gradient, const Tensor& gradient, const Tensor& delta,
                const OptionalTensor& score, std::optional<bool> gate, double threshold) {
  Item item{{}, {}, describe(gradient, "gradient"), check_weight(gradient, delta, score, gate, threshold, 0)};
  if (delta_gradient.numel() > 0) {
    const Described& out = item.delta_gradient.emplace(describe(delta_gradient, "delta_gradient"));
    expect_shape(out, "delta_gradient", item.w.delta->sizes);
    expect_place(out, "delta_gradient", item.gradient, "gradient");
    if (out.dtype != item.w.delta->dtype) {
      fail("delta_gradient: expected dtype ", to_string(item.w.delta->dtype), " like delta, got ",
           to_string(out.dtype));
    }
    if (overlaps(out.sizes, out.strides)) {
      fail("delta_gradient: expected distinct memory for every element, got strides that share some");
    }
    if (Reach(out).meets(Reach(*item.w.delta)) || (item.w.score && Reach(out).meets(Reach(*item.w.score))) ||
        (Reach(out).meets(Reach(item.gradient)) && !same_elements(out, item.gradient))) {
      fail("delta_gradient: expected memory of its own, or all of gradient element by element");
    }
  }
  if (score_gradient.numel() > 0) {
    const Described& out = item.score_gradient.emplace(describe(score_gradient, "score_gradient"));
    expect_place(out, "score_gradient", item.gradient, "gradient");
    if (out.numel() != 1 || (out.dtype != Dtype::kFloat32 && out.dtype != Dtype::kFloat64)) {
      fail("score_gradient: expected one element of float32 or float64, got shape ", shape_string(out.sizes), " of ",
           to_string(out.dtype));
    }
    for (const Described* other : {&item.gradient, &*item.w.delta, item.w.score ? &*item.w.score : nullptr,
                                   item.delta_gradient ? &*item.delta_gradient : nullptr}) {
      if (other && Reach(out).meets(Reach(*other))) fail("score_gradient: expected memory of its own");
    }
  }
  return item;
}

void expect_apart(const std::vector<Item>& items) {
  std::vector<Named> written, read;
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    if (item.delta_gradient) written.push_back({Reach(*item.delta_gradient), "delta_gradients", i});
    if (item.score_gradient) written.push_back({Reach(*item.score_gradient), "score_gradients", i});
    read.push_back({Reach(item.gradient), "gradients", i});
    read.push_back({Reach(*item.w.delta), "deltas", i});
    if (item.w.gate.on_device()) read.push_back({Reach(*item.w.score), "scores", i});
  }
  expect_apart(std::move(written), read);
}

// How an item lies: all alike; or G with the last two of its dimensions, as Delta's memory has them, exchanged; or
// neither.
struct Layout {
  bool known = false;
  uint32_t outer = 0, inner = 0;
};

Layout layout_of(const Item& item) {
  const Described& out = item.delta_gradient ? *item.delta_gradient : *item.w.delta;
  const Walk<3> walk = make_walk<3>(item.gradient.sizes, {item.w.delta->strides, out.strides, item.gradient.strides});
  if (walk.flat()) return {true};
  const int last = walk.ndim - 1;
  if (walk.ndim != 2 && walk.ndim != 3) return {};
  const int64_t outer = walk.sizes[last - 1], inner = walk.sizes[last], row = outer * inner;
  if (row > std::numeric_limits<int32_t>::max()) return {};
  for (int k = 0; k < 3; ++k) {
    const bool turned = k == 2;
    if (walk.ndim == 3 && walk.strides[k][0] != row) return {};
    if (walk.strides[k][last - 1] != (turned ? 1 : inner) || walk.strides[k][last] != (turned ? outer : 1)) return {};
  }
  // Exchanged elements are read by other threads than those that write them.
  if (item.delta_gradient && item.delta_gradient->data() == item.gradient.data()) return {};
  return {true, static_cast<uint32_t>(outer), static_cast<uint32_t>(inner)};
}

// One tensor by itself: on the CPU, and where its operands lie differently.
void settle_alone(const Item& item) {
  if (item.score_gradient) {
    dot_into(*item.score_gradient, item.gradient, *item.w.delta, 1.0);
    if (item.w.known_closed()) expect_finite_score(item.w, *item.score_gradient);
  }
  if (item.delta_gradient) reconstruct_into(*item.delta_gradient, nullptr, &item.gradient, item.w.gate);
}

Settle settlement(const Item& item, const Layout& layout) {
  Settle args;
  args.outer = layout.outer;
  args.inner = layout.inner;
  if (item.delta_gradient) args.delta_gradient = item.delta_gradient->data();
  args.gradient = item.gradient.data();
  args.gradient_dtype = item.gradient.dtype;
  args.delta_dtype = item.w.delta->dtype;
  args.gate = item.w.gate;
  if (item.score_gradient) {
    args.score_gradient = item.score_gradient->data();
    args.score_dtype = item.score_gradient->dtype;
    args.delta = item.w.delta->data();
  }
  return args;
}

void launch(ForeachSettle& batch, Place place) {
  if (batch.count > 0) {
    const Lease memory(place.cuda, place.index, static_cast<size_t>(batch.chunks()) * sizeof(double));
    batch.partials = static_cast<double*>(memory.data());
    cuda::foreach_settle(batch, place.index, stream_of(place));
  }
  batch.count = 0;
}

}  // namespace

void foreach_settle(const std::vector<Tensor>& delta_gradients, const std::vector<Tensor>& score_gradients,
                    const std::vector<Tensor>& gradients, const std::vector<Tensor>& deltas,
                    const std::vector<OptionalTensor>& scores, const Ints& gates, double threshold) {
  const auto expect_count = [&](size_t count, const char* name) {
    if (count != gradients.size()) fail(name, ": expected ", gradients.size(), " entries like gradients, got ", count);
  };
  expect_count(delta_gradients.size(), "delta_gradients");
  expect_count(score_gradients.size(), "score_gradients");
  expect_count(deltas.size(), "deltas");
  expect_count(scores.size(), "scores");
  expect_count(gates.size(), "gates");
  const std::vector<OptionalTensor> plain_scores = resolved(scores);
  std::vector<Item> items;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gates[i] < -1 || gates[i] > 1) fail("gates[", i, "]: expected 1, 0, or -1 for unknown, got ", gates[i]);
    const std::optional<bool> gate = gates[i] < 0 ? std::nullopt : std::optional<bool>(gates[i] == 1);
    try {
      items.push_back(check_item(delta_gradients[i], score_gradients[i], gradients[i], deltas[i], plain_scores[i], gate,
                                 threshold));
    } catch (const std::runtime_error& error) {
      fail("item ", i, ": ", error.what());
    }
  }
  expect_apart(items);  // before anything is written

  ForeachSettle batches[2];  // in fp32, in fp64
  Place place;
  for (const Item& item : items) {
    if (!item.delta_gradient && !item.score_gradient) continue;
    const bool on_device = cuda::runs(item.gradient.place.cuda);
    const Layout layout = on_device ? layout_of(item) : Layout{};
    if (!layout.known) {
      settle_alone(item);
      continue;
    }
    if (!(item.gradient.place == place)) {
      for (ForeachSettle& batch : batches) launch(batch, place);
      place = item.gradient.place;
    }
    const Settle args = settlement(item, layout);
    ForeachSettle& batch = batches[args.in_double()];
    batch.items[batch.count] = args;
    batch.numel[batch.count] = item.gradient.numel();
    if (++batch.count == kMostTensors) launch(batch, place);
  }
  for (ForeachSettle& batch : batches) launch(batch, place);
}

}  // namespace taps
