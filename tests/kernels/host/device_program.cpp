// The device's conformance program on the twin, as far as there is time: that it sees a kernel which stores nothing,
// and that clusters add splits to the bits of the second kernel.
#include "cuda_on_twin.h"

#define main program
#include "../../cuda/conformance.cu"
#undef main

int main() {
  char name[] = "program";
  char* arguments[] = {name, nullptr};
  const int failed = program(2, arguments);
  std::printf("%d problems\n%d failed\n", in_clusters, failed);
  return failed;
}
