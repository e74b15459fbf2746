// A small program for the profilers and the memory checker to look at: "tool_sample" doubles an
// array, "tool_sample out_of_bounds" also writes one element past its end.
#include <cstring>

#include "probe.cuh"

__global__ void doubled(const float* x, float* y, int count, int writes) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < writes) y[i] = 2.f * x[i < count ? i : 0];
}

int main(int argc, char** argv) {
  const bool planted = argc > 1 && std::strcmp(argv[1], "out_of_bounds") == 0;
  const int count = 1 << 20;
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& value : x) value = normal(random_engine());
  float *input = to_device(x), *output = device_array<float>(count);
  doubled<<<count / 256 + 1, 256>>>(input, output, count, count + (planted ? 1 : 0));
  CHECK(cudaGetLastError());
  const std::vector<float> y = to_host(output, count);
  bool right = true;
  for (int i = 0; i < count; ++i) right = right && y[i] == 2.f * x[i];
  Line("tool_sample").verified(right).print();
  CHECK(cudaFree(input));
  CHECK(cudaFree(output));
  return finish();
}
