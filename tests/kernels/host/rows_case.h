// The forward of up to four rows on the twin, to the bit: products of 16-bit numbers are exact in fp32, so that the
// order of the sums is all there is to know.
#pragma once

#include "linear_case.h"

namespace host {

// `slices`: of the depth; 0: as planned for `multiprocessors`. Padding beside x, W and Delta, and offsets of their own.
struct FewRowsProblem : Problem {
  int slices = 0;
  int64_t paddings[3] = {}, offsets[3] = {};

  std::string name() const {
    return Problem::name() + " slices " + std::to_string(slices) + " x, W, Delta by " + std::to_string(paddings[0]) +
           "+" + std::to_string(offsets[0]) + ", " + std::to_string(paddings[1]) + "+" + std::to_string(offsets[1]) +
           ", " + std::to_string(paddings[2]) + "+" + std::to_string(offsets[2]);
  }
};

// A warp's lanes pairwise, then the slices in turn.
template <class Weight>
float sum_of(const Weight& term, int64_t depth, int64_t of_slice, int slices) {
  float total = 0.0f;
  for (int slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * of_slice, end = std::min(begin + of_slice, depth);
    float lanes[32] = {};
    for (int64_t at = begin; at < end; ++at) lanes[(at - begin) / 8 % 32] += term(at);
    for (int apart = 16; apart > 0; apart /= 2) {
      for (int lane = 0; lane < apart; ++lane) lanes[lane] += lanes[lane + apart];
    }
    total += lanes[0];
  }
  return total;
}

template <class Body, class T, class W, class D>
std::string check_rows(const FewRowsProblem& s) {
  Tensors<T, W, D> t(s);  // what is not a matrix; whose matrices lie where this problem wants them
  Filled<T> x(s.m, s.k, s.paddings[0], s.offsets[0], t.random, 1.0f), out(s.m, s.n, 1, 1, t.random, 0.0f);
  Filled<W> weight(s.n, s.k, s.paddings[1], s.offsets[1], t.random, 0.2f);
  Filled<D> delta(s.n, s.k, s.paddings[2], s.offsets[2], t.random, 0.2f);
  t.args.x = x.matrix(), t.args.weight = weight.matrix();
  if (s.gate != Known::kClosed) t.args.delta = delta.matrix();
  if (s.bias) t.args.bias = t.bias.data;
  t.args.result = out.data, t.args.ld_result = out.ld;
  const Grid grid = s.slices > 0 ? plan_rows(t.args, static_cast<unsigned>(s.slices))
                                 : plan(Product::kForward, t.args, {s.multiprocessors});
  if (grid.splits != 1 || grid.bytes != 0) return s.name() + ": expected a grid without splits";
  t.args.slices = static_cast<int>(grid.slices), t.args.depth_of_split = grid.depth_of_split;
  const auto found =
      twin::launch({grid.tiles}, Body::Tile::kThreads, Body::Loop::kShared, [&] { Body::run(t.args); }, s.seed);
  if (!found.empty()) return s.name() + none(found);
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t c = 0; c < s.n; ++c) {
      const auto term = [&](int64_t at) {
        const auto own = static_cast<float>(weight(c, at));
        const float sum = s.open() ? own + static_cast<float>(delta(c, at)) : own;
        return static_cast<float>(x(r, at)) * to_f32(from_f32<T>(sum));
      };
      float want = sum_of(term, s.k, grid.depth_of_split, t.args.slices);
      if (s.bias) want += static_cast<float>(t.bias(0, c));
      if (from_f32<T>(want).bits != out.data[r * out.ld + c].bits) return s.name() + differs(s, r, c, want, out(r, c));
    }
    if (r + 1 < s.m && out.data[r * out.ld + s.n].bits != 0xffff) return s.name() + ": expected what was between rows";
  }
  return "";
}

// The slices are added first to last: sums that are 2^24, 1, -2^24 and 1 make 1, and from the last 2.
inline std::string check_slices() {
  constexpr int64_t kDepth = 4 * Warps::kAlign;
  std::mt19937 random(1);
  Filled<bf16> x(1, kDepth, 0, 0, random, 0.0f), weight(2, kDepth, 0, 0, random, 0.0f), out(1, 2, 0, 0, random, 0.0f);
  const float sums[] = {0x1p24f, 1.0f, -0x1p24f, 1.0f};
  for (int slice = 0; slice < 4; ++slice) {
    x.data[slice * Warps::kAlign + 9 * slice] = from_f32<bf16>(sums[slice]);
    for (int output = 0; output < 2; ++output)
      weight.data[output * kDepth + slice * Warps::kAlign + 9 * slice] = from_f32<bf16>(1.0f);
  }
  LinearProduct args;
  args.rows = 1, args.outputs = 2, args.inputs = kDepth;
  args.x = x.matrix(), args.weight = weight.matrix(), args.result = out.data, args.ld_result = 2;
  const Grid grid = plan_rows(args, 4u);
  args.slices = static_cast<int>(grid.slices), args.depth_of_split = grid.depth_of_split;
  using Body = Rows<1, bf16, bf16, bf16>;
  const auto found = twin::launch({grid.tiles}, Body::Tile::kThreads, Body::Loop::kShared, [&] { Body::run(args); });
  if (!found.empty()) return none(found);
  if (out(0, 0) == 1.0 && out(0, 1) == 1.0) return "";
  return "expected 1, 1, got " + std::to_string(out(0, 0)) + ", " + std::to_string(out(0, 1));
}

}  // namespace host
