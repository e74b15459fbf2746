// What every probe shares: error checks, median timing with events, one JSON line per case.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#define CHECK(call)                                                                       \
  do {                                                                                    \
    cudaError_t status_ = (call);                                                         \
    if (status_ != cudaSuccess) {                                                         \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                  \
                   cudaGetErrorString(status_));                                          \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (0)

inline bool all_checks_passed = true;

// Fresh data in every run; the seed is printed so that a failure can be repeated.
inline std::mt19937_64& random_engine() {
  static std::mt19937_64 engine = [] {
    unsigned seed = std::random_device{}();
    std::fprintf(stderr, "seed %u\n", seed);
    return std::mt19937_64(seed);
  }();
  return engine;
}

struct Timing {
  double min, median, p80;  // microseconds, or nanoseconds once divided by per()
  Timing per(double count) const {
    return {1e3 * min / count, 1e3 * median / count, 1e3 * p80 / count};
  }
};

// Times launch() with events: each repeat on its own, after warm-up. Microseconds.
template <class Launch>
Timing time_us(Launch launch, int repeats = 20, int warmups = 2) {
  for (int i = 0; i < warmups; ++i) launch();
  CHECK(cudaDeviceSynchronize());
  std::vector<cudaEvent_t> events(2 * repeats);
  for (cudaEvent_t& event : events) CHECK(cudaEventCreate(&event));
  for (int i = 0; i < repeats; ++i) {
    CHECK(cudaEventRecord(events[2 * i]));
    launch();
    CHECK(cudaEventRecord(events[2 * i + 1]));
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, events[2 * i], events[2 * i + 1]));
    times.push_back(1e3 * milliseconds);
  }
  for (cudaEvent_t event : events) CHECK(cudaEventDestroy(event));
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2], times[times.size() * 4 / 5]};
}

// One JSON object on one line of stdout: Line("name").put("key", 1).print().
class Line {
 public:
  explicit Line(const std::string& name) : text_("{\"case\": \"" + name + "\"") {}
  Line& put(const char* key, double value) {
    char buffer[64];
    if (std::isfinite(value)) std::snprintf(buffer, sizeof buffer, "%.6g", value);
    else std::snprintf(buffer, sizeof buffer, "null");
    return raw(key, buffer);
  }
  Line& put(const char* key, int value) { return raw(key, std::to_string(value)); }
  Line& put(const char* key, const char* value) {
    return raw(key, "\"" + std::string(value) + "\"");
  }
  Line& put(const Timing& time, const char* unit) {
    return put("unit", unit).put("min", time.min).put("median", time.median).put("p80", time.p80);
  }
  // A probe that computed something says here whether it was right; finish() exits 1 if not.
  Line& verified(bool ok) {
    all_checks_passed = all_checks_passed && ok;
    return raw("verified", ok ? "true" : "false");
  }
  void print() {
    std::printf("%s}\n", text_.c_str());
    std::fflush(stdout);
  }

 private:
  Line& raw(const char* key, const std::string& value) {
    text_ += std::string(", \"") + key + "\": " + value;
    return *this;
  }
  std::string text_;
};

inline int finish() {
  CHECK(cudaDeviceSynchronize());
  if (!all_checks_passed) std::fprintf(stderr, "a result was wrong: see \"verified\": false\n");
  return all_checks_passed ? 0 : 1;
}

inline int multiprocessors() {
  int count = 0;
  CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

// Keeps every multiprocessor busy for so long; megahertz gets the clock rate seen meanwhile.
static __global__ void spin(unsigned long long nanoseconds, double* megahertz) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  const long long first = clock64();
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
  if (blockIdx.x == 0 && threadIdx.x == 0) *megahertz = 1e3 * (clock64() - first) / (now - start);
}

template <class T>
T* device_array(size_t count) {
  T* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, count * sizeof(T)));
  return pointer;
}

template <class T>
T* to_device(const std::vector<T>& values) {
  T* pointer = device_array<T>(values.size());
  CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return pointer;
}

template <class T>
std::vector<T> to_host(const T* pointer, size_t count) {
  std::vector<T> values(count);
  CHECK(cudaMemcpy(values.data(), pointer, count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

inline std::vector<uint32_t> random_words(size_t count) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = static_cast<uint32_t>(random_engine()());
  return words;
}

// An idle GPU runs at a fraction of its clock rate: call before anything is timed. Prints the rate.
inline void raise_clocks() {
  double* megahertz = device_array<double>(1);
  for (unsigned long long milliseconds : {300, 20}) {
    spin<<<multiprocessors(), 128>>>(milliseconds * 1'000'000, megahertz);
    CHECK(cudaGetLastError());
  }
  Line("sm_clock").put("mhz", to_host(megahertz, 1)[0]).print();
  CHECK(cudaFree(megahertz));
}

// A launch configuration that may carry a cluster size or ask for a cooperative launch.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  Launch(int grid, int block, size_t shared_bytes, cudaStream_t stream = nullptr) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
  }
  Launch(const Launch&) = delete;  // config.attrs points into this object
  Launch& cluster(int size) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    return *this;
  }
  Launch& cooperative() {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
    return *this;
  }
  Launch& programmatic() {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    return *this;
  }
};

// Dynamic shared memory of more than half a multiprocessor: CTAs that ask for it do not share one,
// as the CTAs of a small cluster or grid otherwise may.
constexpr size_t kOnePerMultiprocessor = 120 * 1024;

// Raises the shared-memory limit and allows clusters of more than 8 CTAs.
template <class Kernel>
void allow(Kernel kernel, size_t shared_bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// A grid that is resident all at once: no last wave in which part of the GPU idles.
template <class Kernel>
int resident_blocks(Kernel kernel, int block) {
  int count = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, block, 0));
  return count * multiprocessors();
}

// How many clusters of this shape can be resident at once (0: none fits).
template <class Kernel>
int active_clusters(Kernel kernel, int cluster, int block, size_t shared_bytes) {
  Launch launch(cluster * multiprocessors(), block, shared_bytes);
  launch.cluster(cluster);
  int count = 0;
  cudaError_t status = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
  if (status == cudaSuccess) return count;
  std::fprintf(stderr, "clusters of %d, %zu bytes: %s\n", cluster, shared_bytes,
               cudaGetErrorString(status));
  cudaGetLastError();  // a size the device refuses is an answer, not a failure
  return 0;
}
