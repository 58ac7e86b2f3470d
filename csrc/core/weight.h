// The weight that a layer multiplies with, the same on every device: which path it takes, W_t rebuilt into the
// workspace for torch's own product, and W, Delta and gate as the kernels take them that need no W_t in memory.
#pragma once

#include <memory>

#include "core/check.h"
#include "core/choose.h"
#include "core/workspace.h"
#include "kernels.h"

namespace taps {

void* stream_of(Place place);  // torch's current one; null on the CPU

// out = scale * (weight + (gate ? delta : 0)); a missing operand counts as 0. The kernels' arguments, and the call.
Reconstruct reconstruction(const Described& out, const Described* weight, const Described* delta, const Gate& gate,
                           double scale = 1.0);
void reconstruct_into(const Described& out, const Described* weight, const Described* delta, const Gate& gate,
                      double scale = 1.0);

// In the compute type; a bias that is there already stays what it is.
OptionalTensor checked_bias(const OptionalTensor& bias, const Described& weight, Dtype compute);

// --- which path ----------------------------------------------------------------------------------

// What the choice depends on of a product's type and kind, on this machine.
void set_product(Problem& problem, Dtype compute, int64_t places);

// `known`: the fused kernels know the types, and the layout as far as it was looked at. `depthwise`: the kernels are
// those of depthwise convolutions.
Path path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool known = false, bool depthwise = false);
Path gradient_path_for(const GatedWeight& w, Dtype compute, int64_t rows, bool known, bool depthwise = false);

// Whether so many rows are fused where types and layout allow it.
bool may_fuse(const GatedWeight& w, Dtype compute, int64_t rows);

// --- rebuilt -------------------------------------------------------------------------------------

// Leased scratch memory shaped like a weight; the tensor is a view that must not outlive it.
struct Scratch {
  Lease lease;
  std::optional<Tensor> tensor;
};

Scratch scratch_like(const Described& weight, Dtype dtype);

// The weight that the layer multiplies with, in the compute type: W itself on the stock path, else
// round(W + g * Delta) in the workspace. `scratch` keeps the workspace leased.
Tensor layer_weight(const GatedWeight& w, Dtype compute, Path path, Scratch& scratch);

// --- as the fused kernels take it ----------------------------------------------------------------

bool on_tiles(Place place);                                // tile kernels run there (csrc/cuda), not the CPU's own
bool cpu_fuses(Dtype weight, Dtype delta, Dtype compute);  // the CPU's forward knows these types
bool tiles_fuse(Dtype weight, Dtype delta, Dtype compute);
bool in_words(const void* data, int64_t step, Dtype dtype);  // rows so many elements apart, for tiles to read
bool in_rows(const Described& matrix);  // elements of a row are next to each other; for tiles, to be read in words

Matrix matrix_of(const Described& matrix);
void set_weight(LinearProduct& args, const GatedWeight& w, Dtype compute);
OptionalTensor dense(const OptionalTensor& bias);  // elements next to each other

inline const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

}  // namespace taps
