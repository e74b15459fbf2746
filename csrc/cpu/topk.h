// Exact top-K by cosine similarity with a bonus (the operation cosine_topk).
//
// One pass over a low-precision copy of the catalog bounds every score from above, and only items
// whose bound reaches the k-th best lower bound met so far are kept. At the end the kept ones are
// scored exactly, in float64 and in the order that the operation specifies. So every item left out
// is certified: its score is strictly below the last one returned.
#pragma once

#include <cstdint>

namespace contrec::cpu {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Contiguous arrays; rows = C, the catalog's capacity.
struct TopkArguments {
  const void* queries;  // [batch, dim] of query_dtype
  Dtype query_dtype;
  std::int64_t batch;
  const void* vectors;  // [rows, dim] of vector_dtype
  Dtype vector_dtype;
  std::int64_t rows, dim;
  const double* norms;         // [rows]
  const std::uint16_t* scan;   // [rows, dim] bfloat16
  const float* errors;         // [rows], see scan_of in contrec_fast/ops/catalog.py
  const std::int32_t* groups;  // [rows]
  const bool* eligible;        // [rows]
  std::int64_t k;
  const bool* matched;  // [batch, matched_groups] or null
  std::int64_t matched_groups;
  double pi;
  const std::int64_t* seen_offsets;  // [seen_users + 1] or null
  std::int64_t seen_users;
  const std::int64_t* seen_ids;
  const std::int64_t* seen_rows;  // [batch] or null; negative for none
  float* scores;                  // [batch, k], out
  std::int64_t* ids;              // [batch, k], out
};

// Of one call. Which items are kept depends on the threads' timing; the lists do not.
struct TopkStatistics {
  std::int64_t kept = 0;      // times an item was kept by the scan
  std::int64_t rescored = 0;  // exact scores computed
  std::int64_t crowded = 0;   // times the bounds alone could not thin out a query's items
};

// Names of the instruction sets this processor can run, best first; the last is "portable".
const char* const* topk_instruction_sets(int* count);

// Throws std::invalid_argument for an instruction set that is unknown or not supported (null:
// the best), std::out_of_range for a row beyond the seen lists.
TopkStatistics cosine_topk(const TopkArguments& arguments, int threads,
                           const char* instruction_set);

}  // namespace contrec::cpu
