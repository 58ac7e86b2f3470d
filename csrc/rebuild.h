// The pieces that the ops are put together from, the same on every device: rebuild W_t into the
// workspace, copy with select and scale, the fixed-order dot product.
#pragma once

#include "core/check.h"
#include "core/choose.h"
#include "core/workspace.h"

namespace taps {

// Leased scratch memory shaped like a weight; the tensor is a view that must not outlive it.
struct Scratch {
  Lease lease;
  std::optional<Tensor> tensor;
};

void* stream_of(Place place);  // torch's current one; null on the CPU

Scratch scratch_like(const Described& weight, Dtype dtype);

// The weight that the layer multiplies with, in the compute type: W itself on the stock path, else
// round(W + g * Delta) in the workspace. `scratch` keeps the workspace leased.
Tensor layer_weight(const GatedWeight& w, Dtype compute, Path path, Scratch& scratch);

Path path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool fusable = false);
Path gradient_path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool fusable);

// out = scale * (weight + (gate ? delta : 0)); a missing operand counts as 0. The kernels' arguments, and the call.
Reconstruct reconstruction(const Described& out, const Described* weight, const Described* delta, const Gate& gate,
                           double scale = 1.0);
void reconstruct_into(const Described& out, const Described* weight, const Described* delta, const Gate& gate,
                      double scale = 1.0);

// What the choice depends on of a product's type and kind, on this machine.
void set_product(Problem& problem, Dtype compute, int64_t places);

// Whether the CPU's fused forward knows these types.
bool cpu_fuses(Dtype weight, Dtype delta, Dtype compute);

// Whether so many rows are worth fusing where types and layout allow it.
bool may_fuse(const GatedWeight& w, Dtype compute, int64_t rows);

// For callers without an operator's costs (direct.h), on the CPU: W_t of an open gate, the operands dense and of one
// layout. Null where the weight has no elements, and where the device's kernels run on the CPU.
std::unique_ptr<Lease> leased_weight(const GatedWeight& w, Dtype compute);

bool finite_score(const void* score, Dtype dtype);  // on the CPU

// A new tensor like `like` (dtype, dense strides) holding scale * from, or 0 where the gate is
// closed.
Tensor selected_like(const Described& like, const Described& from, const Gate& gate, double scale);

// scale * <a, b> as a tensor like the score. Differing layouts are walked, never copied.
Tensor dot_like(const Described& score, const Described& a, const Described& b, double scale);

// Raises where the delta of a closed layer holds Inf or NaN: its score would be lost. CPU only; on
// a GPU the look would synchronise, and a NaN score is caught where the gates are read.
void expect_finite_delta(const GatedWeight& w);

// The weight side of a backward op: what is asked for, and how G = dL/dW_t becomes it.
struct WeightSide {
  const GatedWeight& w;
  bool want_delta, want_score, want_weight;
  double scale;  // of the sampled gate gradient
  Dtype compute;
};

struct WeightGrads {
  OptionalTensor delta, score, weight;
};

// Where G was computed: in scratch memory, or in a tensor that may be a result itself.
enum class Holder { kScratch, kDelta, kWeight, kFresh };

// Picks a result that G can be computed into directly, else kScratch.
Holder holder_for(const WeightSide& side);

// ddelta = g * G, dscore = <G, Delta>, dweight = G, all times scale.
WeightGrads settle(const WeightSide& side, const Tensor& g, Holder holder);

}  // namespace taps
