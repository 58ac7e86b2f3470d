#include "panels.h"

#include <algorithm>

#include "ops.h"

namespace taps {
namespace {

constexpr int64_t kLeast = 2;  // channels: with one, a slice would not tell its memory format
constexpr int64_t kEven = 16;  // channels that torch's kernels like to work on together

Gate open_gate() {
  Gate gate;
  gate.open = true;
  return gate;
}

// `part` with `size` instead of its size in `dim`, contiguous or channels_last like it.
Tensor empty_whole(const Described& part, int64_t dim, int64_t size, bool may_be_channels_last) {
  Ints sizes(part.sizes.begin(), part.sizes.end());
  sizes[dim] = size;
  Ints strides = contiguous_strides(Span(sizes.data(), sizes.size()));
  if (may_be_channels_last && channels_last(part)) {
    strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[3] * sizes[1], sizes[1]};
  }
  return empty_strided(Span(sizes.data(), sizes.size()), Span(strides.data(), strides.size()), part.dtype, part.place);
}

// A copy in another type with the same layout.
Tensor copy_as(const Described& from, Dtype dtype) {
  Tensor copy = empty_strided(from.sizes, from.strides, dtype, from.place);
  reconstruct_into(describe(copy, "copy"), &from, nullptr, Gate{});
  return copy;
}

}  // namespace

bool channels_last(const Described& image) {
  if (image.ndim() != 4 || image.strides[1] == 0) return false;
  int64_t least = 0;  // what the next stride must at least be, from the innermost dimension out
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (image.sizes[dim] == 0 || image.strides[dim] < least) return false;
    if (dim == 0 && least == image.strides[1]) return false;  // [N, 1, 1, 1] is contiguous as well
    least = image.strides[dim] * std::max<int64_t>(image.sizes[dim], 1);
  }
  return true;
}

int64_t panel_step(const Described& weight, Dtype compute, int64_t groups) {
  const int64_t limit = static_cast<int64_t>(workspace_limit());
  const int64_t channels = weight.sizes[0];
  const int64_t bytes = weight.numel() * size_of(compute);
  if (limit == 0 || bytes <= limit) return 0;
  const int64_t unit = channels / groups;  // a group is never cut
  int64_t step = limit / (bytes / channels);
  if (groups == 1) {
    step = step >= kEven ? step / kEven * kEven : std::max(step, kLeast);
    // Panels of one size, unless they would have to be less than half as large: torch's kernels
    // are generated, and kept, for each size.
    int64_t same = step;
    while (2 * same > step && channels % same != 0) same -= step >= kEven ? kEven : 1;
    if (2 * same > step && same >= kLeast) step = same;
  } else {
    step = std::max(step / unit, (kLeast + unit - 1) / unit) * unit;
  }
  return step < channels ? step : 0;
}

Tensor narrow(const Tensor& tensor, int64_t dim, Range range) {
  return call("aten::narrow", "", tensor, dim, range.start, range.length);
}

OptionalTensor narrow(const OptionalTensor& tensor, int64_t dim, Range range) {
  return tensor ? OptionalTensor(narrow(*tensor, dim, range)) : std::nullopt;
}

Range input_range(const Described& weight, Range outputs, int64_t groups) {
  const int64_t inputs = weight.sizes[1];  // of one group
  if (groups == 1) return {0, inputs};
  const int64_t unit = weight.sizes[0] / groups;
  return {outputs.start / unit * inputs, outputs.length / unit * inputs};
}

void Slices::put(const Tensor& part, Range range) {
  const Described from = describe(part, "panel");
  if (!whole_) whole_ = empty_whole(from, dim_, size_, may_be_channels_last_);
  const Tensor slice = narrow(*whole_, dim_, range);
  reconstruct_into(describe(slice, "slice"), nullptr, &from, open_gate());
}

void Sum::add(const Tensor& part) {
  const Described from = describe(part, "panel");
  if (!sum_) {
    dtype_ = from.dtype;
    const bool narrow = size_of(dtype_) < size_of(Dtype::kFloat32);
    sum_ = narrow ? copy_as(from, Dtype::kFloat32) : part;
    return;
  }
  const Described sum = describe(*sum_, "sum");
  reconstruct_into(sum, &sum, &from, open_gate());
}

OptionalTensor Sum::whole() const {
  if (!sum_) return std::nullopt;
  const Described sum = describe(*sum_, "sum");
  return sum.dtype == dtype_ ? *sum_ : copy_as(sum, dtype_);
}

PanelGrads::PanelGrads(const GatedWeight& w, const Wanted& wanted, int64_t groups, int64_t input_dim,
                       bool may_be_channels_last)
    : w_(w),
      wanted_(wanted),
      groups_(groups),
      input_(input_dim, w.weight.sizes[1] * groups, may_be_channels_last),
      delta_(0, w.weight.sizes[0]),
      bias_(0, w.weight.sizes[0]),
      weight_(0, w.weight.sizes[0]) {
  if (wanted.delta) delta_ = Slices(empty_like(*w.delta), 0);
  if (wanted.weight) weight_ = Slices(empty_like(w.weight), 0);
}

void PanelGrads::put(const Grads& part, Range panel) {
  const auto& [input, delta, score, bias, weight] = part;
  if (wanted_.input && groups_ == 1) input_sum_.add(input);
  if (wanted_.input && groups_ > 1) input_.put(input, input_range(w_.weight, panel, groups_));
  if (wanted_.delta) delta_.put(delta, panel);
  if (wanted_.score) score_.add(score);
  if (wanted_.bias) bias_.put(bias, panel);
  if (wanted_.weight) weight_.put(weight, panel);
}

Grads PanelGrads::whole(Dtype compute) const {
  const OptionalTensor nothing;
  const OptionalTensor input = groups_ == 1 ? input_sum_.whole() : input_.whole();
  return pack_grads(
      w_, compute, input,
      {wanted_.delta ? delta_.whole() : nothing, score_.whole(), wanted_.weight ? weight_.whole() : nothing},
      bias_.whole());
}

}  // namespace taps
