// Text and continuous tokens side by side as input embeddings (the operation gather_tokens).
//
// The table of continuous tokens is whole, or factored: row r is then the product of hidden row r
// with the weight of layer r % layers, and its bias. Nothing depends on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/topk.h"  // Dtype

namespace contrec::cpu {

// Where each of batch x length positions comes from; contiguous.
struct GatherPositions {
  const std::int64_t* token_ids;  // rows of the text table; read where rows is -1
  const std::int64_t* rows;       // rows of the token table, or -1
  std::int64_t batch, length;
  std::int64_t words, tokens;  // rows of the two tables
};

// Throws std::out_of_range for an id outside its table.
void check_positions(const GatherPositions& positions);

// Rows of adjacent numbers; strides in bytes.
struct GatherArguments {
  GatherPositions positions;
  const char* text_table;
  std::int64_t text_stride;
  const char* token_table;  // whole: [tokens, width]; factored: contiguous [tokens, inner]
  std::int64_t token_stride;
  std::int64_t width, element_bytes;
  char* out;  // [batch, length, width]
  std::int64_t batch_stride, position_stride;
  // Of a factored table, contiguous, else null; elements are float32 or bfloat16.
  const char* weight;  // [layers, width, inner]
  const char* bias;    // [layers, width]
  std::int64_t layers, inner;
  Dtype dtype;
};

// Contiguous; elements float32, float64 or bfloat16, sums in float32 or float64.
struct GatherGradients {
  GatherPositions positions;
  const char* gradient;  // [batch, length, width], rows of adjacent numbers, strides in bytes
  std::int64_t batch_stride, position_stride;
  std::int64_t width;
  Dtype dtype;
  char* text_gradient;   // [words, width] or null; rows that no position shows are left alone
  char* token_gradient;  // [tokens, width] or null, likewise
};

// Names of the instruction sets this processor can run, best first; the last is "portable".
const char* const* gather_instruction_sets(int* count);

// Throws std::out_of_range, before anything is written, for an id outside its table, and
// std::invalid_argument for an instruction set that is unknown or not supported (null: the best).
void gather_tokens(const GatherArguments& arguments, int threads, const char* instruction_set);

// For each row, the sum over the positions that show it, in their order. Throws std::out_of_range.
void gather_tokens_backward(const GatherGradients& arguments, int threads);

}  // namespace contrec::cpu
