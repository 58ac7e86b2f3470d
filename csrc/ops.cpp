// Every op's schema, once. W [N, K] or [O, I/groups, kH, kW], Delta like W, score one element,
// W_t = round(W + g * Delta) with g = 1[score >= threshold].
//
// `gate` is what the host knows of g; None reads the score, on a GPU without synchronising. A
// closed gate reads no byte of delta. Backward ops return (input, delta, score, bias, weight)
// gradients; one that `output_mask` does not ask for is empty, of shape [0]. With `rows` (samples of
// an image batch; rows of a matrix, the leading dimensions as one) the weight side is estimated from
// them alone, times `row_scale`, and `input` holds only them; input and bias gradients use
// everything. The forward ops take both for their gradient alone, where the host knows the gate to
// be closed and the weight needs no gradient of its own.
//
// The mixed ops are of T tasks: a Delta (None: that task is the base), a score and a gate (1, 0, or -1 where the score
// is read) for each. task_ids [B] is int64, unsorted, -1 for the base. What comes in has B times as many rows (images),
// one sample's behind the other. Their backward ops return (input, bias, weight, deltas', scores') gradients, as far as
// the masks ask for them, zeros for a task that has no samples.
#include "ops.h"

namespace taps {

namespace {

// Proves that a list of optional tensors arrives: the element count of each, -1 for None.
std::vector<int64_t> probe_optional_list(const std::vector<OptionalTensor>& deltas) {
  std::vector<int64_t> counts;
  for (const OptionalTensor& delta : deltas) counts.push_back(delta ? delta->numel() : -1);
  return counts;
}

// Proves that packed parts (values and a bitmap of another dtype) arrive with a codec's name.
std::vector<int64_t> probe_packed(const std::vector<Tensor>& parts, const std::string& codec) {
  std::vector<int64_t> bytes{static_cast<int64_t>(codec.size())};
  for (const Tensor& part : parts) {
    bytes.push_back(part.numel() * static_cast<int64_t>(part.element_size()));
  }
  return bytes;
}

}  // namespace
}  // namespace taps

STABLE_TORCH_LIBRARY(taps_ext, m) {
  // out <- round(W + g * Delta), in out's dtype; a closed gate selects W and never multiplies.
  m.def(
      "reconstruct(Tensor(a!) out, Tensor weight, Tensor? delta, Tensor? score, bool? gate, "
      "float threshold) -> ()");
  // The same for many tensors, on a GPU by one launch for 256 of them; gates hold 1, 0, or -1 where the score is read.
  m.def(
      "foreach_reconstruct(Tensor(a!)[] outs, Tensor[] weights, Tensor?[] deltas, Tensor?[] scores, int[] gates, "
      "float threshold) -> ()");
  // From the gradients G of many W_t: delta_gradients <- g * G, score_gradients <- <G, Delta>, also where closed; a
  // result that is not asked for is empty, and a Delta's may be its G itself. On a GPU by two launches for 256 of them.
  m.def(
      "foreach_settle(Tensor(a!)[] delta_gradients, Tensor(b!)[] score_gradients, Tensor[] gradients, Tensor[] deltas, "
      "Tensor?[] scores, int[] gates, float threshold) -> ()");
  // out <- round(W + g * Delta) of a packed Delta, without a tensor of it: `codes` are its bits or codes, `values` what
  // the bits stand for, or scales. On a CPU a bitmap must have as many bits as there are values; on a GPU, which is not
  // waited for, bits beyond the values stand for zeros.
  m.def(
      "unpack(Tensor(a!) out, Tensor weight, Tensor codes, Tensor values, str codec, Tensor? score, bool? gate, "
      "float threshold) -> ()");
  // What a codec makes of Delta, in tensors of its layout. As many values as a bitmask is given it holds: of the
  // largest magnitudes, of equal ones the first; where that is every element but positive zeros, negative ones too. On
  // a CPU.
  m.def("encode(Tensor delta, Tensor(a!) codes, Tensor(b!) values, str codec) -> ()");
  // y = x W_t^T + b of a packed Delta for few rows x [..., K] on a CPU, without W_t.
  m.def("packed_linear(Tensor input, Tensor weight, Tensor codes, Tensor values, str codec, Tensor? bias) -> Tensor");
  // y = x W_t^T + b for x [..., K]; closed with W in x's dtype it is aten::linear on W itself. On a CPU `training`
  // keeps it aten::linear on W_t, to the bit.
  m.def(
      "gated_linear(Tensor input, Tensor weight, Tensor? delta, Tensor? score, Tensor? bias, "
      "bool? gate, float threshold, Tensor? rows=None, float row_scale=1.0, bool training=False) -> Tensor");
  // Gradients of gated_linear; input may be None where no weight-side gradient is asked for.
  m.def(
      "gated_linear_backward(Tensor grad_output, Tensor? input, Tensor weight, Tensor? delta, "
      "Tensor? score, bool? gate, float threshold, bool[5] output_mask, Tensor? rows, "
      "float row_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // y = conv2d(x, W_t) + b for x [B, C, H, W] or [C, H, W]. On a CPU `training` keeps it aten::conv2d on W_t.
  m.def(
      "gated_conv2d(Tensor input, Tensor weight, Tensor? delta, Tensor? score, Tensor? bias, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool? gate, "
      "float threshold, Tensor? rows=None, float row_scale=1.0, bool training=False) -> Tensor");
  // Gradients of gated_conv2d; input_size is (H, W) of the input, which may itself be None.
  m.def(
      "gated_conv2d_backward(Tensor grad_output, Tensor? input, SymInt[2] input_size, "
      "Tensor weight, Tensor? delta, Tensor? score, bool? gate, float threshold, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool[5] output_mask, "
      "Tensor? rows, float row_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Each row of x [..., K] by the W_t of its sample's task. `training`: as in gated_linear, of each product by itself.
  m.def(
      "mixed_linear(Tensor input, Tensor weight, Tensor?[] deltas, Tensor?[] scores, Tensor task_ids, Tensor? bias, "
      "int[] gates, float threshold, bool training=False) -> Tensor");
  m.def(
      "mixed_linear_backward(Tensor grad_output, Tensor? input, Tensor weight, Tensor?[] deltas, Tensor?[] scores, "
      "Tensor task_ids, int[] gates, float threshold, bool[3] input_bias_weight, bool[] delta_mask, "
      "bool[] score_mask) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])");
  // Each image of x [k * B, C, H, W] by the W_t of its sample's task.
  m.def(
      "mixed_conv2d(Tensor input, Tensor weight, Tensor?[] deltas, Tensor?[] scores, Tensor task_ids, Tensor? bias, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, int[] gates, float threshold, "
      "bool training=False) -> Tensor");
  m.def(
      "mixed_conv2d_backward(Tensor grad_output, Tensor? input, SymInt[2] input_size, Tensor weight, "
      "Tensor?[] deltas, Tensor?[] scores, Tensor task_ids, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, int[] gates, float threshold, bool[3] input_bias_weight, bool[] delta_mask, "
      "bool[] score_mask) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])");
  // scales[t] * (x a[t]^T) b[t]^T for each row of x [..., K] of task t, a[t] [r_t, K] and b[t] [N, r_t] in x's dtype;
  // zeros for the base and where both are None. Its backward returns (input, a's, b's) gradients.
  m.def("mixed_lowrank(Tensor input, Tensor?[] a, Tensor?[] b, Tensor task_ids, float[] scales) -> Tensor");
  m.def(
      "mixed_lowrank_backward(Tensor grad_output, Tensor input, Tensor?[] a, Tensor?[] b, Tensor task_ids, "
      "float[] scales, bool input_mask, bool[] a_mask, bool[] b_mask) -> (Tensor, Tensor[], Tensor[])");
  // Patches (docs/patch.md, cpu/patch.h), on the CPU: vectors of uint8, in units of 1, 2, 4 or 8 bytes. A sum of 128
  // bits is told as two numbers.
  m.def("patch_sum(Tensor bytes, int first_word) -> int[]");
  m.def("patch_measure(Tensor before, Tensor after, int unit) -> int[]");
  m.def("patch_encode(Tensor before, Tensor after, Tensor(a!) index, Tensor(b!) values, int unit, int width) -> int[]");
  m.def("patch_check(Tensor? target, Tensor index, Tensor values, int unit, int units, int width) -> int[]");
  m.def("patch_prove(Tensor index, int count, int units, int width) -> int[]");
  m.def("patch_write(Tensor(a!) target, Tensor index, Tensor values, int unit, int width) -> int[]");
  // `swapped` gets fault, place, sum and count as five numbers: who is interrupted while he takes a result loses it.
  m.def(
      "patch_swap(Tensor(a!) target, Tensor index, Tensor values, Tensor(b!) old, Tensor(c!) swapped, int unit, "
      "int width) -> ()");
  // For the tests of the ABI alone.
  m.def("_probe_optional_list(Tensor?[] deltas) -> int[]");
  m.def("_probe_packed(Tensor[] parts, str codec) -> int[]");
}

// The same functions serve both devices; the kernels below them differ. Without CUDA kernels the
// CUDA registrations stay, so that the error says how to get them.
#define TAPS_REGISTER(device)                                                   \
  STABLE_TORCH_LIBRARY_IMPL(taps_ext, device, m) {                              \
    m.impl("reconstruct", TORCH_BOX(&taps::reconstruct));                       \
    m.impl("foreach_reconstruct", TORCH_BOX(&taps::foreach_reconstruct));       \
    m.impl("foreach_settle", TORCH_BOX(&taps::foreach_settle));                 \
    m.impl("unpack", TORCH_BOX(&taps::unpack));                                 \
    m.impl("gated_linear", TORCH_BOX(&taps::gated_linear));                     \
    m.impl("gated_linear_backward", TORCH_BOX(&taps::gated_linear_backward));   \
    m.impl("gated_conv2d", TORCH_BOX(&taps::gated_conv2d));                     \
    m.impl("gated_conv2d_backward", TORCH_BOX(&taps::gated_conv2d_backward));   \
    m.impl("mixed_linear", TORCH_BOX(&taps::mixed_linear));                     \
    m.impl("mixed_linear_backward", TORCH_BOX(&taps::mixed_linear_backward));   \
    m.impl("mixed_conv2d", TORCH_BOX(&taps::mixed_conv2d));                     \
    m.impl("mixed_conv2d_backward", TORCH_BOX(&taps::mixed_conv2d_backward));   \
    m.impl("mixed_lowrank", TORCH_BOX(&taps::mixed_lowrank));                   \
    m.impl("mixed_lowrank_backward", TORCH_BOX(&taps::mixed_lowrank_backward)); \
  }
TAPS_REGISTER(CPU)
TAPS_REGISTER(CUDA)
#undef TAPS_REGISTER

STABLE_TORCH_LIBRARY_IMPL(taps_ext, CPU, m) {
  m.impl("encode", TORCH_BOX(&taps::encode));
  m.impl("patch_sum", TORCH_BOX(&taps::patch_sum));
  m.impl("patch_measure", TORCH_BOX(&taps::patch_measure));
  m.impl("patch_encode", TORCH_BOX(&taps::patch_encode));
  m.impl("patch_check", TORCH_BOX(&taps::patch_check));
  m.impl("patch_prove", TORCH_BOX(&taps::patch_prove));
  m.impl("patch_write", TORCH_BOX(&taps::patch_write));
  m.impl("patch_swap", TORCH_BOX(&taps::patch_swap));
  m.impl("packed_linear", TORCH_BOX(&taps::packed_linear));
}

STABLE_TORCH_LIBRARY_IMPL(taps_ext, CompositeExplicitAutograd, m) {
  m.impl("_probe_optional_list", TORCH_BOX(&taps::probe_optional_list));
  m.impl("_probe_packed", TORCH_BOX(&taps::probe_packed));
}
