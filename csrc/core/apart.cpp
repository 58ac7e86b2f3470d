#include "core/apart.h"

#include <algorithm>

namespace taps {

Reach::Reach(const Described& tensor)
    : begin(static_cast<const char*>(tensor.data())),
      end(begin + reach(tensor.sizes, tensor.strides) * size_of(tensor.dtype)) {}

bool same_elements(const Described& a, const Described& b) {
  if (a.data() != b.data() || a.dtype != b.dtype) return false;
  for (size_t dim = 0; dim < a.sizes.size(); ++dim) {
    if (a.sizes[dim] > 1 && a.strides[dim] != b.strides[dim]) return false;
  }
  return true;
}

void expect_apart(std::vector<Named> written, const std::vector<Named>& read) {
  const auto refuse = [](const Named& one, const Named& writer) {
    fail(one.list, "[", one.item, "]: expected memory that no other item writes, got some of ", writer.list, "[",
         writer.item, "]'s");
  };
  const auto empty = [](const Named& one) { return one.begin == one.end; };
  written.erase(std::remove_if(written.begin(), written.end(), empty), written.end());
  std::sort(written.begin(), written.end(), [](const Named& a, const Named& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].meets(written[i - 1])) refuse(written[i], written[i - 1]);
  }
  // They are apart, so that the last to begin before an operand ends is the last that may meet it.
  for (const Named& one : read) {
    auto out = std::lower_bound(written.begin(), written.end(), one.end,
                                [](const Named& writer, const char* end) { return writer.begin < end; });
    while (out != written.begin() && (--out)->meets(one)) {
      if (out->item != one.item) refuse(one, *out);
    }
  }
}

std::vector<OptionalTensor> resolved(const std::vector<OptionalTensor>& tensors) {
  std::vector<OptionalTensor> plain;
  for (const OptionalTensor& tensor : tensors) {
    plain.push_back(tensor ? OptionalTensor(call("aten::resolve_neg", "", *tensor)) : std::nullopt);
  }
  return plain;
}

}  // namespace taps
