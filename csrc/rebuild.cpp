#include "rebuild.h"

#include "core/device.h"
#include "cpu/isa.h"

namespace taps {

void* stream_of(Place place) { return place.cuda ? cuda::current_stream(place.index) : nullptr; }

Scratch scratch_like(const Described& weight, Dtype dtype) {
  Scratch scratch;
  const Place place = weight.place;
  const size_t bytes = static_cast<size_t>(weight.numel() * size_of(dtype));
  scratch.lease = Lease(place.cuda, place.index, bytes);
  const Ints strides = dense_strides(weight);
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_create_tensor_from_blob(
                  scratch.lease.data(), weight.ndim(), weight.sizes.data(), strides.data(), 0, torch_dtype(dtype),
                  place.cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), place.index, &handle),
              "workspace view");
  scratch.tensor.emplace(handle);
  return scratch;
}

void set_product(Problem& problem, Dtype compute, int64_t places) {
  problem.narrow = size_of(compute) == 2;
  problem.places = places;
  if (problem.cuda) return;
  const cpu::Tiles& set = cpu::tiles();
  problem.wide = set.lanes >= 16;
  problem.pairs = set.pairs && compute == Dtype::kBFloat16;
  if (compute == Dtype::kBFloat16) {
    problem.stock = cpu::has_matrix_unit()     ? Stock::kMatrixUnit
                    : cpu::emulates_bfloat16() ? Stock::kEmulated
                                               : Stock::kUsual;
  } else if (compute == Dtype::kFloat32 && places == 0 && problem.wide && cpu::halves_matrix_products()) {
    problem.stock = Stock::kHalved;
  }
}

namespace {

Problem problem_of(const GatedWeight& w, Dtype compute, int64_t rows, bool fusable) {
  Problem problem;
  problem.cuda = w.weight.place.cuda;
  problem.open = !w.known_closed();
  problem.fusable = fusable;
  problem.same_dtype = w.weight.dtype == compute;
  set_product(problem, compute, w.weight.ndim() == 4 ? w.weight.sizes[2] * w.weight.sizes[3] : 0);
  problem.rows = rows;
  problem.outputs = w.weight.sizes[0];
  problem.inputs = problem.outputs ? w.weight.numel() / problem.outputs : 0;
  return problem;
}

}  // namespace

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

bool finite_score(const void* score, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? std::isfinite(*static_cast<const double*>(score))
                                  : std::isfinite(*static_cast<const float*>(score));
}

bool cpu_fuses(Dtype weight, Dtype delta, Dtype compute) {
  if (compute != Dtype::kFloat32 && compute != Dtype::kBFloat16) return false;
  if (weight != compute && weight != Dtype::kFloat32) return false;
  return delta == Dtype::kFloat32 || (delta == compute && weight == compute);
}

bool may_fuse(const GatedWeight& w, Dtype compute, int64_t rows) {
  return worth_fusing(problem_of(w, compute, rows, true)) || forced_path() == static_cast<int>(Path::kFused);
}

Path path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool fusable) {
  return chosen_path(problem_of(w, compute, rows, fusable));
}

Path gradient_path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool fusable) {
  Problem problem = problem_of(w, compute, rows, fusable);
  problem.cuda = cuda::runs(problem.cuda);  // these kernels run there alone
  return chosen_gradient_path(problem);
}

Tensor layer_weight(const GatedWeight& w, Dtype compute, Path path, Scratch& scratch) {
  if (path == Path::kStock) return *w.weight.tensor;
  if (!scratch.tensor) scratch = scratch_like(w.weight, compute);
  reconstruct_into(describe(*scratch.tensor, "workspace"), &w.weight, w.delta ? &*w.delta : nullptr, w.gate);
  return *scratch.tensor;
}

Reconstruct reconstruction(const Described& out, const Described* weight, const Described* delta, const Gate& gate,
                           double scale) {
  Reconstruct args;
  args.walk = make_walk<3>(out.sizes,
                           {out.strides, weight ? weight->strides : out.strides, delta ? delta->strides : out.strides});
  if (args.walk.numel == 0) return args;
  args.out = out.data();
  args.out_dtype = out.dtype;
  if (weight) {
    args.weight = weight->data();
    args.weight_dtype = weight->dtype;
  }
  if (delta) {
    args.delta = delta->data();
    args.delta_dtype = delta->dtype;
  }
  args.gate = gate;
  args.scale = scale;
  return args;
}

void reconstruct_into(const Described& out, const Described* weight, const Described* delta, const Gate& gate,
                      double scale) {
  const Reconstruct args = reconstruction(out, weight, delta, gate, scale);
  if (args.walk.numel == 0) return;
  if (cuda::runs(out.place.cuda)) {
    cuda::reconstruct(args, out.place.index, stream_of(out.place));
  } else {
    cpu::reconstruct(args);
  }
}

Tensor selected_like(const Described& like, const Described& from, const Gate& gate, double scale) {
  Tensor result = empty_like(like);
  reconstruct_into(describe(result, "result"), nullptr, &from, gate, scale);
  return result;
}

Tensor dot_like(const Described& score, const Described& a, const Described& b, double scale) {
  Tensor result = empty_like(score);
  Dot args;
  args.walk = make_walk<2>(a.sizes, {a.strides, b.strides});
  args.a = args.walk.numel ? a.data() : nullptr;
  args.b = args.walk.numel ? b.data() : nullptr;
  args.a_dtype = a.dtype;
  args.b_dtype = b.dtype;
  args.scale = scale;
  args.result = result.data_ptr();
  args.result_dtype = score.dtype;
  const int64_t chunks = dot_chunks(args.walk);
  if (cuda::runs(a.place.cuda)) {
    const int64_t size = chunks, stride = 1;
    const Tensor partials = empty_strided(Span(&size, 1), Span(&stride, 1), Dtype::kFloat64, a.place);
    args.partials = static_cast<double*>(partials.data_ptr());
    cuda::dot(args, a.place.index, stream_of(a.place));
  } else {
    std::vector<double> partials(static_cast<size_t>(chunks));
    args.partials = partials.data();
    cpu::dot(args);
  }
  return result;
}

void expect_finite_delta(const GatedWeight& w) {
  if (w.delta->place.cuda) return;
  const Walk<1> walk = make_walk<1>(w.delta->sizes, {w.delta->strides});
  if (walk.numel && !cpu::all_finite(walk, w.delta->data(), w.delta->dtype)) {
    fail(
        "delta: expected finite values in a closed layer during training, because its score's "
        "gradient is <G, delta>; got Inf or NaN");
  }
}

}  // namespace taps
