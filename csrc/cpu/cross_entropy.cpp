#include "cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/features.h"

namespace contrec::cpu {
namespace {

using Int = std::int64_t;

constexpr Int kMaxChunks = 32;
constexpr Int kChunkItems = 512;         // at least
constexpr Int kPartialBytes = 16 << 20;  // of queries' gradients, all chunks together
constexpr Int kParallelFrom = 1 << 20;   // products; fewer do not repay waking threads
constexpr Int kAlignment = 64;

Int round_up(Int value, Int unit) { return (value + unit - 1) / unit * unit; }

const std::vector<CrossEntropyKernel>& kernels() {
  static const std::vector<CrossEntropyKernel> found = [] {
    std::vector<CrossEntropyKernel> list;
    const Features& cpu = features();
    const auto add = [&list](bool has, const CrossEntropyKernel* kernel) {
      if (has && kernel != nullptr) list.push_back(*kernel);
    };
    add(cpu.avx512f && cpu.fma, cross_entropy_avx512());
    add(cpu.avx2 && cpu.fma, cross_entropy_avx2());
    add(true, cross_entropy_portable());
    return list;
  }();
  return found;
}

const CrossEntropyKernel& kernel_named(const char* name) {
  if (name == nullptr) return kernels().front();
  for (const CrossEntropyKernel& kernel : kernels()) {
    if (std::string(name) == kernel.name) return kernel;
  }
  throw std::invalid_argument(std::string("isa: expected one that this processor has, got ") +
                              name);
}

void check_rows(const CrossEntropyJob& job) {
  for (Int i = 0; i < job.batch; ++i) {
    if (job.targets[i] < 0 || job.targets[i] >= job.items) {
      throw std::out_of_range("targets: expected rows below " + std::to_string(job.items) +
                              ", got " + std::to_string(job.targets[i]));
    }
    if (job.seen_rows != nullptr && job.seen_rows[i] >= job.seen_users) {
      throw std::out_of_range("seen_rows: expected rows below " + std::to_string(job.seen_users) +
                              ", got " + std::to_string(job.seen_rows[i]));
    }
  }
}

// Whole tiles a chunk; the number of items decides alone.
Int chunk_items(Int items) {
  const Int chunks = std::clamp((items + kChunkItems - 1) / kChunkItems, Int(1), kMaxChunks);
  return round_up((items + chunks - 1) / chunks, kItems);
}

// What a block of queries needs, by itself (the members' addresses must not change).
struct Packed {
  LossBlock block{};
  std::vector<float> columns, rows, peaks, weight, smooth, hit;
  std::vector<Int> targets, seen_begin, seen_end;
  std::vector<double> inverses;  // 1 / norm; negative where the norm is taken for kShortest
  std::vector<double> taking_part;  // items in the query's softmax

  Packed(const CrossEntropyJob& job, Int first, Int count, bool backward) {
    const Int padded = round_up(count, kLossPanel);
    const Int pitch = round_up(job.dim, kLossPanel) + kAlignment / Int(sizeof(float));
    columns.resize(std::size_t(padded * job.dim));
    rows.resize(std::size_t(padded * pitch));
    targets.assign(std::size_t(padded), -1);
    seen_begin.resize(std::size_t(padded));
    seen_end.resize(std::size_t(padded));
    inverses.resize(std::size_t(padded));
    taking_part.resize(std::size_t(padded));
    for (auto* part : {&peaks, &weight, &smooth, &hit}) part->resize(std::size_t(padded));
    for (Int i = 0; i < count; ++i) pack(job, first + i, i, pitch);
    for (Int i = 0; i < count && backward; ++i) {
      const std::size_t at = std::size_t(i);
      const double gradient = double(job.gradient[first + i]) / job.temperature;
      peaks[at] = job.peaks[first + i];
      weight[at] = float(gradient / double(job.totals[first + i]));
      smooth[at] = float(gradient * job.smoothing / taking_part[at]);
      hit[at] = float(gradient * (1.0 - job.smoothing));
    }
    block.job = &job;
    block.first = first;
    block.count = count;
    block.padded = padded;
    block.pitch = pitch;
    block.columns = columns.data();
    block.rows = rows.data();
    block.targets = targets.data();
    block.seen_begin = seen_begin.data();
    block.seen_end = seen_end.data();
    block.peaks = peaks.data();
    block.weight = weight.data();
    block.smooth = smooth.data();
    block.hit = hit.data();
    block.add = first > 0;
  }

  void pack(const CrossEntropyJob& job, Int query, Int i, Int pitch) {
    float* const row = rows.data() + i * pitch;
    for (Int d = 0; d < job.dim; ++d) {
      if (job.low) {
        const auto* from = static_cast<const std::uint16_t*>(job.queries) + query * job.dim;
        const std::uint32_t bits = std::uint32_t(from[d]) << 16;
        std::memcpy(row + d, &bits, sizeof bits);
      } else {
        row[d] = static_cast<const float*>(job.queries)[query * job.dim + d];
      }
    }
    double inverse = 1.0;
    if (job.cosine) {
      double sum = 0.0;
      for (Int d = 0; d < job.dim; ++d) sum += double(row[d]) * double(row[d]);
      const double norm = std::sqrt(sum);
      inverse = 1.0 / (norm < kShortest ? kShortest : norm);
      inverses[std::size_t(i)] = norm < kShortest ? -inverse : inverse;
    }
    float* const column = columns.data() + i / kLossPanel * kLossPanel * job.dim + i % kLossPanel;
    for (Int d = 0; d < job.dim; ++d) {
      const double unit = double(row[d]) * inverse;
      column[d * kLossPanel] = float(unit / job.temperature);
      row[d] = float(unit);
    }
    const Int target = targets[std::size_t(i)] = job.targets[query];
    Int left_out = 0;
    if (job.seen_rows != nullptr && job.seen_rows[query] >= 0) {
      const Int begin = job.seen_offsets[job.seen_rows[query]];
      const Int end = job.seen_offsets[job.seen_rows[query] + 1];
      seen_begin[std::size_t(i)] = begin;
      seen_end[std::size_t(i)] = end;
      for (Int place = begin; place < end; ++place) {
        const Int item = job.seen_ids[place];
        left_out += item != target && (place == begin || item != job.seen_ids[place - 1]);
      }
    }
    taking_part[std::size_t(i)] = double(job.items - left_out);
  }
};

// Runs one of a kernel's two functions on all chunks.
template <class Function>
void run_chunks(const LossBlock& block, int threads, Function function) {
  const Int items = block.job->items, size = chunk_items(items);
  const Int chunks = (items + size - 1) / size;
  if (items * block.job->dim * block.count < kParallelFrom) threads = 1;
#ifndef _OPENMP
  threads = 1;
#endif
  threads = int(std::min<Int>(threads, chunks));
  const Int bytes = round_up(loss_scratch_bytes(block), kAlignment);
  const std::unique_ptr<char[]> memory(new char[std::size_t(threads * bytes + kAlignment)]);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
  char* const scratch = memory.get() + (kAlignment - Int(address % kAlignment)) % kAlignment;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (Int chunk = 0; chunk < chunks; ++chunk) {
    function(block, chunk, chunk * size, std::min(items, (chunk + 1) * size),
             scratch + thread_number() * bytes);
  }
}

Int number_of_chunks(const CrossEntropyJob& job) {
  const Int size = chunk_items(job.items);
  return (job.items + size - 1) / size;
}

// Queries at a time: as many as the chunks' partial gradients have room for.
Int block_queries(const CrossEntropyJob& job) {
  const Int width = round_up(job.dim, kLossPanel) * Int(sizeof(float)) * number_of_chunks(job);
  return std::max(kQueries, kPartialBytes / width / kQueries * kQueries);
}

}  // namespace

std::int64_t loss_scratch_bytes(const LossBlock& block) {
  const Int floats = kItems * (2 * block.pitch + kQueries + 16);
  const Int words = kItems + block.padded + kItems * kLossPanel;
  return floats * Int(sizeof(float)) + words * Int(sizeof(Int)) + 6 * kAlignment;
}

const char* const* cross_entropy_instruction_sets(int* count) {
  static const char* names[4];
  *count = 0;
  for (const CrossEntropyKernel& kernel : kernels()) names[(*count)++] = kernel.name;
  return names;
}

void cross_entropy_forward(const CrossEntropyJob& job, int threads, const char* isa) {
  const CrossEntropyKernel& kernel = kernel_named(isa);
  check_rows(job);
  const Int step = block_queries(job), chunks = number_of_chunks(job);
  for (Int first = 0; first < job.batch; first += step) {
    Packed packed(job, first, std::min(step, job.batch - first), false);
    LossBlock& block = packed.block;
    std::vector<float> found(std::size_t((3 * chunks + 1) * block.padded));
    block.chunk_peaks = found.data();
    block.chunk_totals = block.chunk_peaks + chunks * block.padded;
    block.chunk_sums = block.chunk_totals + chunks * block.padded;
    block.target_logits = block.chunk_sums + chunks * block.padded;
    run_chunks(block, threads, kernel.forward);
    for (Int i = 0; i < block.count; ++i) {
      float peak = block.chunk_peaks[i];
      for (Int c = 1; c < chunks; ++c) {
        peak = std::max(peak, block.chunk_peaks[c * block.padded + i]);
      }
      double total = 0.0, sum = 0.0;
      for (Int c = 0; c < chunks; ++c) {
        const Int at = c * block.padded + i;
        total += double(block.chunk_totals[at]) *
                 std::exp(double(block.chunk_peaks[at]) - double(peak));
        sum += double(block.chunk_sums[at]);
      }
      const double e = job.smoothing, mean = sum / packed.taking_part[std::size_t(i)];
      job.peaks[first + i] = peak;
      job.totals[first + i] = float(total);
      job.losses[first + i] =
          float(std::log(total) + (1.0 - e) * (double(peak) - double(block.target_logits[i])) +
                (e > 0.0 ? e * (double(peak) - mean) : 0.0));
    }
  }
}

void cross_entropy_backward(const CrossEntropyJob& job, int threads, const char* isa) {
  const CrossEntropyKernel& kernel = kernel_named(isa);
  check_rows(job);
  const Int step = block_queries(job), chunks = number_of_chunks(job);
  for (Int first = 0; first < job.batch; first += step) {
    Packed packed(job, first, std::min(step, job.batch - first), true);
    LossBlock& block = packed.block;
    // Every entry is written, so none is cleared first.
    std::unique_ptr<float[]> found;
    const Int size = block.padded * block.pitch;
    if (job.query_gradient != nullptr) found.reset(new float[std::size_t(chunks * size)]);
    block.query_gradients = found.get();
    run_chunks(block, threads, kernel.backward);
    std::vector<double> sums(std::size_t(job.dim));
    for (Int i = 0; i < block.count && job.query_gradient != nullptr; ++i) {
      const float* const unit = packed.rows.data() + i * block.pitch;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (Int c = 0; c < chunks; ++c) {
        const float* const part = block.query_gradients + c * size + i * block.pitch;
        for (Int d = 0; d < job.dim; ++d) sums[std::size_t(d)] += double(part[d]);
      }
      const double inverse = job.cosine ? packed.inverses[std::size_t(i)] : 1.0;
      double along = 0.0;
      for (Int d = 0; d < job.dim && job.cosine && !(inverse < 0.0); ++d) {
        along += sums[std::size_t(d)] * double(unit[d]);
      }
      float* const to = job.query_gradient + (first + i) * job.dim;
      for (Int d = 0; d < job.dim; ++d) {
        const double value = sums[std::size_t(d)] - along * double(unit[d]);
        to[d] = float(value * std::abs(inverse));
      }
    }
  }
}

}  // namespace contrec::cpu
