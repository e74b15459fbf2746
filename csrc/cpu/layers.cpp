#include "cpu/layers.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/features.h"

namespace contrec::cpu {
namespace {

using Int = std::int64_t;

constexpr Int kParallelFrom = 1 << 16;  // floats; fewer do not repay waking threads
constexpr Int kMostLanes = 16, kMostRows = 12;  // of any set of instructions

Int round_up(Int value, Int unit) { return (value + unit - 1) / unit * unit; }

const std::vector<LayerKernel>& kernels() {
  static const std::vector<LayerKernel> found = [] {
    std::vector<LayerKernel> list;
    const Features& cpu = features();
    const auto add = [&list](bool has, const LayerKernel* kernel) {
      if (has && kernel != nullptr) list.push_back(*kernel);
    };
    add(cpu.avx512f && cpu.fma, layers_avx512());
    add(cpu.avx2 && cpu.fma, layers_avx2());
    add(true, layers_portable());
    return list;
  }();
  return found;
}

const LayerKernel& kernel_named(const char* name) {
  if (name == nullptr) return kernels().front();
  for (const LayerKernel& kernel : kernels()) {
    if (std::string(name) == kernel.name) return kernel;
  }
  throw std::invalid_argument(std::string("isa: expected one that this processor has, got ") +
                              name);
}

// Calls function(job, first, last, thread) for parts of the tokens, one for each thread.
template <class Function>
void in_parts(Int tokens, Int width, int threads, Function function) {
  if (tokens * width < kParallelFrom) threads = 1;
#ifndef _OPENMP
  threads = 1;
#endif
  const Int size = round_up(std::max<Int>(1, (tokens + threads - 1) / threads), kMostRows);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (Int part = 0; part < threads; ++part) {
    const Int first = std::min(tokens, part * size), last = std::min(tokens, first + size);
    if (first < last) function(first, last, part);
  }
}

}  // namespace

const char* const* layer_instruction_sets(int* count) {
  static const char* names[4];
  *count = 0;
  for (const LayerKernel& kernel : kernels()) names[(*count)++] = kernel.name;
  return names;
}

void layer_norm(const NormJob& job, int threads, const char* isa) {
  const LayerKernel& kernel = kernel_named(isa);
  in_parts(job.tokens, job.width, threads,
           [&](Int first, Int last, Int) { kernel.norm(job, first, last); });
}

void layer_rotary(const RotaryJob& job, int threads, const char* isa) {
  const LayerKernel& kernel = kernel_named(isa);
  in_parts(job.tokens, (job.heads + 2 * job.key_heads) * job.dim, threads,
           [&](Int first, Int last, Int) { kernel.rotary(job, first, last); });
}

void layer_gate(const GateJob& job, int threads, const char* isa) {
  const LayerKernel& kernel = kernel_named(isa);
  in_parts(job.tokens, job.width, threads,
           [&](Int first, Int last, Int) { kernel.gate(job, first, last); });
}

void layer_attention(const AttentionJob& job, int threads, const char* isa) {
  const LayerKernel& kernel = kernel_named(isa);
#ifndef _OPENMP
  threads = 1;
#endif
  const Int tokens = job.starts[job.sequences];
  std::vector<Int> reach(std::size_t(job.sequences), 0);
  Int longest = 0;
  for (Int s = 0; s < job.sequences; ++s) {
    for (Int t = job.starts[s]; t < job.starts[s + 1]; ++t) {
      reach[std::size_t(s)] = std::max(reach[std::size_t(s)], job.positions[t] + 1);
    }
    longest = std::max(longest, reach[std::size_t(s)]);
  }
  if (tokens * job.heads * longest < kParallelFrom) threads = 1;
  const Int pitch = round_up(longest, 2 * kMostLanes) + kMostLanes;
  const Int width = round_up(job.dim, 2 * kMostLanes);
  const Int floats = (job.dim + kMostRows) * pitch + kMostRows * job.dim + longest * width;
  const std::unique_ptr<float[]> scratch(new float[std::size_t(threads * floats)]);
  const Int tasks = job.sequences * job.key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (Int task = 0; task < tasks; ++task) {
    const Int sequence = task / job.key_heads;
    if (job.starts[sequence] == job.starts[sequence + 1]) continue;
    kernel.attention(job, sequence, task % job.key_heads, reach[std::size_t(sequence)],
                     scratch.get() + thread_number() * floats);
  }
}

void choose_tokens(const ChooseJob& job, int threads, const char* isa) {
  const LayerKernel& kernel = kernel_named(isa);
  const Int floats = job.width * kWords + 2 * kChosen * kMostLanes;
  const std::unique_ptr<float[]> scratch(new float[std::size_t(std::max(1, threads) * floats)]);
  in_parts(job.tokens, job.words * job.width, threads, [&](Int first, Int last, Int part) {
    kernel.choose(job, first, last, scratch.get() + part * floats);
  });
}

}  // namespace contrec::cpu
