// Cost of the boundary between two dependent kernels inside a CUDA graph, by grid size, with and
// without programmatic dependent launch, and of the same launches on a stream.
#include "probe.cuh"
#include "ptx.cuh"

// Adds one to a counter that only a right order brings to the number of kernels.
__global__ void count(unsigned* counter, bool programmatic) {
  extern __shared__ unsigned char reserved[];
  if (programmatic) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *counter = __ldcg(counter) + 1;
}

struct Shape {
  const char* name;
  int ctas, threads;
  size_t shared_bytes;
  int cluster;
  bool programmatic;
};

void enqueue(const Shape& shape, int kernels, unsigned* counter, cudaStream_t stream) {
  for (int i = 0; i < kernels; ++i) {
    Launch launch(shape.ctas, shape.threads, shape.shared_bytes, stream);
    if (shape.cluster > 1) launch.cluster(shape.cluster);
    if (shape.programmatic) launch.programmatic();
    CHECK(cudaLaunchKernelEx(&launch.config, count, counter, shape.programmatic));
  }
}

cudaGraphExec_t capture(const Shape& shape, int kernels, unsigned* counter, cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(shape, kernels, counter, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  CHECK(cudaGraphDestroy(graph));
  return executable;
}

int main() {
  raise_clocks();
  const int sms = multiprocessors();
  const size_t large = 200 * 1024;
  allow(count, large);
  unsigned* counter = device_array<unsigned>(1);
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const Shape shapes[] = {
      {"one_cta", 1, 128, 0, 1, false},
      {"one_cta_programmatic", 1, 128, 0, 1, true},
      {"full", sms, 256, 0, 1, false},
      {"full_programmatic", sms, 256, 0, 1, true},
      {"full_200kib", sms, 256, large, 1, false},
      {"full_200kib_programmatic", sms, 256, large, 1, true},
      {"one_cluster_of_16_200kib", 16, 256, large, 16, false},
      {"eight_ctas_per_sm", 8 * sms, 256, 0, 1, false},
  };
  for (const Shape& shape : shapes) {
    if (shape.cluster > 1 &&
        active_clusters(count, shape.cluster, shape.threads, shape.shared_bytes) == 0)
      continue;
    const int few = 200, many = 1200;
    bool right = true;
    Timing graph_time[2], stream_time[2];
    for (int i = 0; i < 2; ++i) {
      const int kernels = i == 0 ? few : many;
      cudaGraphExec_t executable = capture(shape, kernels, counter, stream);
      // Events go to the stream of the replay, so time by hand.
      auto timed = [&](auto launch) {
        cudaEvent_t start, stop;
        CHECK(cudaEventCreate(&start));
        CHECK(cudaEventCreate(&stop));
        std::vector<double> times;
        for (int repeat = 0; repeat < 14; ++repeat) {
          CHECK(cudaMemsetAsync(counter, 0, sizeof(unsigned), stream));
          CHECK(cudaEventRecord(start, stream));
          launch();
          CHECK(cudaEventRecord(stop, stream));
          CHECK(cudaStreamSynchronize(stream));
          float milliseconds = 0;
          CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
          if (repeat >= 3) times.push_back(1e3 * milliseconds);
          right = right && to_host(counter, 1)[0] == static_cast<unsigned>(kernels);
        }
        CHECK(cudaEventDestroy(start));
        CHECK(cudaEventDestroy(stop));
        std::sort(times.begin(), times.end());
        return Timing{times.front(), times[times.size() / 2], times[times.size() * 4 / 5]};
      };
      graph_time[i] = timed([&] { CHECK(cudaGraphLaunch(executable, stream)); });
      stream_time[i] = timed([&] { enqueue(shape, kernels, counter, stream); });
      CHECK(cudaGraphExecDestroy(executable));
    }
    for (bool in_graph : {true, false}) {
      const Timing* time = in_graph ? graph_time : stream_time;
      Line line(in_graph ? "kernel_boundary_in_graph" : "kernel_boundary_on_stream");
      line.put("shape", shape.name).put("ctas", shape.ctas).put("threads", shape.threads);
      line.put(time[1].per(many), "ns");
      // The slope between the two lengths leaves out what the launch of the graph itself costs.
      line.put("slope_ns", 1e3 * (time[1].median - time[0].median) / (many - few));
      line.verified(right).print();
    }
  }
  return finish();
}
