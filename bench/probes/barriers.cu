// Latency of the ways to synchronise CTAs once per denoising step: the hardware cluster barrier, a
// cluster barrier made of remote mbarrier arrivals (both also relaxed: without the fence that
// publishes memory, which data that carries its own completion does not need), and barriers of the
// whole grid. Each first passes a test in which neighbours exchange values across the barrier.
#include <cooperative_groups.h>

#include "probe.cuh"
#include "ptx.cuh"

enum Kind {
  kClusterBarrier,
  kClusterBarrierRelaxed,
  kClusterMbarrier,
  kClusterMbarrierRelaxed,
  kGridCooperative,
  kGridAtomic
};
const char* const kNames[] = {"cluster_barrier",          "cluster_barrier_relaxed",
                              "cluster_mbarrier",         "cluster_mbarrier_relaxed",
                              "grid_cooperative",         "grid_atomic"};
__host__ __device__ constexpr bool is_relaxed(Kind kind) {
  return kind == kClusterBarrierRelaxed || kind == kClusterMbarrierRelaxed;
}

// One object per kind; sync() is called by every thread of every CTA that takes part.
template <Kind kind>
struct Barrier;

template <>
struct Barrier<kClusterBarrier> {
  __device__ Barrier(unsigned*, int) {}
  __device__ void sync() { cluster_sync(); }
};

template <>
struct Barrier<kClusterBarrierRelaxed> {
  __device__ Barrier(unsigned*, int) {}
  __device__ void sync() { cluster_sync_relaxed(); }
};

// Each CTA arrives at every CTA's mbarrier and waits at its own. No CTA can be two phases ahead,
// because its next phase needs everybody's arrival, so one parity bit is enough.
template <bool relaxed>
struct MbarrierOfCluster {
  uint32_t own, remote, size, parity = 0;
  __device__ MbarrierOfCluster(unsigned*, int cluster) : size(cluster) {
    __shared__ alignas(8) uint64_t storage;
    own = shared_address(&storage);
    if (threadIdx.x == 0) {
      mbarrier_init(own, size);
      mbarrier_init_fence();
    }
    cluster_sync();
    remote = remote_address(own, threadIdx.x < size ? threadIdx.x : 0);
  }
  __device__ void sync() {
    __syncthreads();
    if constexpr (relaxed) {
      if (threadIdx.x < size) mbarrier_arrive_remote_relaxed(remote);
      mbarrier_wait(own, parity);
    } else {
      if (threadIdx.x < size) mbarrier_arrive_remote(remote);
      mbarrier_wait_cluster(own, parity);
    }
    parity ^= 1;
  }
};
template <>
struct Barrier<kClusterMbarrier> : MbarrierOfCluster<false> {
  using MbarrierOfCluster::MbarrierOfCluster;
};
template <>
struct Barrier<kClusterMbarrierRelaxed> : MbarrierOfCluster<true> {
  using MbarrierOfCluster::MbarrierOfCluster;
};

template <>
struct Barrier<kGridCooperative> {
  __device__ Barrier(unsigned*, int) {}
  __device__ void sync() { cooperative_groups::this_grid().sync(); }
};

// A counter that only grows: the n-th barrier waits for n times the number of CTAs.
template <>
struct Barrier<kGridAtomic> {
  unsigned* counter;
  unsigned target = 0;
  __device__ Barrier(unsigned* counter, int) : counter(counter) {}
  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) {
      target += gridDim.x;
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < target);
    }
    __syncthreads();
  }
};

// group: CTAs that meet (the cluster, or the grid). slots: one word per CTA, in global memory.
template <Kind kind>
__global__ void repeat(int rounds, int group, unsigned* counter, volatile unsigned* slots,
                       unsigned* errors, long long* cycles, bool exchange) {
  Barrier<kind> barrier(counter, group);
  const unsigned first = blockIdx.x / group * group;
  const unsigned neighbour = first + (blockIdx.x - first + 1) % group;
  const long long start = clock64();
  if (exchange) {
    for (int round = 1; round <= rounds; ++round) {
      const unsigned mine = round * 7919u + blockIdx.x, theirs = round * 7919u + neighbour;
      if constexpr (is_relaxed(kind)) {
        // Atomics that have returned their value are done: they show the meeting without a fence.
        unsigned* words = const_cast<unsigned*>(slots);
        if (threadIdx.x == 0 && atomicExch(words + blockIdx.x, mine) == mine) atomicAdd(errors, 1u);
        barrier.sync();
        if (threadIdx.x == 0 && atomicAdd(words + neighbour, 0u) != theirs) atomicAdd(errors, 1u);
      } else {
        if (threadIdx.x == 0) slots[blockIdx.x] = mine;
        barrier.sync();
        if (threadIdx.x == 0 && slots[neighbour] != theirs) atomicAdd(errors, 1u);
      }
      barrier.sync();
    }
  } else {
    for (int round = 0; round < rounds; ++round) barrier.sync();
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - start;
  // A CTA must not leave while others may still arrive at its shared memory.
  if constexpr (kind == kClusterMbarrier || kind == kClusterMbarrierRelaxed) cluster_sync();
}

unsigned *counter, *slots, *errors;
long long* cycles;

// group CTAs per barrier, `groups` such barriers side by side.
template <Kind kind>
void measure(int group, int groups, int threads, int rounds) {
  const bool cluster = kind != kGridCooperative && kind != kGridAtomic;
  auto launch = [&](int n, bool exchange) {
    CHECK(cudaMemsetAsync(counter, 0, sizeof(unsigned)));
    Launch shape(group * groups, threads, kOnePerMultiprocessor);
    if (cluster) shape.cluster(group);
    else shape.cooperative();
    CHECK(cudaLaunchKernelEx(&shape.config, repeat<kind>, n, group, counter, slots, errors, cycles,
                             exchange));
  };
  CHECK(cudaMemset(errors, 0, sizeof(unsigned)));
  CHECK(cudaMemset(slots, 0xff, 4096 * sizeof(unsigned)));
  launch(200, true);
  CHECK(cudaDeviceSynchronize());
  const bool right = to_host(errors, 1)[0] == 0;
  const Timing time = time_us([&] { launch(rounds, false); }, 10);
  Line line(kNames[kind]);
  line.put("ctas", group).put("groups", groups).put("threads", threads).put(time.per(rounds), "ns");
  line.put("cycles", static_cast<double>(to_host(cycles, 1)[0]) / rounds).verified(right).print();
}

template <Kind kind>
void measure_clusters() {
  allow(repeat<kind>, kOnePerMultiprocessor);
  for (int cluster : {2, 4, 8, 16}) {
    for (int threads : {128, 512}) {
      const int most = active_clusters(repeat<kind>, cluster, threads, kOnePerMultiprocessor);
      if (most > 0) measure<kind>(cluster, 1, threads, 4000);
      if (most > 1) measure<kind>(cluster, most, threads, 4000);
    }
  }
}

int main() {
  raise_clocks();
  counter = device_array<unsigned>(1);
  slots = device_array<unsigned>(4096);
  errors = device_array<unsigned>(1);
  cycles = device_array<long long>(1);
  measure_clusters<kClusterBarrier>();
  measure_clusters<kClusterBarrierRelaxed>();
  measure_clusters<kClusterMbarrier>();
  measure_clusters<kClusterMbarrierRelaxed>();
  allow(repeat<kGridCooperative>, kOnePerMultiprocessor);
  allow(repeat<kGridAtomic>, kOnePerMultiprocessor);
  for (int ctas : {16, 64, multiprocessors()}) {
    for (int threads : {128, 512}) {
      measure<kGridCooperative>(ctas, 1, threads, 3000);
      measure<kGridAtomic>(ctas, 1, threads, 3000);
    }
  }
  return finish();
}
