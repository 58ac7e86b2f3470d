// W_t = round(W + g * Delta) into a tensor, or into many of them by few launches.
#include <algorithm>

#include "ops.h"

namespace taps {
namespace {

struct Item {
  Described out;
  GatedWeight w;
};

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
    fail("out: expected distinct memory for every element, got an expanded tensor");
  }
  return item;
}

void run(const Item& item) {
  reconstruct_into(item.out, &item.w.weight, item.w.delta ? &*item.w.delta : nullptr, item.w.gate);
}

// The memory between a tensor's first element and its last.
struct Extent {
  const char* begin;
  const char* end;
  size_t item;

  Extent(const Described& tensor, size_t item) : item(item) {
    int64_t elements = 1;  // strides are not negative
    for (size_t dim = 0; dim < tensor.sizes.size(); ++dim) elements += (tensor.sizes[dim] - 1) * tensor.strides[dim];
    begin = static_cast<const char*>(tensor.data());
    end = begin + (tensor.numel() == 0 ? 0 : elements * size_of(tensor.dtype));
  }
};

// Raises where an item writes what another one reads or writes: they run in no order.
void expect_apart(const std::vector<Item>& items) {
  std::vector<Extent> outs;
  for (size_t i = 0; i < items.size(); ++i) outs.emplace_back(items[i].out, i);
  outs.erase(std::remove_if(outs.begin(), outs.end(), [](const Extent& out) { return out.begin == out.end; }),
             outs.end());
  std::sort(outs.begin(), outs.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < outs.size(); ++i) {
    if (outs[i].begin < outs[i - 1].end) {
      fail("outs[", std::max(outs[i - 1].item, outs[i].item), "]: expected memory of its own, got some of outs[",
           std::min(outs[i - 1].item, outs[i].item), "]'s");
    }
  }
  const auto check = [&](const Described& operand, size_t item, const char* name) {
    const Extent read(operand, item);
    // The outs lie apart and in order: so do their ends.
    auto out = std::upper_bound(outs.begin(), outs.end(), read.begin,
                                [](const char* begin, const Extent& one) { return begin < one.end; });
    for (; out != outs.end() && out->begin < read.end; ++out) {
      if (out->item != item) {
        fail(name, "[", item, "]: expected memory that no other item writes, got some of outs[", out->item, "]'s");
      }
    }
  };
  for (size_t i = 0; i < items.size(); ++i) {
    check(items[i].w.weight, i, "weights");
    if (items[i].w.delta) check(*items[i].w.delta, i, "deltas");
  }
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
  std::vector<Item> items;
  for (size_t i = 0; i < outs.size(); ++i) {
    if (gates[i] < -1 || gates[i] > 1) fail("gates[", i, "]: expected 1, 0, or -1 for unknown, got ", gates[i]);
    const std::optional<bool> gate = gates[i] < 0 ? std::nullopt : std::optional<bool>(gates[i] == 1);
    try {
      items.push_back(check_item(outs[i], weights[i], deltas[i], scores[i], gate, threshold));
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
    if (++batch.count == ForeachReconstruct::kMost) flush(batch);
  }
  for (ForeachReconstruct& batch : batches) flush(batch);
}

}  // namespace taps
