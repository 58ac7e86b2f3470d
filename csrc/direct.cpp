#include "direct.h"

#include <algorithm>
#include <optional>

#include "core/python.h"
#include "fused.h"
#include "ops.h"

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

bool of_score(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64; }

struct Operands {
  Described x;
  GatedWeight w;
  std::optional<Described> bias;
};

// All of a layer's tensors, or nothing. Score and bias are what the operator takes: torch's own functions let more
// pass.
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
    if (!borrow_whole(layer.score, score) || score.numel() != 1 || !of_score(score.dtype)) return std::nullopt;
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

// Whether kernels of our own may read input and bias.
bool readable(const Layer& layer, const Operands& operands) {
  if (negates(layer.input)) return false;
  if (!operands.bias) return true;
  return (operands.bias->numel() == 1 || operands.bias->strides[0] == 1) && !negates(layer.bias);
}

const void* data_of(const std::optional<Described>& tensor) { return tensor ? tensor->data() : nullptr; }

// The weight that torch's own function is to multiply with, or None.
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

void* data_of(const py::object& tensor) {
  Described described;
  if (!borrow(tensor, described)) throw std::runtime_error("empty_strided: expected a plain tensor on the CPU");
  return described.data();
}

// x [..., K] as [M, K]: a matrix as it is, anything else where it is dense.
std::optional<Described> matrix_of(const Described& x, std::array<int64_t, 4>& facts) {
  if (x.ndim() == 2) return x;
  int64_t step = 1;
  for (size_t dim = x.sizes.size(); dim-- > 0;) {
    if (x.sizes[dim] != 1 && x.strides[dim] != step) return std::nullopt;
    step *= x.sizes[dim];
  }
  const int64_t inputs = x.sizes[x.sizes.size() - 1];
  facts = {x.numel() / inputs, inputs, inputs, 1};
  Described matrix = x;
  matrix.sizes = Span(facts.data(), 2);
  matrix.strides = Span(facts.data() + 2, 2);
  return matrix;
}

bool is_int(PyObject* value) { return PyLong_Check(value) && !PyBool_Check(value); }

// One int or two, as torch's functions take them; false for anything else, and for what no image has.
bool both_axes(py::handle value, int64_t least, Ints& axes) {
  constexpr long kMost = long{1} << 24;
  const bool list = PyTuple_Check(value.ptr()) || PyList_Check(value.ptr());
  const Py_ssize_t count = list ? PySequence_Fast_GET_SIZE(value.ptr()) : 1;
  if (count != 1 && count != 2) return false;
  axes.resize(2);
  for (Py_ssize_t axis = 0; axis < 2; ++axis) {
    PyObject* item = list ? PySequence_Fast_GET_ITEM(value.ptr(), count == 1 ? 0 : axis) : value.ptr();
    if (!is_int(item)) return false;
    int overflow = 0;
    const long given = PyLong_AsLongAndOverflow(item, &overflow);
    if (overflow != 0 || given < least || given > kMost) return false;
    axes[static_cast<size_t>(axis)] = given;
  }
  return true;
}

}  // namespace

py::object direct_linear(const Layer& layer, const Call& call) {
  const auto operands = borrow_layer(layer, call, 2);
  if (!operands) return py::none();
  const auto& [x, w, bias] = *operands;
  const int64_t inputs = w.weight.sizes[1];
  if (x.ndim() == 0 || inputs == 0 || w.weight.sizes[0] == 0 || x.sizes[x.sizes.size() - 1] != inputs)
    return py::none();
  const LinearSizes sizes{x.numel() / inputs, inputs, w.weight.sizes[0]};
  std::array<int64_t, 4> facts;
  const auto matrix = matrix_of(x, facts);
  if (!matrix && !call.training && may_fuse(w, x.dtype, sizes.rows)) return py::none();
  const bool fits = matrix && fusable(Product::kForward, w, x.dtype, call.training) && fusable_activation(*matrix);
  const Path path = path_for(w, x.dtype, sizes.rows, fits);
  if (path != Path::kFused) {
    const py::object weight = weight_of(layer, *operands, path);
    if (weight.is_none()) return weight;
    py::object y = stock_linear(layer.input, weight, layer.bias);
    return x.ndim() == 2 || y.is_none() ? y : owned(y);  // of other shapes it is a view of its matrix
  }
  if (!readable(layer, *operands)) return py::none();
  Ints shape(x.sizes.begin(), x.sizes.end());
  shape.back() = sizes.outputs;
  const Span result(shape.data(), shape.size());
  const Ints strides = contiguous_strides(result);
  py::object y = fresh(result, Span(strides.data(), strides.size()), x.dtype);
  void* const data = data_of(y);
  const py::gil_scoped_release released;
  fused_forward_into(w, *matrix, data_of(bias), sizes, data);
  return y;
}

py::object direct_conv2d(const Layer& layer, py::handle stride, py::handle padding, py::handle dilation,
                         py::handle groups, const Call& call) {
  Geometry geometry{};
  int overflow = 0;
  geometry.groups = is_int(groups.ptr()) ? PyLong_AsLongAndOverflow(groups.ptr(), &overflow) : 0;
  if (geometry.groups < 1 || overflow != 0 || !both_axes(stride, 1, geometry.stride) ||
      !both_axes(padding, 0, geometry.padding) || !both_axes(dilation, 1, geometry.dilation)) {
    return py::none();
  }
  const auto operands = borrow_layer(layer, call, 4);
  if (!operands) return py::none();
  const auto& [x, w, bias] = *operands;
  if (x.ndim() != 4 || w.weight.numel() == 0 || w.weight.sizes[0] % geometry.groups != 0 ||
      x.sizes[1] % geometry.groups != 0 || x.sizes[1] / geometry.groups != w.weight.sizes[1]) {
    return py::none();
  }
  const Images result = convolved(w.weight, x, geometry);
  if (result.sizes[2] < 1 || result.sizes[3] < 1) return py::none();
  const int64_t pixels = result.sizes[0] * result.sizes[2] * result.sizes[3];
  const Path path = path_for(w, x.dtype, pixels, fusable_convolution(w, x, geometry, call.training));
  if (path != Path::kFused) {
    const py::object weight = weight_of(layer, *operands, path);
    if (weight.is_none()) return weight;
    return stock_conv2d(layer.input, weight, layer.bias, stride, padding, dilation, groups);
  }
  if (!readable(layer, *operands)) return py::none();
  py::object y = fresh(Span(result.sizes.data(), 4), Span(result.strides.data(), 4), x.dtype);
  void* const data = data_of(y);
  const py::gil_scoped_release released;
  fused_convolution_into(w, x, data_of(bias), geometry, result, data);
  return y;
}

}  // namespace taps
