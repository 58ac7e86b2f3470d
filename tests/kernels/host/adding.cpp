// What adds splits is forced otherwise between a product's plan and its launch, as another thread may do it: the launch
// keeps to the plan, and so to the memory that was taken for it.
#include "launch.cpp"
#include "linear_case.h"

using namespace host;  // NOLINT

namespace {

std::string forced_between(Product kind, const char* before, const char* after) {
  const bool forward = kind == Product::kForward;
  Problem problem{7, 32, 8192};  // so deep that either way splits it
  if (!forward) problem = {20, 4096, 64};
  Tensors<bf16, float, float> t(problem);
  const int64_t columns = forward ? problem.n : problem.k, depth = forward ? problem.k : problem.n;
  Filled<bf16> out(problem.m, columns, 0, 0, t.random, 0.0f);
  t.args.delta = t.delta.matrix(), t.args.result = out.data, t.args.ld_result = out.ld;
  (forward ? t.args.x : t.args.dy) = forward ? t.x.matrix() : t.dy.matrix();
  taps::force_adding(before);
  const taps::LinearPlan planned = taps::cuda::plan_linear(kind, t.args, 0);
  taps::force_adding(after);
  std::vector<float> memory(static_cast<std::size_t>(planned.bytes) / 4, std::numeric_limits<float>::quiet_NaN());
  t.args.memory = memory.data();
  taps::cuda::linear(kind, t.args, planned, 0, nullptr);
  taps::force_adding("");
  if ((planned.bytes > 0) != (std::string(before) == "kernel")) return std::string(before) + ": expected splits";
  for (int64_t r = 0; r < problem.m; ++r) {
    for (int64_t c = 0; c < columns; c += 5) {
      double want = 0.0, size = 0.0;
      for (int64_t i = 0; i < depth; ++i) {
        const double product = forward ? t.x(r, i) * t.weight_t(problem, c, i) : t.dy(r, i) * t.weight_t(problem, i, c);
        want += product, size += std::fabs(product);
      }
      if (!(std::fabs(out(r, c) - want) <= bound<bf16>(depth + 16, size, want)))
        return differs(problem, r, c, want, out(r, c));
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(forward) {
  std::string wrong = forced_between(Product::kForward, "cluster", "kernel");
  return wrong.empty() ? forced_between(Product::kForward, "kernel", "cluster") : wrong;
}
TAPS_CASE(input_gradient) { return forced_between(Product::kInputGradient, "cluster", "kernel"); }

int main() { return run_all(); }
