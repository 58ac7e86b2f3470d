// Lists of tensors that are written and read in no order: none may write what another one reads or writes.
#pragma once

#include <string>

#include "core/check.h"

namespace taps {

// The bytes from a tensor's first element to the end of its last, gaps included; none without elements.
struct Reach {
  const char* begin;
  const char* end;

  explicit Reach(const Described& tensor);
  bool meets(const Reach& other) const { return begin < other.end && other.begin < end; }
};

bool same_elements(const Described& a, const Described& b);

// A tensor of a list's item, with the name of its list.
struct Named : Reach {
  Named(const Reach& reach, std::string list, size_t item) : Reach(reach), list(std::move(list)), item(item) {}
  std::string list;
  size_t item;
};

// Raises where one of `written` meets another one, or what is read for another item.
void expect_apart(std::vector<Named> written, const std::vector<Named>& read);

// In lists of optional tensors torch leaves negated views to the operator.
std::vector<OptionalTensor> resolved(const std::vector<OptionalTensor>& tensors);

}  // namespace taps
