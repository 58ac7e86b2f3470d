// The gated depthwise convolution on the twin: its three products in every type, kernel and stride, with odd sizes and
// paddings, channels that fill no vector, every gate, and pixels split over blocks.
#include "depthwise_case.h"

using namespace host;  // NOLINT

namespace {

constexpr std::pair<Known, double> kGates[] = {
    {Known::kOpen, 0.0}, {Known::kClosed, 0.0}, {Known::kRead, 0.2}, {Known::kRead, 0.05}, {Known::kReadDouble, 0.1}};

bool every_shape = false;  // with any argument to the program

struct Kernel {
  int size, stride_h, stride_w;
};
constexpr Kernel kKernels[] = {{3, 1, 1}, {3, 2, 2}, {3, 1, 2}, {3, 2, 1}, {5, 1, 1}, {5, 2, 2}, {7, 1, 1}, {7, 2, 1}};

// Sizes around a strip and around nothing; channels of less than a vector, of one, of many blocks, and between.
template <class T, class W, class D>
std::string shapes() {
  int i = 0;
  for (const Kernel& kernel : kKernels) {
    for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {2, 7}, {8, 5}, {9, 14}}) {
      for (const int64_t channels : {1, 8, 13, 40, 72, 136}) {
        for (const int padding : {0, 1, kernel.size / 2, kernel.size}) {
          ++i;
          if (height + 2 * padding < kernel.size || width + 2 * padding < kernel.size) continue;
          if (every_shape ? i % 3 != 0 && channels > 13 : i % 23 != 3) continue;
          Images s{i % 2 + 1, channels, height, width, kernel.size, kernel.stride_h, kernel.stride_w, padding, padding};
          if (i % 5 == 0) s.padding_h = kernel.size / 2;
          const auto& [gate, score] = kGates[i % 5];
          s.gate = gate, s.score = score;
          s.bias = i % 2 == 0, s.seed = static_cast<uint64_t>(i % 4), s.padding = i % 3, s.splits = i % 4;
          s.offset = i % 7 == 0 ? 1 : 0;
          std::string wrong = check_depthwise<T, W, D>(Product::kForward, s);
          if (wrong.empty()) wrong = check_depthwise<T, W, D>(Product::kInputGradient, s);
          s.scale = i % 2 == 0 ? 1.0 : 2.5, s.result = i % 6 != 1, s.dot = i % 6 != 2;
          if (wrong.empty()) wrong = check_depthwise_weight<T, D>(s);
          if (!wrong.empty()) return wrong;
        }
      }
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(bf16_all) { return shapes<bf16, bf16, bf16>(); }
TAPS_CASE(bf16_delta_fp32) { return shapes<bf16, bf16, float>(); }
TAPS_CASE(bf16_autocast) { return shapes<bf16, float, bf16>(); }
TAPS_CASE(f16_delta_fp32) { return shapes<f16, f16, float>(); }
TAPS_CASE(f16_autocast) { return shapes<f16, float, float>(); }
TAPS_CASE(fp32) { return shapes<float, float, float>(); }

TAPS_CASE(every_gate_and_split) {
  for (const Product product : {Product::kForward, Product::kInputGradient, Product::kWeightGradient}) {
    for (const auto& [gate, score] : kGates) {
      for (const int splits : {1, 2, 5, 40}) {
        Images s{2, 24, 7, 10, 3, 1, 1, 1, 1};
        s.gate = gate, s.score = score, s.splits = splits;
        std::string wrong = product == Product::kWeightGradient ? check_depthwise_weight<bf16, float>(s)
                                                                : check_depthwise<bf16, bf16, float>(product, s);
        if (!wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

// Threads that take several strips: what they carry from one to the next.
TAPS_CASE(many_strips_of_a_thread) {
  for (const Kernel& kernel : kKernels) {
    const int padding = kernel.size / 2;
    Images s{5, 64, 7, 9, kernel.size, kernel.stride_h, kernel.stride_w, padding, padding};
    s.splits = 1;
    std::string wrong = check_depthwise<bf16, bf16, bf16>(Product::kForward, s);
    if (wrong.empty()) wrong = check_depthwise<float, float, float>(Product::kInputGradient, s);
    if (wrong.empty()) wrong = check_depthwise_weight<bf16, bf16>(s);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// Numbers that are not whole: sums within their bounds, and the same bits whatever the threads' order.
TAPS_CASE(numbers_of_every_size) {
  for (const Kernel& kernel : kKernels) {
    Images s{3, 44, 11, 13, kernel.size, kernel.stride_h, kernel.stride_w, kernel.size / 2, kernel.size / 2};
    s.exact = false, s.bias = true, s.splits = 3, s.scale = 0.5;
    for (const Product product : {Product::kForward, Product::kInputGradient}) {
      std::string wrong = check_depthwise<bf16, bf16, float>(product, s);
      if (wrong.empty()) wrong = check_depthwise<f16, float, float>(product, s);
      if (wrong.empty()) wrong = check_depthwise<float, float, float>(product, s);
      if (!wrong.empty()) return wrong;
    }
    std::string wrong = check_depthwise_weight<bf16, float>(s);
    if (wrong.empty()) wrong = check_depthwise_weight<f16, f16>(s);
    if (wrong.empty()) wrong = check_depthwise_weight<float, float>(s);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// As planned for devices of one and of many multiprocessors: every strip in one split, and none of them empty.
TAPS_CASE(planned) {
  bool split = false;
  for (const int multiprocessors : {1, 8, 132}) {
    for (const int64_t channels : {8, 96, 144}) {
      Images s{2, channels, 21, 30, 3, 2, 2, 1, 1};
      s.multiprocessors = multiprocessors;
      std::string wrong = check_depthwise<bf16, bf16, bf16>(Product::kForward, s);
      if (wrong.empty()) wrong = check_depthwise<bf16, bf16, bf16>(Product::kInputGradient, s);
      if (wrong.empty()) wrong = check_depthwise_weight<bf16, bf16>(s);
      if (!wrong.empty()) return wrong;
    }
    for (const int64_t channels : {1, 32, 120, 960}) {
      for (const int64_t width : {7, 112}) {
        for (const Product product : {Product::kForward, Product::kInputGradient, Product::kWeightGradient}) {
          Depthwise p;
          p.batch = 64, p.outputs = channels, p.inputs = 25, p.kernel = 5;
          p.size[0] = p.size[1] = p.result_size[0] = p.result_size[1] = static_cast<int32_t>(width);
          const DepthwiseGrid grid = plan(product, p, multiprocessors);
          const int64_t strips = strips_of(product, p), covered = grid.splits * grid.strips_of_split;
          split = split || grid.splits > 1;
          if (covered < strips || covered - grid.strips_of_split >= strips) return "plan of " + std::to_string(strips);
          const int64_t vectors = grid.groups * static_cast<int64_t>(grid.vectors), needed = (channels + 7) / 8;
          if (vectors < needed || (vectors - needed) * 4 > needed) return "vectors of " + std::to_string(channels);
        }
      }
    }
  }
  return split ? "" : "expected a plan that splits";
}

int main(int argc, char**) {
  every_shape = argc > 1;
  const int failed = run_all();
  std::printf("%d problems\n", problems());
  return failed;
}
