// Device-memory ceilings: copy (bytes read plus written) and read alone, and a read that stays in
// L2, with 16-byte accesses.
#include "probe.cuh"

constexpr int kThreads = 512;

__global__ void copy(const uint4* source, uint4* destination, size_t count) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = source[i], b = source[i + step];
    const uint4 c = source[i + 2 * step], d = source[i + 3 * step];
    destination[i] = a;
    destination[i + step] = b;
    destination[i + 2 * step] = c;
    destination[i + 3 * step] = d;
  }
  for (; i < count; i += step) destination[i] = source[i];
}

__device__ inline uint32_t fold(uint4 v) { return v.x + v.y + v.z + v.w; }

// total += the sum of all words, modulo 2^32, `rounds` times over; count is a power of two. One
// walk through all rounds keeps four loads in flight however short the array is.
__global__ void sum_words(const uint4* source, size_t count, int rounds, uint32_t* total) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads, mask = count - 1;
  const size_t end = count * rounds;
  uint32_t sum = 0;
  size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + 3 * step < end; i += 4 * step) {
    // ld.global.cg: through L2 only, so that small buffers measure L2 and not L1.
    const uint4 a = __ldcg(source + (i & mask)), b = __ldcg(source + (i + step & mask));
    const uint4 c = __ldcg(source + (i + 2 * step & mask));
    const uint4 d = __ldcg(source + (i + 3 * step & mask));
    sum += fold(a) + fold(b) + fold(c) + fold(d);
  }
  for (; i < end; i += step) sum += fold(__ldcg(source + (i & mask)));
  atomicAdd(total, sum);
}

__global__ void count_differences(const uint4* a, const uint4* b, size_t count, uint32_t* total) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const uint4 x = a[i], y = b[i];
    if (x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w) atomicAdd(total, 1u);
  }
}

__global__ void fill(uint32_t* words, size_t count, uint32_t seed) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    uint32_t x = static_cast<uint32_t>(i) ^ seed;  // a bijective mix of the index
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    words[i] = x ^ x >> 16;
  }
}

int main() {
  raise_clocks();
  const size_t bytes = size_t{2} << 30, count = bytes / 16;
  const int blocks = 4 * multiprocessors(), copiers = resident_blocks(copy, kThreads);
  const int readers = resident_blocks(sum_words, kThreads);
  uint4 *source = device_array<uint4>(count), *destination = device_array<uint4>(count);
  uint32_t* total = device_array<uint32_t>(1);
  fill<<<blocks, kThreads>>>(reinterpret_cast<uint32_t*>(source), bytes / 4,
                             static_cast<uint32_t>(random_engine()()));
  CHECK(cudaGetLastError());
  auto read_source = [&](size_t length, int rounds) {
    sum_words<<<readers, kThreads>>>(source, length, rounds, total);
    CHECK(cudaGetLastError());
  };

  CHECK(cudaMemset(destination, 0xff, bytes));
  const Timing copied = time_us([&] {
    copy<<<copiers, kThreads>>>(source, destination, count);
    CHECK(cudaGetLastError());
  });
  CHECK(cudaMemset(total, 0, sizeof(uint32_t)));
  count_differences<<<blocks, kThreads>>>(source, destination, count, total);
  CHECK(cudaGetLastError());
  const bool right = to_host(total, 1)[0] == 0;
  Line("copy").put("bytes", static_cast<double>(bytes)).put(copied, "us")
      .put("gb_s", 2e-3 * bytes / copied.median).verified(right).print();

  const Timing engine = time_us([&] {
    CHECK(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice));
  });
  Line("copy_memcpy").put("bytes", static_cast<double>(bytes)).put(engine, "us")
      .put("gb_s", 2e-3 * bytes / engine.median).print();

  const Timing read = time_us([&] { read_source(count, 1); });
  Line("read").put("bytes", static_cast<double>(bytes)).put(read, "us")
      .put("gb_s", 1e-3 * bytes / read.median).print();

  const std::vector<uint32_t> words = to_host(reinterpret_cast<uint32_t*>(source), size_t{8} << 20);
  for (int mebibytes : {8, 16, 32}) {
    const size_t small = static_cast<size_t>(mebibytes) << 20;
    const int rounds = 1024 / mebibytes;
    uint32_t want = 0;
    for (size_t i = 0; i < small / 4; ++i) want += words[i];
    CHECK(cudaMemset(total, 0, sizeof(uint32_t)));
    read_source(small / 16, rounds);
    const bool summed = to_host(total, 1)[0] == want * rounds;
    const Timing cached = time_us([&] { read_source(small / 16, rounds); });
    Line("read_l2").put("mib", mebibytes).put(cached, "us")
        .put("gb_s", 1e-3 * small * rounds / cached.median).verified(summed).print();
  }
  return finish();
}
