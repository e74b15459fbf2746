// L2 to shared memory through the copy engine: every CTA receives the same stream of weight chunks,
// by its own bulk loads or by multicast, where each CTA of a cluster loads a slice for all of them.
#include "probe.cuh"
#include "ptx.cuh"

constexpr int kChunk = 16 * 1024;  // bytes
constexpr int kStages = 8;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;  // warp 0 issues the copies
constexpr size_t kShared = static_cast<size_t>(kStages) * kChunk;
constexpr int kChunks = 512;  // 8 MiB in all: stays in L2

// source [kChunks, kChunk bytes]. Chunk i of a cluster's stream is (offset of the cluster + i) mod
// kChunks. With check, sums [grid] gets the sum of word * (2 * position in chunk + 1) it received.
__global__ void stream(const unsigned char* source, int chunks, int cluster, int stagger,
                       bool check, unsigned* sums) {
  extern __shared__ __align__(128) unsigned char ring[];
  __shared__ alignas(8) uint64_t storage[2 * kStages];
  const uint32_t full = shared_address(storage), empty = full + 8 * kStages;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, cluster);  // a slot is free when no CTA reads its copy
    }
    mbarrier_init_fence();
  }
  for (int i = threadIdx.x; i < kStages * kChunk / 4; i += kThreads)
    reinterpret_cast<unsigned*>(ring)[i] = ~0u;  // poison: an undelivered byte shows in the sum
  fence_async_proxy();
  cluster_sync();

  if (threadIdx.x == 0) {
    const int offset = blockIdx.x / cluster * stagger;
    const uint32_t slice = kChunk / cluster;
    const uint16_t everyone = static_cast<uint16_t>((1u << cluster) - 1);
    for (int i = 0; i < chunks; ++i) {
      const int s = i % kStages;
      mbarrier_wait(empty + 8 * s, i / kStages & 1 ^ 1);
      mbarrier_arrive_expect(full + 8 * s, kChunk);
      const unsigned char* chunk = source + static_cast<size_t>((offset + i) % kChunks) * kChunk;
      const uint32_t slot = shared_address(ring) + s * kChunk;
      if (cluster == 1)
        bulk_load(slot, chunk, kChunk, full + 8 * s);
      else
        bulk_load_multicast(slot + rank * slice, chunk + rank * slice, slice, full + 8 * s,
                            everyone);
    }
  } else if (threadIdx.x >= 32) {
    const int consumer = threadIdx.x - 32;
    unsigned sum = 0;
    for (int i = 0; i < chunks; ++i) {
      const int s = i % kStages;
      mbarrier_wait(full + 8 * s, i / kStages & 1);
      if (check) {
        const unsigned* words = reinterpret_cast<const unsigned*>(ring + s * kChunk);
        for (int w = consumer; w < kChunk / 4; w += kConsumers) sum += words[w] * (2u * w + 1u);
      }
      asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
      if (consumer < cluster)
        mbarrier_arrive_remote_relaxed(remote_address(empty + 8 * s, consumer));
    }
    if (check) atomicAdd(sums + blockIdx.x, sum);
  }
  __syncwarp();
  cluster_sync();  // others may still signal this CTA's barriers
}

int main() {
  raise_clocks();
  const std::vector<uint32_t> words = random_words(static_cast<size_t>(kChunks) * kChunk / 4);
  const uint32_t* weights = to_device(words);
  const unsigned char* source = reinterpret_cast<const unsigned char*>(weights);
  std::vector<unsigned> chunk_sums(kChunks, 0);
  for (int c = 0; c < kChunks; ++c)
    for (int w = 0; w < kChunk / 4; ++w)
      chunk_sums[c] += words[static_cast<size_t>(c) * kChunk / 4 + w] * (2u * w + 1u);
  unsigned* sums = device_array<unsigned>(1024);
  allow(stream, kShared);
  for (int cluster : {1, 2, 4, 8, 16}) {
    const int most = active_clusters(stream, cluster, kThreads, kShared);
    for (int clusters : {1, most}) {
      if (most == 0 || (clusters == 1 && most == 1)) continue;
      const int ctas = clusters * cluster;
      for (int stagger : {0, 37}) {
        auto run = [&](int chunks, bool check) {
          Launch launch(ctas, kThreads, kShared);
          launch.cluster(cluster);
          CHECK(cudaLaunchKernelEx(&launch.config, stream, source, chunks, cluster, stagger, check,
                                   sums));
        };
        const int checked = 100;  // not a multiple of the stages
        CHECK(cudaMemset(sums, 0, 1024 * sizeof(unsigned)));
        run(checked, true);
        const std::vector<unsigned> got = to_host(sums, ctas);
        bool right = true;
        for (int cta = 0; cta < ctas; ++cta) {
          unsigned want = 0;
          for (int i = 0; i < checked; ++i)
            want += chunk_sums[(cta / cluster * stagger + i) % kChunks];
          right = right && got[cta] == want;
        }
        const int chunks = 4000;
        const Timing time = time_us([&] { run(chunks, false); }, 10);
        const double delivered = 1e-3 * chunks * kChunk * ctas / time.median;
        Line line(cluster == 1 ? "l2_to_shared" : "l2_to_shared_multicast");
        line.put("cluster", cluster).put("clusters", clusters).put("stagger", stagger);
        line.put(time, "us").put("delivered_gb_s", delivered);
        line.put("delivered_gb_s_per_cta", delivered / ctas);
        line.put("l2_read_gb_s", delivered / cluster).verified(right).print();
      }
    }
  }
  return finish();
}
