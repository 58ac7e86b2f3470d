#include "direct.h"

#include <optional>

#include "borrow.h"
#include "rebuild.h"

namespace py = pybind11;

namespace taps {

namespace {

bool same_shape(const Borrowed& a, const Borrowed& b) {
  if (a.ndim != b.ndim) return false;
  for (int dim = 0; dim < a.ndim; ++dim) {
    if (a.sizes[dim] != b.sizes[dim]) return false;
  }
  return true;
}

bool one_layout(const Borrowed& a, const Borrowed& b) {
  if (a.is_contiguous()) return b.is_contiguous();
  return a.is_channels_last() && b.is_channels_last();
}

// Weight and Delta as the kernels take them.
bool borrow_pair(py::handle weight, py::handle delta, Borrowed& w, Borrowed& d) {
  return borrow(weight, w) && borrow(delta, d) && same_shape(w, d) && one_layout(w, d) && holds_values(weight, w) &&
         holds_values(delta, d);
}

bool wide(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64; }

// Whether score and bias are what the operator takes; torch's own functions would let more pass.
bool rest_fits(const Layer& layer, const Borrowed& x, const Borrowed& w) {
  Borrowed score, bias;
  if (!layer.score.is_none() && !(borrow(layer.score, score) && score.numel == 1 && wide(score.dtype))) return false;
  if (layer.bias.is_none()) return true;
  return borrow(layer.bias, bias) && bias.dtype == x.dtype && bias.ndim == 1 && bias.sizes[0] == w.sizes[0];
}

struct Operands {
  Borrowed x, w, d;
};

// All of a layer's tensors, or nothing.
std::optional<Operands> borrow_layer(const Layer& layer, const Call& call) {
  Operands found;
  if (watched(call.outermost) || !borrow(layer.input, found.x) ||
      !borrow_pair(layer.weight, layer.delta, found.w, found.d)) {
    return std::nullopt;
  }
  const bool cast = found.w.dtype != found.x.dtype;
  if (cast && (call.outermost || !call.gate)) return std::nullopt;
  if (!rest_fits(layer, found.x, found.w)) return std::nullopt;
  return found;
}

Dense dense(const Borrowed& tensor) { return {tensor.data, tensor.dtype}; }

// `rows`: of a product that might be fused, else -1.
py::object weight_of(const Layer& layer, const Operands& operands, bool gate, int64_t rows) {
  const auto& [x, w, d] = operands;
  if (!gate) return py::reinterpret_borrow<py::object>(layer.weight);
  const int64_t places = w.ndim == 4 ? w.sizes[2] * w.sizes[3] : 0;
  std::unique_ptr<Lease> lease;
  {
    const py::gil_scoped_release released;
    lease = rebuild(dense(w), dense(d), w.numel, x.dtype, rows, w.sizes[0], places);
  }
  return lease ? lend(std::move(lease), w, x.dtype) : py::none();
}

// One int or two, as torch's functions take them; false for anything else, and for what no image has.
bool both_axes(py::handle value, int64_t (&axes)[2]) {
  constexpr long kMost = long{1} << 24;
  const bool list = PyTuple_Check(value.ptr()) || PyList_Check(value.ptr());
  const Py_ssize_t count = list ? PySequence_Fast_GET_SIZE(value.ptr()) : 1;
  if (count != 1 && count != 2) return false;
  for (Py_ssize_t axis = 0; axis < 2; ++axis) {
    PyObject* item = list ? PySequence_Fast_GET_ITEM(value.ptr(), count == 1 ? 0 : axis) : value.ptr();
    if (!PyLong_Check(item)) return false;
    int overflow = 0;
    const long axis_value = PyLong_AsLongAndOverflow(item, &overflow);
    if (overflow != 0 || axis_value < 0 || axis_value > kMost) return false;
    axes[axis] = axis_value;
  }
  return true;
}

}  // namespace

py::object linear_weight(const Layer& layer, const Call& call) {
  const auto operands = borrow_layer(layer, call);
  if (!operands || operands->w.ndim != 2 || operands->x.ndim == 0) return py::none();
  const int64_t inputs = operands->x.sizes[operands->x.ndim - 1];
  const int64_t rows = call.training ? -1 : operands->x.numel / (inputs ? inputs : 1);
  return weight_of(layer, *operands, call.gate, rows);
}

py::object conv2d_weight(const Layer& layer, py::handle stride, py::handle padding, py::handle dilation,
                         py::handle groups, const Call& call) {
  int64_t steps[2], pad[2], spread[2];
  if (!both_axes(stride, steps) || !both_axes(padding, pad) || !both_axes(dilation, spread)) return py::none();
  const auto operands = borrow_layer(layer, call);
  if (!operands || operands->w.ndim != 4 || operands->x.ndim != 4) return py::none();
  int64_t rows = -1;
  int overflow = 0;
  const bool one = PyLong_Check(groups.ptr()) && PyLong_AsLongAndOverflow(groups.ptr(), &overflow) == 1;
  if (!call.training && one) {
    rows = operands->x.sizes[0];
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t span =
          operands->x.sizes[2 + axis] + 2 * pad[axis] - spread[axis] * (operands->w.sizes[2 + axis] - 1);
      if (steps[axis] == 0 || span < 1) return py::none();
      rows *= (span - 1) / steps[axis] + 1;
    }
  }
  return weight_of(layer, *operands, call.gate, rows);
}

py::object gradient_weight(py::handle grad_output, const Layer& layer, bool gate) {
  Borrowed dy, score;
  const auto operands = borrow_layer(layer, {gate, true, true});
  if (!operands || !borrow(grad_output, dy) || !borrow(layer.score, score)) return py::none();
  const auto& [x, w, d] = *operands;
  if (w.ndim != 2 || w.numel == 0 || dy.dtype != w.dtype || d.dtype != w.dtype) return py::none();
  if (gate) return weight_of(layer, *operands, true, -1);
  auto lease = gradient_scratch(w.numel, w.dtype);
  return lease ? lend(std::move(lease), w, w.dtype) : py::none();
}

bool dot_into(py::handle score, py::handle a, py::handle b) {
  Borrowed result, first, second;
  if (!borrow(score, result) || !wide(result.dtype) || !result.data || result.numel != 1 ||
      !borrow_pair(a, b, first, second) || first.dtype != second.dtype) {
    throw std::runtime_error("dot_into: expected plain dense tensors of one layout and type, and a score");
  }
  const py::gil_scoped_release released;
  return dot_into(result.data, result.dtype, dense(first), dense(second), first.numel);
}

}  // namespace taps
