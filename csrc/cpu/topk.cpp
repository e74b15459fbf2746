#include "cpu/topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cpu/topk_candidates.h"
#include "cpu/topk_exact.h"
#include "cpu/topk_scan.h"

namespace contrec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kMaxQueries = 256;           // of a block
constexpr std::int64_t kKeptBytes = 24 << 20;       // held by all threads together
constexpr std::int64_t kPieceElements = 8192;       // of the scan copy, to stay in the L1 cache
constexpr std::int64_t kTileMultiple = 30;          // of every kernel's kTileItems
constexpr std::int64_t kPiecesPerTask = 16;
constexpr std::int64_t kParallelFrom = 1 << 20;     // products; fewer do not repay waking threads

const ScanKernel& kernel_named(const char* name) {
  int count;
  const ScanKernel* kernels = scan_kernels(&count);
  if (name == nullptr) return kernels[0];
  for (int i = 0; i < count; ++i) {
    if (std::string(name) == kernels[i].name) return kernels[i];
  }
  throw std::invalid_argument(std::string("isa: expected one that this processor has, got ") +
                              name);
}

void offer(void* sink, int query, std::int64_t item, float found) {
  static_cast<Candidates*>(sink)->offer(query, item, found);
}

// Scan the items from `start` up to `stop`, a few at a time.
void scan(const ScanKernel& kernel, bool by_rows, const QueryBlock& block, Candidates& kept,
          std::int64_t start, std::int64_t stop, std::int64_t piece) {
  const TopkArguments& arguments = block.arguments;
  const ScanQueries queries = kept.queries();
  std::vector<float> bias(static_cast<std::size_t>(piece + kLanes));
  std::vector<std::int64_t> named_row(static_cast<std::size_t>(piece));
  kept.refresh();
  for (; start < stop; start += piece) {
    const int count = int(std::min(piece, stop - start));
    bool any = false;
    for (int i = 0; i < count; ++i) {
      any |= arguments.eligible[start + i];
      bias[std::size_t(i)] = arguments.eligible[start + i] ? arguments.errors[start + i] : -kInfinity;
    }
    if (!any) continue;  // spare rows
    std::fill_n(bias.begin() + count, kLanes, -kInfinity);
    for (int i = 0; i < count && !by_rows; ++i) {
      named_row[std::size_t(i)] = block.named_row(start + i);
    }
    const ScanItems items = {arguments.scan + start * arguments.dim, start, count, bias.data(),
                             named_row.data()};
    (by_rows ? kernel.rows : kernel.panels)(queries, items, &kept, offer);
  }
}

// The items kept for a query that may belong to its list, with their scores.
std::vector<Candidates::Entry> survivors(const QueryBlock& block,
                                         const std::vector<Candidates>& kept, int query,
                                         TopkStatistics& statistics, double* work) {
  std::vector<Candidates::Entry> entries;
  for (const Candidates& part : kept) {
    entries.insert(entries.end(), part.begin(query), part.end(query));
  }
  // The scores of any k items bound the k-th best from below; these make a good bound.
  const auto better = [](const auto& a, const auto& b) { return a.upper > b.upper; };
  const std::size_t first = std::min(std::size_t(block.arguments.k), entries.size());
  std::nth_element(entries.begin(), entries.begin() + std::ptrdiff_t(first), entries.end(), better);
  Candidates::Entry* const data = entries.data();
  statistics.rescored += settle(block, query, data, data + first, work);
  float floor = kInfinity;
  for (std::size_t i = 0; i < first; ++i) floor = std::min(floor, data[i].lower);
  const auto rest = std::remove_if(entries.begin() + std::ptrdiff_t(first), entries.end(),
                                   [floor](const auto& entry) { return entry.upper < floor; });
  entries.erase(rest, entries.end());
  statistics.rescored += settle(block, query, data + first, data + entries.size(), work);
  return entries;
}

// The first k items that a zero query may have: all score 0.
std::vector<Candidates::Entry> first_items(const QueryBlock& block, int query, double* work) {
  const TopkArguments& arguments = block.arguments;
  std::vector<Candidates::Entry> entries;
  for (std::int64_t item = 0; item < arguments.rows; ++item) {
    if (std::int64_t(entries.size()) == arguments.k) break;
    if (!arguments.eligible[item] || block.seen(query, item)) continue;
    entries.push_back({kInfinity, -kInfinity, item});
  }
  settle(block, query, entries.data(), entries.data() + entries.size(), work);
  return entries;
}

void finish(const QueryBlock& block, const std::vector<Candidates>& kept, int query,
            TopkStatistics& statistics) {
  const TopkArguments& arguments = block.arguments;
  std::vector<double> work(std::size_t(padded(arguments.dim)));
  std::vector<Candidates::Entry> entries;
  if (block.zero(query)) {
    entries = first_items(block, query, work.data());
  } else if (!block.empty(query)) {
    entries = survivors(block, kept, query, statistics, work.data());
  }
  const std::int64_t length = std::min(arguments.k, std::int64_t(entries.size()));
  std::partial_sort(entries.begin(), entries.begin() + length, entries.end(), comes_before);
  float* scores = arguments.scores + (block.first + query) * arguments.k;
  std::int64_t* ids = arguments.ids + (block.first + query) * arguments.k;
  for (std::int64_t rank = 0; rank < arguments.k; ++rank) {
    const bool there = rank < length;
    scores[rank] = there ? entries[std::size_t(rank)].lower : -kInfinity;
    ids[rank] = there ? entries[std::size_t(rank)].item : -1;
  }
}

void serve(const TopkArguments& arguments, std::int64_t first, int count, int threads,
           const ScanKernel& kernel, TopkStatistics& statistics) {
  // Products of whole rows waste no lanes on few queries, but add up across lanes for each.
  const std::int64_t lanes = (count + kLanes - 1) / kLanes * (arguments.dim / 2 + 8);
  const bool by_rows = count * (arguments.dim / kRowAlign + 10) < lanes;
  QueryBlock block(arguments, first, count, kernel.paired, by_rows);
  if (arguments.rows * arguments.dim * count < kParallelFrom) threads = 1;
  std::vector<Candidates> kept;
  kept.reserve(std::size_t(threads));
  for (int i = 0; i < threads; ++i) kept.emplace_back(block);

  const std::int64_t multiples = kPieceElements / arguments.dim / kTileMultiple;
  const std::int64_t piece =
      kTileMultiple * std::clamp(multiples, std::int64_t(1), std::int64_t(8));
  const std::int64_t task = piece * kPiecesPerTask;
  const std::int64_t tasks = (arguments.rows + task - 1) / task;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Candidates& own = kept[std::size_t(thread_number())];
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < tasks; ++i) {
      scan(kernel, by_rows, block, own, i * task, std::min(arguments.rows, (i + 1) * task), piece);
    }
#pragma omp for schedule(dynamic)
    for (int query = 0; query < count; ++query) finish(block, kept, query, own.statistics);
  }
  for (const Candidates& part : kept) {
    statistics.kept += part.statistics.kept;
    statistics.rescored += part.statistics.rescored;
    statistics.crowded += part.statistics.crowded;
  }
}

}  // namespace

const char* const* topk_instruction_sets(int* count) {
  static const char* names[8];
  const ScanKernel* kernels = scan_kernels(count);
  for (int i = 0; i < *count; ++i) names[i] = kernels[i].name;
  return names;
}

TopkStatistics cosine_topk(const TopkArguments& arguments, int threads,
                           const char* instruction_set) {
  const ScanKernel& kernel = kernel_named(instruction_set);
  for (std::int64_t i = 0; i < arguments.batch && arguments.seen_rows != nullptr; ++i) {
    if (arguments.seen_rows[i] >= arguments.seen_users) {
      throw std::out_of_range("seen_rows: expected rows below " +
                              std::to_string(arguments.seen_users) + ", got " +
                              std::to_string(arguments.seen_rows[i]));
    }
  }
#ifndef _OPENMP
  threads = 1;
#endif
  const std::int64_t bytes =
      Candidates::capacity(arguments) * std::int64_t(sizeof(Candidates::Entry)) * threads;
  const std::int64_t step = std::clamp(kKeptBytes / bytes, std::int64_t(1), kMaxQueries);
  TopkStatistics statistics;
  for (std::int64_t first = 0; first < arguments.batch; first += step) {
    const int count = int(std::min(step, arguments.batch - first));
    serve(arguments, first, count, threads, kernel, statistics);
  }
  return statistics;
}

}  // namespace contrec::cpu
