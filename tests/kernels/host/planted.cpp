// A few cases of small tiles, to be compiled against csrc/cuda with a mistake planted in it: the test that does so
// expects a finding or a wrong result, and this program to pass without one.
#include "conv2d_case.h"
#include "depthwise_case.h"
#include "elementwise_case.h"
#include "linear_case.h"
#include "mixed_case.h"
#include "rows_case.h"
#include "unpack_case.h"

using namespace host;  // NOLINT

namespace {

using Small = Shape<32, 32, 32, 1, 2, 3>;
using Narrow = Shape<16, 32, 32, 1, 2, 4, 2>;
using Square = Shape<32, 32, 32, 2, 2, 3>;  // a piece of x for each thread

}  // namespace

TAPS_CASE(forward) {
  const Problem problems[] = {{33, 31, 130}, {32, 64, 96}, {5, 33, 65}, {17, 40, 160}, {9, 35, 72}};
  for (Problem problem : problems) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      problem.seed = seed;
      problem.gate = Known::kOpen, problem.bias = true;
      problem.padding = problem.m == 5 ? 3 : problem.m == 17 || problem.m == 9 ? 8 : 0;
      problem.splits = problem.m == 5 ? 2 : 1;
      std::string wrong = check<Forward<Small, bf16, bf16, float>, bf16, bf16, float>(Product::kForward, problem);
      problem.gate = Known::kClosed, problem.bias = false;
      if (wrong.empty())
        wrong = check<Forward<Small, bf16, bf16, float>, bf16, bf16, float>(Product::kForward, problem);
      problem.gate = Known::kRead;
      if (wrong.empty()) wrong = check<Forward<Narrow, bf16, bf16, bf16>, bf16, bf16, bf16>(Product::kForward, problem);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

TAPS_CASE(splits) { return check_splits(); }

TAPS_CASE(clusters) {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    Problem problem{33, 37, 130};  // tiles that end in rows and in columns
    problem.seed = seed, problem.bias = true, problem.padding = 1;
    problem.splits = seed == 1 ? 5 : 3;
    std::string wrong =
        check_clusters<Forward<Small, bf16, bf16, float>, bf16, bf16, float>(Product::kForward, problem);
    problem.m = 9;
    if (wrong.empty())
      wrong = check_clusters<Forward<Narrow, f16, f16, f16>, f16, f16, f16>(Product::kForward, problem);
    if (wrong.empty())  // in 16 bits few sums show their order
      wrong = check_clusters<Forward<Small, float, float, float>, float, float, float>(Product::kForward, problem);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

TAPS_CASE(rows) {
  FewRowsProblem problem;
  problem.seed = 1, problem.bias = true;
  for (const int64_t inputs : {2000, 776, 61}) {  // whole steps and a part of one; the depth ends in a piece
    problem.m = 3, problem.n = 9, problem.k = inputs, problem.slices = inputs == 61 ? 1 : 4;
    problem.gate = Known::kOpen;
    std::string wrong = check_rows<Rows<4, bf16, bf16, bf16>, bf16, bf16, bf16>(problem);
    if (wrong.empty()) wrong = check_rows<Rows<4, f16, float, float>, f16, float, float>(problem);
    problem.m = 1, problem.slices = 2;
    if (wrong.empty()) wrong = check_rows<Rows<1, bf16, bf16, float>, bf16, bf16, float>(problem);
    problem.gate = inputs == 61 ? Known::kClosed : Known::kRead, problem.score = 0.05;
    if (wrong.empty()) wrong = check_rows<Rows<1, f16, f16, f16>, f16, f16, f16>(problem);
    if (!wrong.empty()) return wrong;
  }
  problem.m = 2, problem.n = 3, problem.k = 61, problem.slices = 1, problem.gate = Known::kOpen;
  for (int64_t& padding : problem.paddings) padding = 3;  // rows on 16 bytes that end off them
  std::string wrong = check_rows<Rows<4, bf16, bf16, bf16>, bf16, bf16, bf16>(problem);
  if (wrong.empty()) wrong = check_slices();
  if (!wrong.empty()) return wrong;
  for (int64_t& padding : problem.paddings) padding = 0;
  problem.k = 264;
  for (int64_t& offset : problem.offsets) {  // one of x, W and Delta off 16 bytes, then off 4
    for (const int64_t elements : {2, 1}) {
      offset = elements;
      wrong = check_rows<Rows<4, bf16, bf16, bf16>, bf16, bf16, bf16>(problem);
      if (!wrong.empty()) return wrong;
    }
    offset = 0;
  }
  return "";
}

TAPS_CASE(input_gradient) {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    Problem problem{33, 130, 31};
    problem.seed = seed;
    std::string wrong =
        check<InputGradient<Small, bf16, bf16, float>, bf16, bf16, float>(Product::kInputGradient, problem);
    Problem padded{33, 128, 35};  // rows on 16 bytes that end off them
    padded.padding = 5;
    if (wrong.empty())
      wrong = check<InputGradient<Small, bf16, bf16, float>, bf16, bf16, float>(Product::kInputGradient, padded);
    if (wrong.empty())  // columns that end in a tile, on 16 bytes
      wrong = check<InputGradient<Small, bf16, bf16, float>, bf16, bf16, float>(Product::kInputGradient, {33, 128, 40});
    problem.splits = 2;
    if (wrong.empty())
      wrong = check<InputGradient<Narrow, f16, f16, f16>, f16, f16, f16>(Product::kInputGradient, problem);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

TAPS_CASE(weight_gradient) {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    Problem problem{100, 33, 31};  // the last stage is the first in memory
    problem.seed = seed, problem.scale = 2.0;
    std::string wrong = check_weight<WeightGradient<Small, bf16, float>, bf16, float>(problem);
    if (wrong.empty()) wrong = check_weight<WeightGradient<Small, bf16, float>, bf16, float>({40, 33, 32});
    for (const int64_t odd : {0, 1}) {  // whole tiles whose rows, or whose first element, cannot be read in pairs
      Problem apart{20, 40, 70};
      apart.padding = odd, apart.offset = 1 - odd, apart.exact = true;
      for (const bool result : {true, false}) {
        apart.result = result;
        if (wrong.empty()) wrong = check_weight<WeightGradient<Small, bf16, float>, bf16, float>(apart);
      }
    }
    problem.gate = Known::kClosed;
    if (wrong.empty()) wrong = check_weight<WeightGradient<Small, bf16, float>, bf16, float>(problem);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

TAPS_CASE(convolution) {
  const Geometry apart{{2, 3}, {2, 1}, {0, 1}, {1, 2}}, padded{{3, 2}, {1, 2}, {2, 1}, {2, 1}};
  for (uint64_t seed = 0; seed < 2; ++seed) {
    // The last line of the first is seen by nobody; tiles of several images; less than a stage to a place.
    Image images[] = {{2, 8, 5, 4, 31, apart}, {2, 16, 5, 6, 33, padded}, {1, 40, 3, 7, 9, padded}};
    for (Image& image : images) {
      image.seed = seed, image.bias = true;
      image.splits = image.channels == 40 ? 2 : 1;
      std::string wrong = check_convolution<Convolved<Square, bf16, bf16, float>, bf16, bf16, float>(image);
      image.splits = 3, image.gate = Known::kRead;
      if (wrong.empty()) wrong = check_convolution<Convolved<Narrow, bf16, bf16, bf16>, bf16, bf16, bf16>(image);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

TAPS_CASE(elementwise) {
  std::string wrong;
  for (const How how : {How::kOpen, How::kReadClosed, How::kClosed}) {
    if (wrong.empty()) wrong = check_flat(Dtype::kBFloat16, Dtype::kFloat32, Dtype::kBFloat16, 2061, 0, how);
    if (wrong.empty())
      wrong = check_flat(Dtype::kFloat64, Dtype::kFloat16, Dtype::kFloat64, 29, how == How::kOpen ? 0 : 1, how);
  }
  if (wrong.empty())
    wrong = check_flat(Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat16, 16384 + 5, 0, How::kReadOpen, 2.5, true);
  if (wrong.empty()) wrong = check_strided(Dtype::kFloat16, 5, 7, 9, How::kOpen);
  if (wrong.empty()) wrong = check_strided(Dtype::kFloat16, 37, 67, 1, How::kReadOpen, true);
  if (wrong.empty()) wrong = check_flat(Dtype::kFloat64, Dtype::kFloat64, Dtype::kFloat64, 9, 0, How::kOpen, 0.1);
  if (wrong.empty()) wrong = check_gates();
  if (wrong.empty()) wrong = check_foreach({16384, 5, 0, 16391, 8}, false, 1);
  for (uint64_t seed = 0; seed < 12 && wrong.empty(); ++seed)
    wrong = check_settle({16391, 17325, 8, 3, 29}, seed % 2, seed);
  return wrong;
}

TAPS_CASE(products) {
  std::vector<double> sums(300, 1.0);
  double total = 0.0;
  const auto found =
      twin::launch({1}, kThreads, kDotShared, [&] { dot_finish(sums.data(), 300, 1.0, &total, Dtype::kFloat64); });
  if (!found.empty()) return none(found);
  if (total != 300.0) return "expected 300, got " + std::to_string(total);
  std::string wrong = check_dot(Dtype::kFloat32, Dtype::kBFloat16, 1, 16391, 0, 0);
  if (wrong.empty()) wrong = check_dot(Dtype::kFloat64, Dtype::kFloat16, 1, 77, 0, 1);
  if (wrong.empty()) wrong = check_dot(Dtype::kFloat32, Dtype::kFloat32, 301, 71, 3, 0);
  return wrong;
}

TAPS_CASE(packed) {
  for (const Codec codec : kCodecs) {
    for (const int64_t offset : {0, 1}) {
      Packing p{codec, 13, 71, Dtype::kBFloat16, Dtype::kBFloat16};
      p.codes_offset = offset;
      std::string wrong = check_unpack(p);
      p.how = How::kReadClosed, p.rows = 2, p.columns = kUnpackTile + 3;
      if (wrong.empty()) wrong = check_unpack(p);
      if (!wrong.empty()) return wrong;
    }
  }
  for (const int64_t missing : {0, 900}) {
    Packing p{Codec::kBitmask, 1, 5 * kUnpackTile + 3};
    p.chunk = 2 * kUnpackTile, p.share = 0.9, p.missing = missing, p.seed = 1;
    if (std::string wrong = check_unpack(p); !wrong.empty()) return wrong;
  }
  return "";
}

TAPS_CASE(depthwise_activations) {
  for (const Product product : {Product::kForward, Product::kInputGradient}) {
    Images many{3, 64, 7, 9, 3, 1, 1, 1, 1};  // several strips to a thread
    many.splits = 1;
    if (std::string wrong = check_depthwise<bf16, bf16, bf16>(product, many); !wrong.empty()) return wrong;
    Images problems[] = {{2, 24, 5, 10, 3, 1, 1, 1, 1}, {1, 13, 6, 7, 3, 2, 2, 1, 1}, {1, 8, 7, 5, 5, 1, 2, 2, 2}};
    for (Images& s : problems) {
      s.bias = true, s.padding = 2, s.splits = 3, s.seed = static_cast<uint64_t>(s.kernel);
      std::string wrong = check_depthwise<bf16, bf16, float>(product, s);
      s.gate = Known::kRead, s.score = 0.05, s.bias = false, s.splits = 0;
      if (wrong.empty()) wrong = check_depthwise<bf16, bf16, bf16>(product, s);
      s.gate = Known::kReadDouble, s.score = 0.2, s.offset = 1;
      if (wrong.empty()) wrong = check_depthwise<f16, f16, float>(product, s);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

TAPS_CASE(depthwise_weight) {
  Images many{3, 64, 7, 9, 3, 1, 1, 1, 1};
  many.splits = 1;
  if (std::string wrong = check_depthwise_weight<bf16, bf16>(many); !wrong.empty()) return wrong;
  Images problems[] = {{2, 24, 5, 10, 3, 1, 1, 1, 1}, {1, 13, 6, 7, 3, 2, 2, 1, 1}, {1, 8, 7, 5, 5, 1, 2, 2, 2}};
  for (Images& s : problems) {
    s.padding = 2, s.splits = s.kernel == 3 && s.stride_w == 1 ? 40 : 3, s.scale = 2.5;
    std::string wrong = check_depthwise_weight<bf16, float>(s);
    s.gate = Known::kRead, s.score = 0.05, s.splits = 0;
    if (wrong.empty()) wrong = check_depthwise_weight<bf16, bf16>(s);
    s.offset = 1, s.gate = Known::kOpen, s.seed = 1;
    if (wrong.empty()) wrong = check_depthwise_weight<f16, float>(s);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

namespace {

Mix mixed_batch() {
  Mix s;
  s.tasks = {Stand::kOpen, Stand::kReadDouble, Stand::kJoins, Stand::kRead, Stand::kOpen, Stand::kClosed};
  s.ids = {3, 0, -1, 6, 3, 1, 5, 0, 2, -2, 4, 0, -1, 3, 0, 5};
  s.each = 3, s.n = 33, s.k = 136, s.bias = true, s.spoiled = false;
  return s;
}

}  // namespace

TAPS_CASE(mixed_order) {
  for (const int64_t samples : {0, 40, 1030}) {  // more than are looked at at once
    Mix s;
    s.tasks = {Stand::kOpen, Stand::kJoins, Stand::kClosed};
    for (int64_t i = 0; i < samples; ++i) s.ids.push_back(i * 5 % 7 - 2);
    s.each = 3, s.n = s.k = 1, s.ids_step = 2, s.seed = static_cast<uint64_t>(samples % 4);
    if (std::string wrong = check_order(s, 16); !wrong.empty()) return wrong;
  }
  return "";
}

TAPS_CASE(mixed_products) {
  for (uint64_t seed = 0; seed < 2; ++seed) {
    for (const int64_t padding : {0, 1, 2}) {
      Mix s = mixed_batch();
      s.seed = seed, s.padding = padding, s.launches = padding == 1 ? 2 : 1;
      std::string wrong =
          check_mixed<MixedActivation<Square, bf16, bf16, float, false>, bf16, bf16, float>(Product::kForward, s);
      s.padded_weights = false;
      if (wrong.empty())
        wrong = check_mixed<MixedActivation<Narrow, f16, f16, f16, false>, f16, f16, f16>(Product::kForward, s);
      s.k = 61, s.padded_weights = true;
      if (wrong.empty())
        wrong = check_mixed<MixedActivation<Narrow, f16, f16, f16, false>, f16, f16, f16>(Product::kForward, s);
      s.n = 130;
      if (wrong.empty())
        wrong = check_mixed<MixedActivation<Square, bf16, bf16, float, true>, bf16, bf16, float>(
            Product::kInputGradient, s);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

TAPS_CASE(mixed_weight) {
  for (uint64_t seed = 0; seed < 2; ++seed) {
    for (const int64_t padding : {0, 1, 2}) {
      Mix s = mixed_batch();
      s.seed = seed, s.padding = padding, s.each = 9, s.n = padding == 0 ? 64 : 40, s.k = 33, s.spoiled = true;
      s.launches = padding == 2 ? 2 : 1;
      std::string wrong = check_mixed_weight<MixedWeightGradient<Square, bf16, float>, bf16, float>(s);
      s.ids = {7, 4, 0, 0}, s.k = 40, s.each = 16;  // whole stages, columns that end; tasks without a row
      if (wrong.empty()) wrong = check_mixed_weight<MixedWeightGradient<Square, f16, f16>, f16, f16>(s);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

// TAPS_FIRST: the cases that the mistake is likely found by.
int main() {
  const char* const first = std::getenv("TAPS_FIRST");
  return run_until_one_fails(first ? first : "");
}
