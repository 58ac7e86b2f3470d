// The gated convolution's forward on the twin: kernels of one place and of many, strides, padding and dilation,
// channels on and off the depth of a stage, all types, gates known and read, split sums, against float64.
#include "conv2d_case.h"

using namespace host;  // NOLINT

namespace {

bool every_shape = false;  // with any argument to the program
constexpr std::pair<Known, double> kGates[] = {
    {Known::kClosed, 0.0}, {Known::kOpen, 0.0}, {Known::kRead, 0.15}, {Known::kRead, 0.05}, {Known::kReadDouble, 0.1}};
// Kernel, stride, padding, dilation.
constexpr Geometry kGeometries[] = {
    {{3, 3}, {1, 1}, {1, 1}, {1, 1}},  // as in most networks
    {{3, 3}, {2, 2}, {1, 1}, {1, 1}}, {{1, 1}, {2, 2}, {0, 0}, {1, 1}},
    {{1, 1}, {1, 1}, {1, 1}, {1, 1}},  // pixels that see padding alone
    {{7, 7}, {2, 2}, {3, 3}, {1, 1}}, {{5, 5}, {1, 1}, {2, 2}, {1, 1}},
    {{3, 3}, {1, 1}, {2, 2}, {2, 2}}, {{2, 2}, {2, 2}, {0, 0}, {1, 1}},
    {{1, 3}, {1, 2}, {0, 1}, {1, 1}},  // the axes apart in everything
    {{4, 1}, {3, 1}, {2, 0}, {1, 1}}, {{3, 2}, {1, 3}, {2, 1}, {1, 3}},
    {{2, 5}, {2, 1}, {1, 4}, {4, 2}}, {{3, 3}, {3, 2}, {4, 3}, {3, 1}},
};
constexpr int64_t kSizes[][3] = {{1, 5, 5}, {2, 7, 6}, {1, 1, 1}, {3, 4, 9}, {1, 16, 9}};  // images, height, width
constexpr int64_t kChannels[] = {8, 16, 24, 32, 40, 64, 72, 128, 192};
constexpr int64_t kOutputs[] = {1, 8, 33, 64, 65};

// Every geometry with every image and number of channels that are not too many, each with one of the outputs, gates and
// splits; without an argument to the program an eighth of them.
template <class T, class W, class D>
std::string shapes() {
  int i = 0;
  for (const Geometry& geometry : kGeometries) {
    for (const auto& [images, height, width] : kSizes) {
      for (const int64_t channels : kChannels) {
        ++i;
        Image image(images, channels, height, width, kOutputs[i % 5], geometry);
        if (image.m == 0 || image.m * image.n * image.k > 1000000) continue;
        if (!every_shape && i % 8 != 3) continue;
        std::tie(image.gate, image.score) = kGates[i / 3 % 5];
        image.splits = i % 7 % 3 + 1;
        image.bias = i / 2 % 2 == 0;
        image.seed = static_cast<uint64_t>(i % 4);
        image.between = i % 6 == 0 ? 8 : i % 6 == 1 ? 24 : 0;
        image.padding = i % 11 == 0 ? 8 : i % 11 == 1 ? 2 : 0;  // of the weight's rows
        image.offset = i % 13 == 0 ? 2 : 0;
        if (std::string wrong = check_convolution<void, T, W, D>(image); !wrong.empty()) return wrong;
        ++host::problems();
      }
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(bf16_delta_bf16) { return shapes<bf16, bf16, bf16>(); }
TAPS_CASE(bf16_delta_fp32) { return shapes<bf16, bf16, float>(); }
TAPS_CASE(bf16_autocast) { return shapes<bf16, float, float>(); }
TAPS_CASE(f16_delta_f16) { return shapes<f16, f16, f16>(); }
TAPS_CASE(f16_delta_fp32) { return shapes<f16, f16, float>(); }
TAPS_CASE(f16_autocast) { return shapes<f16, float, float>(); }

TAPS_CASE(every_gate_and_split_of_one_shape) {
  for (const int64_t images : {1, 3}) {  // up to 16 pixels, and more
    for (const auto& [gate, score] : kGates) {
      for (const int splits : {1, 2, 5}) {
        Image image(images, 40, 4, 4, 33, kGeometries[0]);
        image.gate = gate, image.score = score, image.splits = splits, image.bias = true;
        if (std::string wrong = check_convolution<void, bf16, bf16, float>(image); !wrong.empty()) return wrong;
        ++host::problems();
      }
    }
  }
  return "";
}

// The last layers of a ResNet at one image: few pixels, deep, split as planned for devices of any size.
TAPS_CASE(planned_splits) {
  bool split = false;
  for (const int multiprocessors : {1, 8, 132}) {
    Image image(1, 256, 3, 3, 64, kGeometries[0]);
    image.splits = 0, image.multiprocessors = multiprocessors;
    Convolution product;
    product.rows = image.m, product.outputs = image.n, product.inputs = image.k;
    const Grid planned = plan(Product::kForward, product, {multiprocessors, true});
    if (planned.clustered || (planned.splits > 1 && planned.bytes == 0)) return "a convolution is planned in clusters";
    split = split || planned.splits > 1;
    if (std::string wrong = check_convolution<void, bf16, bf16, bf16>(image); !wrong.empty()) return wrong;
    ++host::problems();
  }
  return split ? "" : "expected a plan that splits";
}

int main(int argc, char**) {
  every_shape = argc > 1;
  const int failed = run_all();
  std::printf("%d problems\n", problems());
  return failed;
}
