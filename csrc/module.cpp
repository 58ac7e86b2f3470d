// The pybind11 module: build facts, the choice of path, the instruction set, the workspace.
// Importing it registers the ops (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "core/choose.h"
#include "core/device.h"
#include "core/python.h"
#include "core/weight.h"
#include "core/workspace.h"
#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch_built_against"] = TAPS_BUILD_TORCH;
  info["torch_target"] =
      std::to_string((TORCH_TARGET_VERSION >> 56) & 0xff) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
#ifdef TAPS_WITH_CUDA
  py::dict cuda;
  cuda["version"] = TAPS_CUDA_VERSION;
  cuda["architectures"] = TAPS_CUDA_ARCHS;
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  info["isas"] = taps::cpu::isas_built();
  info["isa"] = taps::cpu::isa();
  return info;
}

taps::Stock stock_of(const std::string& name) {
  if (name == "usual") return taps::Stock::kUsual;
  if (name == "halved") return taps::Stock::kHalved;
  if (name == "emulated") return taps::Stock::kEmulated;
  if (name == "matrix unit") return taps::Stock::kMatrixUnit;
  throw std::runtime_error("stock: expected usual, halved, emulated or matrix unit, got " + name);
}

// One rule of choose(), in Python's words; a bound that is none is None.
py::dict told(const taps::Rule& rule) {
  constexpr std::array<const char*, 5> kStocks{"usual", "halved", "emulated", "matrix unit", "unmatched"};
  constexpr std::array<const char*, 3> kWidths{"narrow", "wide", "pairs"};
  const auto named = [](uint8_t bits, const auto& names) {
    py::list found;
    for (size_t at = 0; at < names.size(); ++at) {
      if (bits >> at & 1) found.append(names[at]);
    }
    return found;
  };
  const auto most = [](long long bound) {
    return bound == taps::rules::kAll ? py::object(py::none()) : py::object(py::int_(bound));
  };
  py::dict facts;
  facts["key"] = rule.key;
  facts["predicted"] = rule.mark == taps::Mark::kPredicted;
  facts["of"] = rule.of == taps::Of::kGradient ? "gradient" : rule.of == taps::Of::kDepthwise ? "depthwise" : "product";
  facts["cuda"] = rule.cuda;
  facts["stocks"] = named(rule.stocks, kStocks);
  facts["widths"] = named(rule.widths, kWidths);
  facts["least_outputs"] = rule.least_outputs;
  facts["least_rows"] = rule.least_rows;
  facts["most_rows"] = most(rule.most_rows);
  facts["least_places"] = rule.least_places;
  facts["most_places"] = most(rule.most_places);
  facts["most_inputs"] = most(rule.most_inputs);
  facts["least_weights"] = rule.least_weights;
  facts["least_work"] = rule.least_work;
  return facts;
}

py::list choose_rules() {
  py::list all;
  for (const taps::Rule& rule : taps::rules::kTable) all.append(told(rule));
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of taps_ext; importing it registers torch.ops.taps_ext.*";
  taps::meet_torch();

  m.def("build_info", &build_info, "What this binary was built from and what it selected here.");

  m.def("workspace_bytes", &taps::workspace_bytes, "Bytes held in workspaces of the CPU.");
  m.def("workspace_clear", &taps::workspace_clear, "Free the workspaces that are not in use.");

  m.def(
      "linear",
      [](py::handle input, py::handle weight, py::handle delta, py::handle score, py::handle bias, bool gate,
         bool training, bool outermost) {
        return taps::direct_linear({input, weight, delta, score, bias}, {gate, training, outermost});
      },
      "What gated_linear gives, or None where the operator must do it.");
  m.def(
      "conv2d",
      [](py::handle input, py::handle weight, py::handle delta, py::handle score, py::handle bias, py::handle stride,
         py::handle padding, py::handle dilation, py::handle groups, bool gate, bool training, bool outermost) {
        const taps::Call call{gate, training, outermost};
        return taps::direct_conv2d({input, weight, delta, score, bias}, stride, padding, dilation, groups, call);
      },
      "What gated_conv2d gives, or None where the operator must do it.");
  m.def("isa", &taps::cpu::isa, "The instruction set that the CPU kernels use.");
  m.def("isas", &taps::cpu::isas, "The ones that this machine can run, best first.");
  m.attr("most_places") = taps::kMostPlaces;
  m.attr("twin") = taps::cuda::kTwin;
  m.def(
      "force_isa", [](std::optional<std::string> name) { taps::cpu::force_isa(name.value_or("")); }, py::arg("name"),
      "Use this instruction set; None returns to the best one. For tests.");

  m.def(
      "choose",
      [](bool open, bool same_dtype, long long rows, long long outputs, long long inputs, bool cuda, bool fusable,
         bool narrow, long long places, std::optional<std::string> stock, std::optional<bool> wide,
         std::optional<bool> pairs, bool depthwise) {
        taps::Problem problem;
        problem.cuda = cuda;
        problem.open = open;
        problem.same_dtype = same_dtype;
        problem.fusable = fusable;
        taps::set_product(problem, narrow ? taps::Dtype::kBFloat16 : taps::Dtype::kFloat32, places);
        if (stock) problem.stock = stock_of(*stock);
        problem.wide = wide.value_or(problem.wide);
        problem.pairs = pairs.value_or(problem.pairs);
        problem.rows = rows;
        problem.outputs = outputs;
        problem.inputs = inputs;
        problem.depthwise = depthwise;
        return std::string(taps::name_of(taps::checked_path(problem)));
      },
      py::kw_only(), py::arg("open"), py::arg("same_dtype") = true, py::arg("rows") = 0, py::arg("outputs") = 0,
      py::arg("inputs") = 0, py::arg("cuda") = false, py::arg("fusable") = false, py::arg("narrow") = false,
      py::arg("places") = 0, py::arg("stock") = py::none(), py::arg("wide") = py::none(), py::arg("pairs") = py::none(),
      py::arg("depthwise") = false,
      "The path that a layer with these facts takes: 'stock', 'rebuild' or 'fused'; what choose.h wants to know of the "
      "machine is this one's, or what `stock`, `wide` and `pairs` say.");
  m.def(
      "fused_bytes",
      [](bool convolution, bool narrow, int64_t rows, int64_t inputs) {
        taps::Convolution product;
        product.compute = narrow ? taps::Dtype::kBFloat16 : taps::Dtype::kFloat32;
        product.rows = rows;
        product.inputs = product.x.ld = inputs;
        return convolution ? taps::cpu::conv2d_bytes(product) : taps::cpu::linear_bytes(product);
      },
      py::kw_only(), py::arg("convolution"), py::arg("narrow"), py::arg("rows"), py::arg("inputs"),
      "Bytes of the workspace that a fused product on the CPU takes for its rows.");
  m.def(
      "taken_path",
      []() -> std::optional<std::string> {
        const int path = std::exchange(taps::taken_path().path, -1);
        if (path < 0) return std::nullopt;
        return std::string(taps::name_of(static_cast<taps::Path>(path)));
      },
      "The path of this thread's last product with W_t, or None if there was none since the last call.");
  m.def(
      "taken_by_prediction", [] { return taps::taken_path().predicted; },
      "Whether a predicted threshold, none that was measured, had a say in that path.");
  m.def("choose_rules", &choose_rules, "The rules of choose(), in their order.");
  m.def(
      "force_path", [](std::optional<std::string> path) { taps::force_path(path.value_or("")); }, py::arg("path"),
      "Make every layer take this path; None lets choose() decide. For tests.");
  m.def(
      "choose_mixing",
      [](bool addable, bool fused, long long rows, long long outputs, long long inputs) {
        return std::string(taps::name_of(taps::choose_mixing({addable, fused, rows, outputs, inputs})));
      },
      py::kw_only(), py::arg("addable"), py::arg("fused"), py::arg("rows"), py::arg("outputs"), py::arg("inputs"),
      "How an open task's rows of a mixed batch are multiplied: 'own' or 'apart'.");
  m.def(
      "force_adding", [](std::optional<std::string> name) { taps::force_adding(name.value_or("")); }, py::arg("adding"),
      "What adds the sums of a linear layer's product whose depth is split over blocks on CUDA: kernel, cluster (up to "
      "eight splits, fewer on a slice of a device), or None for what the device has.");
  m.def(
      "force_mixing", [](std::optional<std::string> name) { taps::force_mixing(name.value_or("")); }, py::arg("mixing"),
      "Make every open task of a mixed batch that may take this road; None lets choose_mixing() decide. For tests.");
}
