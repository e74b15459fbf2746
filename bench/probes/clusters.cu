// How many clusters are resident at once, by cluster size and shared memory per CTA: what the
// occupancy call says, and whether that many really meet at a barrier of the whole grid.
#include "probe.cuh"

// Every CTA announces itself and waits for all others; gives up after a tenth of a second or so.
__global__ void meet(unsigned* arrived, unsigned* gave_up, unsigned* multiprocessor) {
  extern __shared__ unsigned char reserved[];
  if (threadIdx.x != 0) return;
  reserved[0] = 1;
  unsigned id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  multiprocessor[blockIdx.x] = id;
  atomicAdd(arrived, 1u);
  const long long start = clock64();
  while (*static_cast<volatile unsigned*>(arrived) < gridDim.x) {
    if (clock64() - start > 100'000'000LL) {
      atomicAdd(gave_up, 1u);
      return;
    }
  }
}

int main() {
  const int block = 384;
  unsigned* counters = device_array<unsigned>(2);
  unsigned* multiprocessor = device_array<unsigned>(16 * 2048);
  for (int kibibytes : {1, 100, 200, 227}) {
    const size_t shared_bytes = static_cast<size_t>(kibibytes) * 1024;
    allow(meet, shared_bytes);
    for (int cluster : {1, 2, 4, 8, 16}) {
      const int clusters = active_clusters(meet, cluster, block, shared_bytes);
      const int ctas = clusters * cluster;
      Line line("active_clusters");
      line.put("cluster", cluster).put("shared_kib", kibibytes).put("threads", block);
      line.put("clusters", clusters).put("ctas", ctas);
      if (clusters > 0) {
        CHECK(cudaMemset(counters, 0, 2 * sizeof(unsigned)));
        Launch launch(ctas, block, shared_bytes);
        launch.cluster(cluster);
        CHECK(cudaLaunchKernelEx(&launch.config, meet, counters, counters + 1, multiprocessor));
        CHECK(cudaDeviceSynchronize());
        const std::vector<unsigned> counted = to_host(counters, 2);
        std::vector<unsigned> used = to_host(multiprocessor, ctas);
        std::sort(used.begin(), used.end());
        used.erase(std::unique(used.begin(), used.end()), used.end());
        line.put("multiprocessors_used", static_cast<int>(used.size()));
        line.verified(counted[0] == static_cast<unsigned>(ctas) && counted[1] == 0);
      }
      line.print();
    }
  }
  return finish();
}
