// Softmax cross-entropy over a catalog, forward and backward, without the matrix of logits.
//
// A tile of logits is made, used and forgotten: the forward pass keeps a running maximum and sum
// per query (online softmax: Milakov and Gimelshein, arXiv 1805.02867), the backward pass makes
// the tiles anew. Chunks of items are the threads' tasks. Which items belong to a chunk depends on
// their number only, and what chunks say of a query is added up in their order; so the bits of a
// query's loss and gradient depend neither on the threads nor on the other queries, and those of
// an item's gradient not on the threads.
#pragma once

#include <cstdint>

#include "cpu/clones.h"

namespace contrec::cpu {

struct CrossEntropyJob {
  const void* queries;  // [batch, dim] float32, or bfloat16 where `low`
  const void* vectors;  // [items, dim] likewise
  bool low;
  std::int64_t batch, items, dim;
  bool cosine;                  // rows are divided by their norm, or by 1e-12 if that is more
  const std::int64_t* targets;  // [batch]
  double temperature, smoothing;
  const std::int64_t* seen_offsets;  // [seen_users + 1] or null
  std::int64_t seen_users;
  const std::int64_t* seen_ids;   // ascending within a user
  const std::int64_t* seen_rows;  // [batch]; negative for none
  float* peaks;                   // [batch]: the largest logit
  float* totals;                  // [batch]: sum of exp(logit - peak)
  float* losses;                  // [batch], written by the forward pass like the two before
  const float* gradient;          // [batch] of the losses, for the backward pass
  float* query_gradient;          // [batch, dim], written by it, or null
  float* vector_gradient;         // [items, dim] likewise
};

// Throws std::invalid_argument for an instruction set that is unknown or not supported (null:
// the best), std::out_of_range for a target beyond the items or a row beyond the seen lists.
void cross_entropy_forward(const CrossEntropyJob& job, int threads, const char* isa);
void cross_entropy_backward(const CrossEntropyJob& job, int threads, const char* isa);

// Names of the instruction sets this processor can run, best first; the last is "portable".
const char* const* cross_entropy_instruction_sets(int* count);

// What follows is between cross_entropy.cpp and the kernels of each instruction set.

constexpr std::int64_t kItems = 96;      // items of a tile
constexpr std::int64_t kLossPanel = 32;  // queries side by side
constexpr std::int64_t kQueries = 256;   // queries whose weights meet an item tile at a time
constexpr double kShortest = 1e-12;      // what shorter rows are divided by

// Some of a job's queries, packed. Padded to whole panels of queries with zeros.
struct LossBlock {
  const CrossEntropyJob* job;
  std::int64_t first, count, padded;
  std::int64_t pitch;    // of rows of dim floats: whole strips, and a cache line lest they collide
  const float* columns;  // [padded / kLossPanel, dim, kLossPanel] what logits are products with
  const float* rows;     // [padded, pitch] queries, normalised
  const std::int64_t* targets;              // [padded], -1 beyond the count
  const std::int64_t *seen_begin, *seen_end;  // [padded] places in seen_ids
  // Of the backward pass, [padded]: the gradient of a logit is
  // weight * exp(logit - peak) - smooth, less `hit` at the target.
  const float *peaks, *weight, *smooth, *hit;
  // Written, [chunks, ..]: of the forward pass, [padded] each.
  float *chunk_peaks, *chunk_totals, *chunk_sums;
  float* target_logits;    // [padded]
  float* query_gradients;  // [padded, pitch] of the backward pass, or null
  bool add;                // to the vectors' gradients, instead of writing them
};

struct CrossEntropyKernel {
  const char* name;
  // Items [start, stop) are chunk number `chunk`. `scratch`: loss_scratch_bytes, 64-byte aligned.
  void (*forward)(const LossBlock&, std::int64_t chunk, std::int64_t start, std::int64_t stop,
                  void* scratch);
  void (*backward)(const LossBlock&, std::int64_t chunk, std::int64_t start, std::int64_t stop,
                   void* scratch);
};
std::int64_t loss_scratch_bytes(const LossBlock& block);

const CrossEntropyKernel* cross_entropy_portable();
const CrossEntropyKernel* cross_entropy_avx2();    // null where this build lacks it
const CrossEntropyKernel* cross_entropy_avx512();  // likewise

}  // namespace contrec::cpu
