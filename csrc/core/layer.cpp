#include "core/layer.h"

#include <memory>

#include "core/device.h"
#include "core/python.h"
#include "core/weight.h"

namespace py = pybind11;

namespace taps {

namespace {

bool in_order(const Described& tensor, const std::array<size_t, 4>& dims) {
  int64_t step = 1;
  for (size_t at = tensor.sizes.size(); at-- > 0;) {
    const size_t dim = dims[at];
    if (tensor.sizes[dim] == 1) continue;
    if (tensor.strides[dim] != step) return false;
    step *= tensor.sizes[dim];
  }
  return true;
}

// Whether both lie without gaps, in rows or with channels last.
bool one_layout(const Described& a, const Described& b) {
  if (a.ndim() != 2 && a.ndim() != 4) return false;
  constexpr std::array<size_t, 4> kRows{0, 1, 2, 3}, kChannelsLast{0, 2, 3, 1};
  if (in_order(a, kRows)) return in_order(b, kRows);
  return a.ndim() == 4 && in_order(a, kChannelsLast) && in_order(b, kChannelsLast);
}

bool borrow_whole(py::handle tensor, Described& borrowed) {
  return borrow(tensor, borrowed) && has_memory(tensor, borrowed);
}

// Two as the flat kernels take them.
bool borrow_pair(py::handle first, py::handle second, Described& a, Described& b) {
  return borrow(first, a) && borrow(second, b) && a.sizes.equals(b.sizes) && one_layout(a, b) && has_memory(first, a) &&
         has_memory(second, b) && !negates(first) && !negates(second);
}

// W_t of an open gate, leased. Null where the weight has no elements, and where device kernels run on the CPU.
std::unique_ptr<Lease> leased_weight(const GatedWeight& w, Dtype compute) {
  const int64_t numel = w.weight.numel();
  if (cuda::kTwin || numel == 0) return nullptr;
  auto lease = std::make_unique<Lease>(false, 0, static_cast<size_t>(numel * size_of(compute)));
  Reconstruct args;
  args.walk = flat_walk<3>(numel);
  args.out = lease->data();
  args.out_dtype = compute;
  args.weight = w.weight.data();
  args.weight_dtype = w.weight.dtype;
  args.delta = w.delta->data();
  args.delta_dtype = w.delta->dtype;
  args.gate.open = true;
  cpu::reconstruct(args);
  return lease;
}

}  // namespace

std::optional<Operands> borrow_layer(const Layer& layer, const Call& call, int64_t ndim) {
  Operands found;
  Described delta;
  if (watched(call.outermost) || !borrow_whole(layer.input, found.x) ||
      !borrow_pair(layer.weight, layer.delta, found.w.weight, delta) || found.w.weight.ndim() != ndim) {
    return std::nullopt;
  }
  const bool cast = found.w.weight.dtype != found.x.dtype;
  if (cast && (call.outermost || !call.gate)) return std::nullopt;
  found.w.delta = delta;
  found.w.gate.open = call.gate;
  if (!layer.score.is_none()) {
    Described& score = found.w.score.emplace();
    const bool known =
        borrow_whole(layer.score, score) && (score.dtype == Dtype::kFloat32 || score.dtype == Dtype::kFloat64);
    if (!known || score.numel() != 1) return std::nullopt;
  }
  if (!layer.bias.is_none()) {
    Described& bias = found.bias.emplace();
    if (!borrow_whole(layer.bias, bias) || bias.dtype != found.x.dtype || bias.ndim() != 1 ||
        bias.sizes[0] != found.w.weight.sizes[0]) {
      return std::nullopt;
    }
  }
  return found;
}

bool readable(const Layer& layer, const Operands& operands) {
  if (negates(layer.input)) return false;
  if (!operands.bias) return true;
  return (operands.bias->numel() == 1 || operands.bias->strides[0] == 1) && !negates(layer.bias);
}

py::object weight_of(const Layer& layer, const Operands& operands, Path path) {
  if (path == Path::kStock) return py::reinterpret_borrow<py::object>(layer.weight);
  if (operands.w.known_closed()) return py::none();  // rebuilt by force
  const Described& w = operands.w.weight;
  std::unique_ptr<Lease> lease;
  {
    const py::gil_scoped_release released;
    lease = leased_weight(operands.w, operands.x.dtype);
  }
  return lease ? lend(std::move(lease), w.sizes, w.strides, operands.x.dtype) : py::none();
}

Result new_result(Span sizes, Span strides, Dtype dtype) {
  Result result{fresh(sizes, strides, dtype), nullptr};
  Described described;
  if (!borrow(result.tensor, described)) {
    throw std::runtime_error("empty_strided: expected a plain tensor on the CPU");
  }
  result.data = described.data();
  return result;
}

}  // namespace taps
