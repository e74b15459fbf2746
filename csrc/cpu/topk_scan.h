// The low-precision pass of cosine_topk over some items for some queries.
#pragma once

#include <cstdint>

namespace contrec::cpu {

constexpr int kLanes = 16;  // queries side by side in a register
constexpr int kRowAlign = 32;  // elements that a query's row is padded to

// Queries, packed for a kernel. Bfloat16 kernels take them as bfloat16, the others as float32.
//   panels: [groups][(dim + 1) / 2][kLanes] pairs of consecutive elements; float32 pairs are split
//           into kLanes first elements and kLanes second ones. Zeros beyond dim and batch.
//   rows:   [queries][dim padded to kRowAlign], zeros beyond dim.
// A query keeps an item whose biased product reaches a threshold: `matching` where the bit of the
// item's row in `named` is set, else `other`. NaN thresholds keep nothing.
struct ScanQueries {
  std::int64_t dim;
  int count, groups;
  const void* panels;
  const void* rows;
  const float* matching;       // [groups * kLanes]
  const float* other;          // [groups * kLanes]
  const std::uint16_t* named;  // [.., groups] bits of kLanes queries each
};

struct ScanItems {
  const std::uint16_t* rows;  // [count, dim] bfloat16, the first of them is item `first`
  std::int64_t first;
  int count;
  const float* bias;               // [count], -inf for items to leave out and kLanes more behind
  const std::int64_t* named_row;   // [count] rows of ScanQueries.named; not read by `rows`
};

// Takes the kept items: query, item, bias + product. May raise the thresholds.
using Offer = void (*)(void* sink, int query, std::int64_t item, float found);

struct ScanKernel {
  const char* name;
  bool paired;  // takes bfloat16 queries
  // All queries at once, in registers; reads `panels`.
  void (*panels)(const ScanQueries&, const ScanItems&, void* sink, Offer);
  // One query at a time, for small batches; reads `rows`. Compares with the lower threshold only.
  void (*rows)(const ScanQueries&, const ScanItems&, void* sink, Offer);
};

// Kernels this processor can run, best first.
const ScanKernel* scan_kernels(int* count);

}  // namespace contrec::cpu
