#include "core/weight.h"

#include "core/device.h"
#include "cpu/isa.h"

namespace taps {

void* stream_of(Place place) { return place.cuda ? cuda::current_stream(place.index) : nullptr; }

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

namespace {

// A small tensor in another type, its elements next to each other.
Tensor copied(const Described& from, Dtype dtype) {
  const Tensor copy = empty_strided(from.sizes, contiguous_strides(from.sizes), dtype, from.place);
  reconstruct_into(describe(copy, "copy"), &from, nullptr, Gate{});
  return copy;
}

}  // namespace

OptionalTensor checked_bias(const OptionalTensor& bias, const Described& weight, Dtype compute) {
  if (!bias) return std::nullopt;
  const Described described = describe(*bias, "bias");
  expect_shape(described, "bias", Span(weight.sizes.data(), 1));
  expect_place(described, "bias", weight, "weight");
  return described.dtype == compute ? *bias : copied(described, compute);
}

// --- which path ----------------------------------------------------------------------------------

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

Problem problem_of(const GatedWeight& w, Dtype compute, int64_t rows, bool known) {
  Problem problem;
  problem.cuda = w.weight.place.cuda;
  problem.open = !w.known_closed();
  problem.fusable = known;
  problem.same_dtype = w.weight.dtype == compute;
  set_product(problem, compute, w.weight.ndim() == 4 ? w.weight.sizes[2] * w.weight.sizes[3] : 0);
  problem.rows = rows;
  problem.outputs = w.weight.sizes[0];
  problem.inputs = problem.outputs ? w.weight.numel() / problem.outputs : 0;
  return problem;
}

}  // namespace

Path path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool known, bool depthwise) {
  Problem problem = problem_of(w, compute, rows, known);
  problem.depthwise = depthwise;
  return chosen_path(problem);
}

Path gradient_path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool known, bool depthwise) {
  Problem problem = problem_of(w, compute, rows, known);
  problem.depthwise = depthwise;
  problem.cuda = cuda::runs(problem.cuda);  // these kernels run there alone
  return chosen_gradient_path(problem);
}

bool may_fuse(const GatedWeight& w, Dtype compute, int64_t rows) {
  return worth_fusing(problem_of(w, compute, rows, true)) || forced_path() == static_cast<int>(Path::kFused);
}

// --- rebuilt -------------------------------------------------------------------------------------

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

Tensor layer_weight(const GatedWeight& w, Dtype compute, Path path, Scratch& scratch) {
  if (path == Path::kStock) return *w.weight.tensor;
  if (!scratch.tensor) scratch = scratch_like(w.weight, compute);
  reconstruct_into(describe(*scratch.tensor, "workspace"), &w.weight, w.delta ? &*w.delta : nullptr, w.gate);
  return *scratch.tensor;
}

// --- as the fused kernels take it ----------------------------------------------------------------

bool on_tiles(Place place) { return cuda::runs(place.cuda); }

bool cpu_fuses(Dtype weight, Dtype delta, Dtype compute) {
  if (compute != Dtype::kFloat32 && compute != Dtype::kBFloat16) return false;
  if (weight != compute && weight != Dtype::kFloat32) return false;
  return delta == Dtype::kFloat32 || (delta == compute && weight == compute);
}

bool tiles_fuse(Dtype weight, Dtype delta, Dtype compute) {
  if (size_of(compute) != 2 || (weight != compute && weight != Dtype::kFloat32)) return false;
  return delta == Dtype::kFloat32 || (delta == compute && weight == compute);
}

bool in_words(const void* data, int64_t step, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(data) % 4 == 0 && step * size_of(dtype) % 4 == 0;
}

bool in_rows(const Described& matrix) {
  const int64_t step = matrix.sizes[0] > 1 ? matrix.strides[0] : 0;
  if (matrix.ndim() != 2 || (matrix.strides[1] != 1 && matrix.sizes[1] != 1) || step < 0) return false;
  return !on_tiles(matrix.place) || in_words(matrix.data(), step, matrix.dtype);
}

Matrix matrix_of(const Described& matrix) {
  return {matrix.data(), matrix.sizes[0] > 1 ? matrix.strides[0] : 0};  // the only row may have any stride
}

void set_weight(LinearProduct& args, const GatedWeight& w, Dtype compute) {
  args.compute = compute;
  args.weight = matrix_of(w.weight);
  args.weight_dtype = w.weight.dtype;
  args.delta_dtype = w.known_closed() ? w.weight.dtype : w.delta->dtype;
  if (!w.known_closed()) args.delta = matrix_of(*w.delta);
  args.gate = w.gate;
}

OptionalTensor dense(const OptionalTensor& bias) {
  if (!bias) return std::nullopt;
  const Described vector = describe(*bias, "bias");
  return vector.numel() <= 1 || vector.strides[0] == 1 ? *bias : copied(vector, vector.dtype);
}

}  // namespace taps
