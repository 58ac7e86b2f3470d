// W_t = round(W + g * Delta) into a tensor, or into many of them by few launches.
#include "core/apart.h"
#include "core/device.h"
#include "core/weight.h"
#include "ops.h"

namespace taps {
namespace {

struct Item {
  Described out;
  GatedWeight w;
};

// Every operand that a kernel reads, with its name.
template <class Each>
void for_operands(const GatedWeight& w, const Each& each) {
  each(w.weight, "weight");
  if (w.delta) each(*w.delta, "delta");
  if (w.gate.on_device()) each(*w.score, "score");
}

Item check_item(const Tensor& out, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                std::optional<bool> gate, double threshold) {
  Item item{{}, check_weight(weight, delta, score, gate, threshold, 0)};
  if (!delta && !gate && !score) {
    fail("gate: expected a bool, or a score to read it from, got None for both");
  }
  item.out = describe(out, "out");
  expect_shape(item.out, "out", item.w.weight.sizes);
  expect_place(item.out, "out", item.w.weight, "weight");
  if (overlaps(item.out.sizes, item.out.strides)) {
    fail("out: expected distinct memory for every element, got strides that share some");
  }
  for_operands(item.w, [&](const Described& operand, const char* name) {
    if (Reach(item.out).meets(Reach(operand)) && !same_elements(item.out, operand)) {
      fail("out: expected memory of its own, or all of ", name, " element by element, got some of it");
    }
  });
  return item;
}

void run(const Item& item) {
  reconstruct_into(item.out, &item.w.weight, item.w.delta ? &*item.w.delta : nullptr, item.w.gate);
}

void expect_apart(const std::vector<Item>& items) {
  std::vector<Named> outs, read;
  for (size_t i = 0; i < items.size(); ++i) {
    outs.push_back({Reach(items[i].out), "outs", i});
    for_operands(items[i].w, [&](const Described& operand, const char* name) {
      read.push_back({Reach(operand), std::string(name) + "s", i});
    });
  }
  expect_apart(std::move(outs), read);
}

}  // namespace

void reconstruct(const Tensor& out, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                 std::optional<bool> gate, double threshold) {
  run(check_item(out, weight, delta, score, gate, threshold));
}

void foreach_reconstruct(const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
                         const std::vector<OptionalTensor>& deltas, const std::vector<OptionalTensor>& scores,
                         const Ints& gates, double threshold) {
  const auto expect_count = [&](size_t count, const char* name) {
    if (count != outs.size()) fail(name, ": expected ", outs.size(), " entries like outs, got ", count);
  };
  expect_count(weights.size(), "weights");
  expect_count(deltas.size(), "deltas");
  expect_count(scores.size(), "scores");
  expect_count(gates.size(), "gates");
  const std::vector<OptionalTensor> plain_deltas = resolved(deltas), plain_scores = resolved(scores);
  std::vector<Item> items;
  for (size_t i = 0; i < outs.size(); ++i) {
    if (gates[i] < -1 || gates[i] > 1) fail("gates[", i, "]: expected 1, 0, or -1 for unknown, got ", gates[i]);
    const std::optional<bool> gate = gates[i] < 0 ? std::nullopt : std::optional<bool>(gates[i] == 1);
    try {
      items.push_back(check_item(outs[i], weights[i], plain_deltas[i], plain_scores[i], gate, threshold));
    } catch (const std::runtime_error& error) {
      fail("item ", i, ": ", error.what());
    }
  }
  expect_apart(items);  // before anything is written

  // One launch for as many as lie dense and alike on one device and are computed in one type.
  ForeachReconstruct batches[2];  // in fp32, in fp64
  Place place;
  const auto flush = [&](ForeachReconstruct& batch) {
    if (batch.count > 0) cuda::foreach_reconstruct(batch, place.index, stream_of(place));
    batch.count = 0;
  };
  for (const Item& item : items) {
    const Described* const delta = item.w.delta ? &*item.w.delta : nullptr;
    const Reconstruct args = reconstruction(item.out, &item.w.weight, delta, item.w.gate);
    if (args.walk.numel == 0) continue;
    if (!cuda::runs(item.out.place.cuda) || !args.walk.flat()) {
      run(item);
      continue;
    }
    if (!(item.out.place == place)) {
      for (ForeachReconstruct& batch : batches) flush(batch);
      place = item.out.place;
    }
    ForeachReconstruct& batch = batches[args.in_double()];
    batch.items[batch.count] = args;
    batch.numel[batch.count] = args.walk.numel;
    if (++batch.count == kMostTensors) flush(batch);
  }
  for (ForeachReconstruct& batch : batches) flush(batch);
}

}  // namespace taps
