#include "core/python.h"

#include <algorithm>
#include <array>
#include <utility>

#include "core/walk.h"

// Plain C with an ABI of its own, so it may pass where the target version keeps torch's C++ out.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace py = pybind11;

namespace taps {

namespace {

// Functions of torch._C without arguments.
constexpr std::array<const char*, 6> kQuestions{"_is_any_autocast_enabled",  "_are_functorch_transforms_active",
                                                "_len_torch_dispatch_stack", "_len_torch_function_stack",
                                                "_get_tracing_state",        "_autograd._profiler_enabled"};
constexpr size_t kOutermostQuestions = 2;  // the first of them

// Everything of torch that is asked for on a call, looked up once. Held for the life of the process.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* storage_offset = nullptr;
  PyObject* data = nullptr;
  PyObject* linear = nullptr;
  PyObject* conv2d = nullptr;
  PyObject* empty_strided = nullptr;
  PyObject* keywords = nullptr;  // ("dtype", "device"), and what they are given
  PyObject* cpu = nullptr;
  std::array<PyObject*, 4> dtypes{};  // by Dtype
  std::array<PyObject*, kQuestions.size()> questions{};
  const DLPackExchangeAPI* table = nullptr;
};

Torch& torch() {
  static Torch torch;
  return torch;
}

py::object found(py::object owner, std::string name) {
  for (size_t dot; (dot = name.find('.')) != std::string::npos; name.erase(0, dot + 1)) {
    owner = owner.attr(name.substr(0, dot).c_str());
  }
  return owner.attr(name.c_str());
}

// Whether the answer is anything but False, 0 and None.
bool asked(PyObject* question) {
  PyObject* answer = PyObject_CallNoArgs(question);
  const int truth = answer ? PyObject_IsTrue(answer) : -1;
  Py_XDECREF(answer);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

bool known_type(DLDataType type, Dtype& dtype) {
  if (type.lanes != 1) return false;
  const int code = type.code, bits = type.bits;
  if (code == kDLBfloat && bits == 16) {
    dtype = Dtype::kBFloat16;
  } else if (code == kDLFloat && (bits == 16 || bits == 32 || bits == 64)) {
    dtype = bits == 16 ? Dtype::kFloat16 : bits == 32 ? Dtype::kFloat32 : Dtype::kFloat64;
  } else {
    return false;
  }
  return true;
}

// What a tensor of lent memory points back to.
struct Loan {
  DLManagedTensorVersioned managed{};
  std::unique_ptr<Lease> lease;
  std::array<int64_t, kMaxDims> sizes{}, strides{};
};

py::object or_none(PyObject* result) {
  if (result) return py::reinterpret_steal<py::object>(result);
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
  PyErr_Clear();
  return py::none();
}

// Where a storage has been freed, torch adds the offset of a view to a null pointer. Few processes have memory below
// this; there the exact question costs a call more.
constexpr uintptr_t kSuspicious = uintptr_t{1} << 44;

}  // namespace

void meet_torch() {
  const py::module_ module = py::module_::import("torch"), core = py::module_::import("torch._C");
  const py::object tensor = module.attr("Tensor"), parameter = py::module_::import("torch.nn").attr("Parameter");
  Torch met;
  met.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  met.parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  const py::object functional = py::module_::import("torch.nn.functional");
  met.linear = py::object(functional.attr("linear")).release().ptr();
  met.conv2d = py::object(functional.attr("conv2d")).release().ptr();
  met.empty_strided = py::object(module.attr("empty_strided")).release().ptr();
  met.keywords = py::make_tuple("dtype", "device").release().ptr();
  met.cpu = module.attr("device")("cpu").release().ptr();
  for (const Dtype known : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    met.dtypes[static_cast<size_t>(known)] = py::object(module.attr(to_string(known).c_str())).release().ptr();
  }
  met.is_neg = py::str("is_neg").release().ptr();
  met.data = py::str("data").release().ptr();
  met.storage_offset = py::str("storage_offset").release().ptr();
  for (size_t at = 0; at < kQuestions.size(); ++at) {
    met.questions[at] = found(core, kQuestions[at]).release().ptr();
  }
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  met.table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!met.table) throw py::error_already_set();
  while (met.table && met.table->header.version.major != DLPACK_MAJOR_VERSION) {
    met.table = reinterpret_cast<const DLPackExchangeAPI*>(met.table->header.prev_api);
  }
  if (!met.table || !met.table->dltensor_from_py_object_no_sync || !met.table->managed_tensor_to_py_object_no_sync) {
    throw std::runtime_error("torch: expected an exchange API of DLPack 1 that borrows and takes tensors");
  }
  torch() = met;
}

bool watched(bool outermost) {
  const auto& questions = torch().questions;
  for (size_t at = outermost ? 0 : kOutermostQuestions; at < questions.size(); ++at) {
    if (asked(questions[at])) return true;
  }
  return false;
}

bool borrow(py::handle tensor, Described& borrowed) {
  const Torch& known = torch();
  const PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (type != known.tensor && type != known.parameter) return false;
  DLTensor view;
  if (known.table->dltensor_from_py_object_no_sync(tensor.ptr(), &view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view.device.device_type != kDLCPU || view.ndim > kMaxDims || !known_type(view.dtype, borrowed.dtype))
    return false;
  borrowed.pointer = view.data ? static_cast<char*>(view.data) + view.byte_offset : nullptr;
  borrowed.sizes = Span(view.shape, static_cast<size_t>(view.ndim));
  borrowed.strides = Span(view.strides, static_cast<size_t>(view.ndim));
  return true;
}

bool has_memory(py::handle tensor, const Described& borrowed) {
  if (!borrowed.pointer) return borrowed.numel() == 0;
  const auto address = reinterpret_cast<uintptr_t>(borrowed.pointer);
  if (address >= kSuspicious) return true;
  const auto offset =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), torch().storage_offset));
  if (!offset) throw py::error_already_set();
  return address != offset.cast<uintptr_t>() * static_cast<uintptr_t>(size_of(borrowed.dtype)) || borrowed.numel() == 0;
}

bool negates(py::handle tensor) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), torch().is_neg));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

py::object lend(std::unique_ptr<Lease> lease, Span sizes, Span strides, Dtype dtype) {
  auto loan = std::make_unique<Loan>();
  loan->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  loan->managed.manager_ctx = loan.get();
  loan->managed.deleter = [](DLManagedTensorVersioned* managed) { delete static_cast<Loan*>(managed->manager_ctx); };
  DLTensor& view = loan->managed.dl_tensor;
  view.data = lease->data();
  view.device = {kDLCPU, 0};
  view.ndim = static_cast<int32_t>(sizes.size());
  view.dtype = {static_cast<uint8_t>(dtype == Dtype::kBFloat16 ? kDLBfloat : kDLFloat),
                static_cast<uint8_t>(8 * size_of(dtype)), 1};
  std::copy(sizes.begin(), sizes.end(), loan->sizes.begin());
  std::copy(strides.begin(), strides.end(), loan->strides.begin());
  view.shape = loan->sizes.data();
  view.strides = loan->strides.data();
  loan->lease = std::move(lease);
  void* tensor = nullptr;
  if (torch().table->managed_tensor_to_py_object_no_sync(&loan.release()->managed, &tensor) != 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
}

py::object fresh(Span sizes, Span strides, Dtype dtype) {
  const auto tuple = [](Span values) {
    py::tuple made(values.size());
    for (size_t at = 0; at < values.size(); ++at) made[at] = py::int_(values[at]);
    return made;
  };
  const Torch& known = torch();
  const py::tuple shape = tuple(sizes), steps = tuple(strides);
  PyObject* const arguments[4] = {shape.ptr(), steps.ptr(), known.dtypes[static_cast<size_t>(dtype)], known.cpu};
  PyObject* made = PyObject_Vectorcall(known.empty_strided, arguments, 2, known.keywords);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::object owned(py::handle result) {
  PyObject* data = PyObject_GetAttr(result.ptr(), torch().data);
  if (!data) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(data);
}

py::object stock_linear(py::handle input, py::handle weight, py::handle bias) {
  PyObject* const arguments[3] = {input.ptr(), weight.ptr(), bias.ptr()};
  return or_none(PyObject_Vectorcall(torch().linear, arguments, 3, nullptr));
}

py::object stock_conv2d(py::handle input, py::handle weight, py::handle bias, py::handle stride, py::handle padding,
                        py::handle dilation, py::handle groups) {
  PyObject* const arguments[7] = {input.ptr(),   weight.ptr(),   bias.ptr(),  stride.ptr(),
                                  padding.ptr(), dilation.ptr(), groups.ptr()};
  return or_none(PyObject_Vectorcall(torch().conv2d, arguments, 7, nullptr));
}

}  // namespace taps
