// Element-wise rates that bound a sampler beside its products: Philox4x32-10 normals (Box-Muller)
// and GELU, alone and in the sampler's mix of 4 GELUs per normal (D normals, 2 x 2D GELUs a step).
#include "probe.cuh"

constexpr int kThreads = 256;

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), ten rounds.
__host__ __device__ inline void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(counter[0]) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(counter[2]) * 0xCD9E8D57u;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key0;
    const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key1;
    counter[1] = static_cast<uint32_t>(p1);
    counter[3] = static_cast<uint32_t>(p0);
    counter[0] = c0;
    counter[2] = c2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

template <bool fast>
__device__ inline void box_muller(uint32_t a, uint32_t b, float& x, float& y) {
  const float u = (a + 0.5f) * 0x1p-32f;  // may round up to 1, never down to 0
  const float angle = static_cast<int32_t>(b) * 0x1p-31f;  // in units of pi, [-1, 1]
  if constexpr (fast) {
    const float radius = sqrtf(fmaxf(0.f, -2.f * __logf(u)));
    __sincosf(3.14159265f * angle, &y, &x);
    x *= radius;
    y *= radius;
  } else {
    const float radius = sqrtf(-2.f * logf(u));
    sincospif(angle, &y, &x);
    x *= radius;
    y *= radius;
  }
}

__device__ inline float gelu_erf(float x) { return 0.5f * x * (1.f + erff(0.70710678f * x)); }
__device__ inline float gelu_tanh(float x) {
  const float inner = 0.79788456f * x * (1.f + 0.044715f * x * x);
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(inner));
  return 0.5f * x * (1.f + t);
}

enum Work { kPhilox, kNormals, kNormalsFast, kGeluErf, kGeluTanh, kMixErf, kMixTanh };
const char* const kNames[] = {"philox_words",  "normals",       "normals_fast_intrinsics",
                              "gelu_erf",      "gelu_tanh_approx", "mix_erf",
                              "mix_tanh_fast"};

__host__ __device__ constexpr bool is_gelu(Work work) { return work == kGeluErf || work == kGeluTanh; }
__host__ __device__ constexpr bool is_mix(Work work) { return work == kMixErf || work == kMixTanh; }

// Each iteration makes 4 words or normals, or 16 GELUs, or both in a mix. sums [grid * threads, 2]:
// the sum of what was made (bits xored for kPhilox), and for normals alone that of the squares.
template <Work work>
__global__ void __launch_bounds__(kThreads) produce(int iterations, uint32_t key, float2* sums) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  float sum = 0, squares = 0;
  uint32_t bits = 0;
  // Inputs of the GELUs alone walk over (-4, 4), each lane elsewhere.
  float x = thread * 389u % 1024 / 128.f - 4.f + key * 0x1p-40f;
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
    float made[4] = {x, x + 0.37f, x + 0.74f, x + 1.11f};
    if constexpr (is_gelu(work)) {
      x = x > 2.f ? x - 6.f : x + 0.0625f;
    } else {
      uint32_t counter[4] = {static_cast<uint32_t>(i), thread, 0, 0};
      philox(counter, key, 0);
      if constexpr (work == kPhilox) {
        bits ^= counter[0] ^ counter[1] ^ counter[2] ^ counter[3];
        continue;
      } else {
        constexpr bool fast = work == kNormalsFast || work == kMixTanh;
        box_muller<fast>(counter[0], counter[1], made[0], made[1]);
        box_muller<fast>(counter[2], counter[3], made[2], made[3]);
      }
    }
    if constexpr (is_gelu(work) || is_mix(work)) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float input = made[j % 4] + 0.25f * (j / 4);
        sum += work == kMixErf || work == kGeluErf ? gelu_erf(input) : gelu_tanh(input);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum += made[j];
        squares += made[j] * made[j];
      }
    }
  }
  if constexpr (work == kPhilox) sum = __uint_as_float(bits & 0x3fffffffu);
  sums[thread] = {sum, squares};
}

__global__ void gelu_of(const float* x, int count, float* erf_out, float* tanh_out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) {
    erf_out[i] = gelu_erf(x[i]);
    tanh_out[i] = gelu_tanh(x[i]);
  }
}

__global__ void philox_of(uint32_t counter0, uint32_t key0, uint32_t* out) {
  uint32_t counter[4] = {counter0, counter0, counter0, counter0};
  philox(counter, key0, key0);
  for (int i = 0; i < 4; ++i) out[i] = counter[i];
}

// The published test vectors of Philox4x32-10: all zeros, all ones.
bool philox_is_right() {
  uint32_t* out = device_array<uint32_t>(4);
  philox_of<<<1, 1>>>(0, 0, out);
  CHECK(cudaGetLastError());
  const bool zeros = to_host(out, 4) == std::vector<uint32_t>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c,
                                                              0x9b00dbd8};
  philox_of<<<1, 1>>>(~0u, ~0u, out);
  CHECK(cudaGetLastError());
  const bool ones = to_host(out, 4) == std::vector<uint32_t>{0x408f276d, 0x41c83b0e, 0xa20bc7c6,
                                                             0x6d5451fd};
  CHECK(cudaFree(out));
  return zeros && ones;
}

// Largest absolute errors of the two GELUs against erf in double.
void gelu_errors(double& with_erf, double& with_tanh) {
  std::uniform_real_distribution<float> uniform(-6, 6);
  std::vector<float> x(100'003);
  for (float& value : x) value = uniform(random_engine());
  const int count = static_cast<int>(x.size());
  float *input = to_device(x), *a = device_array<float>(count), *b = device_array<float>(count);
  gelu_of<<<(count + kThreads - 1) / kThreads, kThreads>>>(input, count, a, b);
  CHECK(cudaGetLastError());
  const std::vector<float> got_erf = to_host(a, count), got_tanh = to_host(b, count);
  with_erf = with_tanh = 0;
  for (int i = 0; i < count; ++i) {
    const double want = 0.5 * x[i] * (1 + std::erf(x[i] / std::sqrt(2.0)));
    with_erf = std::max(with_erf, std::abs(got_erf[i] - want));
    with_tanh = std::max(with_tanh, std::abs(got_tanh[i] - want));
  }
  CHECK(cudaFree(input));
  CHECK(cudaFree(a));
  CHECK(cudaFree(b));
}

template <Work work>
void measure(bool right, double error) {
  const int blocks = resident_blocks(produce<work>, kThreads), iterations = 1000;
  const size_t threads = static_cast<size_t>(blocks) * kThreads;
  float2* sums = device_array<float2>(threads);
  const uint32_t key = static_cast<uint32_t>(random_engine()());
  const Timing time = time_us([&] {
    produce<work><<<blocks, kThreads>>>(iterations, key, sums);
    CHECK(cudaGetLastError());
  }, 10);
  Line line(kNames[work]);
  const double elements = (is_gelu(work) ? 16.0 : 4.0) * iterations * threads;
  line.put(time, "us").put("g_elements_s", 1e-3 * elements / time.median);
  if (work == kNormals || work == kNormalsFast) {
    double sum = 0, squares = 0;
    for (float2 s : to_host(sums, threads)) {
      sum += s.x;
      squares += s.y;
    }
    const double mean = sum / elements, variance = squares / elements - mean * mean;
    // Six standard errors, and room for the fp32 sums.
    const double bound = 6 / std::sqrt(elements) + 1e-5;
    line.put("mean", mean).put("variance", variance);
    right = right && std::abs(mean) < bound && std::abs(variance - 1) < 2 * bound;
  }
  if (error >= 0) line.put("max_error", error);
  line.verified(right).print();
  CHECK(cudaFree(sums));
}

int main() {
  raise_clocks();
  const bool bits_right = philox_is_right();
  double with_erf, with_tanh;
  gelu_errors(with_erf, with_tanh);
  measure<kPhilox>(bits_right, -1);
  measure<kNormals>(bits_right, -1);
  measure<kNormalsFast>(bits_right, -1);
  measure<kGeluErf>(with_erf < 2e-6, with_erf);
  measure<kGeluTanh>(with_tanh < 5e-3, with_tanh);
  measure<kMixErf>(bits_right && with_erf < 2e-6, -1);  // g_elements_s counts normals
  measure<kMixTanh>(bits_right && with_tanh < 5e-3, -1);
  return finish();
}
