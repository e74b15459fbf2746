// Distributed shared memory: read and copy rates between the CTAs of a cluster, load latency, and
// the exchange a sampler needs once per step (every CTA gives its slice to all the others and goes
// on when it has all slices) done in three ways.
#include "probe.cuh"
#include "ptx.cuh"

constexpr int kThreads = 256;
constexpr int kBuffer = 64 * 1024;  // bytes per CTA that are read or copied
constexpr int kWords = kBuffer / 16;

__device__ uint4 combine(uint4 a, uint4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Each CTA reads its neighbour's whole buffer `rounds` times (distance 0: its own).
// sums [grid, threads]: what each thread added up.
__global__ void read_neighbour(const uint4* input, int rounds, int cluster, int distance,
                               uint4* sums) {
  extern __shared__ uint4 buffer[];
  for (int i = threadIdx.x; i < kWords; i += kThreads) buffer[i] = input[blockIdx.x * kWords + i];
  cluster_sync();
  const uint32_t source = remote_address(shared_address(buffer), (cluster_rank() + distance) % cluster);
  uint4 sum[4] = {};  // four independent chains keep loads in flight
  for (int round = 0; round < rounds; ++round) {
#pragma unroll 2
    for (int i = threadIdx.x; i < kWords; i += 4 * kThreads) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[j] = combine(sum[j], load_cluster(source + 16 * (i + j * kThreads)));
    }
  }
  sums[blockIdx.x * kThreads + threadIdx.x] =
      combine(combine(sum[0], sum[1]), combine(sum[2], sum[3]));
  cluster_sync();  // the neighbour may still be reading this CTA's buffer
}

// Each CTA sends its buffer to its neighbour `rounds` times in pieces, with the copy engine.
__global__ void send_neighbour(const uint4* input, int rounds, int cluster, int distance,
                               uint32_t piece, uint4* output) {
  extern __shared__ uint4 buffer[];  // [source, destination]
  __shared__ alignas(8) uint64_t storage;
  uint4* destination = buffer + kWords;
  const uint32_t barrier = shared_address(&storage);
  for (int i = threadIdx.x; i < kWords; i += kThreads) {
    buffer[i] = input[blockIdx.x * kWords + i];
    destination[i] = {~0u, ~0u, ~0u, ~0u};
  }
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  fence_async_proxy();
  cluster_sync();
  if (threadIdx.x == 0) {
    const uint32_t rank = (cluster_rank() + distance) % cluster;
    const uint32_t remote = remote_address(shared_address(destination), rank);
    const uint32_t remote_barrier = remote_address(barrier, rank);
    // A sender may run ahead of its receiver, so one phase covers all rounds: with one phase per
    // round the barrier could count bytes of the next. A phase holds at most 2^20 - 1 bytes.
    mbarrier_arrive_expect(barrier, rounds * kBuffer);
    for (int round = 0; round < rounds; ++round)
      for (uint32_t at = 0; at < kBuffer; at += piece)
        bulk_send(remote + at, shared_address(buffer) + at, piece, remote_barrier);
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kWords; i += kThreads)
    output[blockIdx.x * kWords + i] = destination[i];
  cluster_sync();
}

// One thread follows a ring of indices through a CTA's shared memory.
__global__ void chase(const uint32_t* ring, int steps, int cluster, int distance, uint32_t* end,
                      long long* cycles) {
  extern __shared__ uint32_t words[];
  for (int i = threadIdx.x; i < 4096; i += kThreads) words[i] = 4 * ring[i];
  cluster_sync();
  if (threadIdx.x == 0) {
    const uint32_t source = remote_address(shared_address(words), (cluster_rank() + distance) % cluster);
    uint32_t offset = 0;
    const long long start = clock64();
    for (int step = 0; step < steps; ++step)
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(offset) : "r"(source + offset));
    if (blockIdx.x == 0) *cycles = clock64() - start;
    end[blockIdx.x] = offset / 4;
  }
  cluster_sync();
}

enum Method { kBulk, kStoreAsync, kStore };
const char* const kMethods[] = {"bulk_copy", "st_async", "st_and_cluster_barrier"};

// The slice a CTA gives in a round, recomputed by the check.
__device__ uint4 slice_value(uint32_t cta, uint32_t round, uint32_t word) {
  const uint32_t x = (cta * 0x9e3779b9u) ^ (round * 0x85ebca6bu) ^ (word * 0xc2b2ae35u);
  return {x, x * 3u + 1u, x ^ 0x5bd1e995u, x + word};
}

// All-gather, `rounds` times, in a cluster of 2^n CTAs; slice is in 16-byte words. Buffers are doubled: a CTA that is in
// round i + 2 has seen everybody's slice of round i + 1, which each sent after it was done with
// round i, so the buffers of round i are free by then, and no barrier is two phases behind.
template <Method method>
__global__ void exchange(int rounds, int cluster, int slice, bool check, unsigned* errors) {
  extern __shared__ uint4 buffer[];  // gathered [2][cluster][slice], own slice [2][slice]
  __shared__ alignas(8) uint64_t storage[2];
  uint4* own = buffer + 2 * cluster * slice;
  const uint32_t rank = cluster_rank();
  const uint32_t first = blockIdx.x - rank;
  // Each CTA begins with itself, so that not all send to the same one at a time.
  const uint32_t turn = (rank + threadIdx.x) & (cluster - 1);
  const uint32_t barriers = shared_address(storage);
  for (int i = threadIdx.x; i < 2 * cluster * slice; i += kThreads)
    buffer[i] = {~0u, ~0u, ~0u, ~0u};
  if (threadIdx.x == 0) {
    mbarrier_init(barriers, 1);
    mbarrier_init(barriers + 8, 1);
    mbarrier_init_fence();
  }
  fence_async_proxy();
  cluster_sync();
  for (int round = 0; round < rounds; ++round) {
    const int half = round & 1;
    uint4* gathered = buffer + half * cluster * slice;
    const uint32_t target = shared_address(gathered + rank * slice);
    const uint32_t barrier = barriers + 8 * half;
    if (method != kStore && threadIdx.x == 0)
      mbarrier_arrive_expect(barrier, 16 * cluster * slice);
    if (method == kBulk) {
      for (int i = threadIdx.x; i < slice; i += kThreads)
        own[half * slice + i] = slice_value(blockIdx.x, round, i);
      fence_async_proxy();
      __syncthreads();
      if (threadIdx.x < cluster)
        bulk_send(remote_address(target, turn), shared_address(own + half * slice), 16 * slice,
                  remote_address(barrier, turn));
    } else {
      for (int i = threadIdx.x; i < slice; i += kThreads) {
        const uint4 value = slice_value(blockIdx.x, round, i);
        for (int j = 0; j < cluster; ++j) {
          const uint32_t to = (rank + j) & (cluster - 1);
          const uint32_t remote = remote_address(target + 16 * i, to);
          if (method == kStoreAsync) store_async(remote, value, remote_address(barrier, to));
          else store_cluster(remote, value);
        }
      }
    }
    if (method == kStore) cluster_sync();
    else mbarrier_wait(barrier, (round >> 1) & 1);
    if (check) {
      for (int i = threadIdx.x; i < cluster * slice; i += kThreads) {
        const uint4 want = slice_value(first + i / slice, round, i % slice);
        const uint4 got = gathered[i];
        if (got.x != want.x || got.y != want.y || got.z != want.z || got.w != want.w)
          atomicAdd(errors, 1u);
      }
    }
    // The reads above come before this CTA sends again, which is what the doubling rests on.
    __syncthreads();
  }
  cluster_sync();
}

void rates(int cluster) {
  const size_t shared_bytes = 2 * kBuffer;
  allow(read_neighbour, shared_bytes);
  allow(send_neighbour, shared_bytes);
  const int most = active_clusters(send_neighbour, cluster, kThreads, shared_bytes);
  for (int clusters : {1, most}) {
    if (most == 0 || (clusters == 1 && most == 1)) continue;
    const int ctas = clusters * cluster;
    const std::vector<uint32_t> words = random_words(static_cast<size_t>(ctas) * kBuffer / 4);
    uint32_t* input = to_device(words);
    uint4* sums = device_array<uint4>(static_cast<size_t>(ctas) * kThreads);
    uint4* output = device_array<uint4>(static_cast<size_t>(ctas) * kWords);
    auto neighbour = [&](int cta, int distance) {
      return cta / cluster * cluster + (cta % cluster + distance) % cluster;
    };
    auto sender = [&](int cta) { return neighbour(cta, cluster - 1); };
    for (int distance : {0, 1}) {
      auto run = [&](int rounds) {
        Launch launch(ctas, kThreads, shared_bytes);
        launch.cluster(cluster);
        CHECK(cudaLaunchKernelEx(&launch.config, read_neighbour,
                                 reinterpret_cast<const uint4*>(input), rounds, cluster, distance,
                                 sums));
      };
      const int rounds = 500;
      run(rounds);
      const std::vector<uint4> got = to_host(sums, static_cast<size_t>(ctas) * kThreads);
      bool right = true;
      for (int cta = 0; cta < ctas && right; ++cta) {
        uint32_t total = 0, want = 0;
        for (int t = 0; t < kThreads; ++t) {
          const uint4 v = got[cta * kThreads + t];
          total += v.x + v.y + v.z + v.w;
        }
        const size_t from = static_cast<size_t>(neighbour(cta, distance)) * kBuffer / 4;
        for (int i = 0; i < kBuffer / 4; ++i) want += words[from + i];
        right = total == want * rounds;
      }
      const Timing time = time_us([&] { run(rounds); }, 10);
      Line line("dsmem_read");
      line.put("cluster", cluster).put("clusters", clusters).put("distance", distance);
      line.put(time, "us");
      line.put("gb_s_per_cta", 1e-3 * rounds * kBuffer / time.median);
      line.put("gb_s", 1e-3 * rounds * kBuffer * ctas / time.median).verified(right).print();
    }
    for (uint32_t piece : {1024u, 4096u, 16384u}) {
      auto run = [&](int rounds) {
        Launch launch(ctas, kThreads, shared_bytes);
        launch.cluster(cluster);
        CHECK(cudaLaunchKernelEx(&launch.config, send_neighbour,
                                 reinterpret_cast<const uint4*>(input), rounds, cluster, 1, piece,
                                 output));
      };
      CHECK(cudaMemset(output, 0xff, static_cast<size_t>(ctas) * kBuffer));
      run(1);
      const std::vector<uint4> got = to_host(output, static_cast<size_t>(ctas) * kWords);
      const uint32_t* flat = reinterpret_cast<const uint32_t*>(got.data());
      bool right = true;
      for (int cta = 0; cta < ctas; ++cta)
        right = right && std::equal(flat + static_cast<size_t>(cta) * kBuffer / 4,
                                    flat + static_cast<size_t>(cta + 1) * kBuffer / 4,
                                    words.begin() + static_cast<size_t>(sender(cta)) * kBuffer / 4);
      // Short runs only (one phase counts at most 2^20 - 1 bytes): the difference of two lengths
      // removes launch, filling and write-back.
      const Timing one = time_us([&] { run(1); }, 40), many = time_us([&] { run(15); }, 40);
      const double microseconds = many.median - one.median;
      Line line("dsmem_bulk_copy");
      line.put("cluster", cluster).put("clusters", clusters).put("piece", static_cast<int>(piece));
      line.put(many, "us").put("difference_us", microseconds);
      line.put("gb_s_per_cta", 1e-3 * 14 * kBuffer / microseconds);
      line.put("gb_s", 1e-3 * 14 * kBuffer * ctas / microseconds).verified(right).print();
    }
    CHECK(cudaFree(input));
    CHECK(cudaFree(sums));
    CHECK(cudaFree(output));
  }
}

void latency(int cluster) {
  allow(chase, kOnePerMultiprocessor);
  if (active_clusters(chase, cluster, kThreads, kOnePerMultiprocessor) == 0) return;
  // One cycle through all 4,096 words in random order.
  std::vector<uint32_t> order(4096), ring(4096);
  for (int i = 0; i < 4096; ++i) order[i] = i;
  std::shuffle(order.begin() + 1, order.end(), random_engine());
  for (int i = 0; i < 4096; ++i) ring[order[i]] = order[(i + 1) % 4096];
  uint32_t* device_ring = to_device(ring);
  uint32_t* end = device_array<uint32_t>(cluster);
  long long* cycles = device_array<long long>(1);
  for (int distance : {0, 1, cluster / 2}) {
    const int steps = 20011;
    const Timing time = time_us([&] {
      Launch launch(cluster, kThreads, kOnePerMultiprocessor);
      launch.cluster(cluster);
      CHECK(cudaLaunchKernelEx(&launch.config, chase, static_cast<const uint32_t*>(device_ring),
                               steps, cluster, distance, end, cycles));
    }, 10);
    bool right = true;
    for (uint32_t value : to_host(end, cluster)) right = right && value == order[steps % 4096];
    Line line("dsmem_latency");
    line.put("cluster", cluster).put("distance", distance).put(time.per(steps), "ns");
    line.put("cycles", static_cast<double>(to_host(cycles, 1)[0]) / steps).verified(right).print();
  }
  CHECK(cudaFree(device_ring));
  CHECK(cudaFree(end));
  CHECK(cudaFree(cycles));
}

template <Method method>
void measure_exchange(int cluster, int slice_bytes, unsigned* errors) {
  const int slice = slice_bytes / 16;
  const size_t shared_bytes =
      std::max(static_cast<size_t>(2 * slice_bytes) * (cluster + 1), kOnePerMultiprocessor);
  allow(exchange<method>, shared_bytes);
  const int most = active_clusters(exchange<method>, cluster, kThreads, shared_bytes);
  for (int clusters : {1, most}) {
    if (most == 0 || (clusters == 1 && most == 1)) continue;
    auto run = [&](int rounds, bool check) {
      Launch launch(clusters * cluster, kThreads, shared_bytes);
      launch.cluster(cluster);
      CHECK(cudaLaunchKernelEx(&launch.config, exchange<method>, rounds, cluster, slice, check,
                               errors));
    };
    CHECK(cudaMemset(errors, 0, sizeof(unsigned)));
    run(101, true);
    CHECK(cudaDeviceSynchronize());
    const bool right = to_host(errors, 1)[0] == 0;
    const int rounds = 2000;
    const Timing time = time_us([&] { run(rounds, false); }, 10);
    Line line("cluster_exchange");
    line.put("method", kMethods[method]).put("cluster", cluster).put("clusters", clusters);
    line.put("slice_bytes", slice_bytes).put(time.per(rounds), "ns").verified(right).print();
  }
}

int main() {
  raise_clocks();
  unsigned* errors = device_array<unsigned>(1);
  for (int cluster : {8, 16}) {
    for (int slice_bytes : {256, 1024, 4096}) {
      measure_exchange<kBulk>(cluster, slice_bytes, errors);
      measure_exchange<kStoreAsync>(cluster, slice_bytes, errors);
      measure_exchange<kStore>(cluster, slice_bytes, errors);
    }
  }
  for (int cluster : {8, 16}) latency(cluster);
  for (int cluster : {2, 8, 16}) rates(cluster);
  return finish();
}
