// What a decoder layer of a language model does between its matrix products, in float32: norms,
// rotary positions, attention of packed tokens over a cache, gates, and the choice of a token.
//
// T packed tokens belong to sequences, one after another, each of which has a row of the cache.
// Rows of matrices are adjacent numbers; their strides count floats. Bits depend neither on the
// threads nor, in all of this, on the other sequences.
#pragma once

#include <cstdint>

#include "cpu/clones.h"

namespace contrec::cpu {

// x += added (unless null); out = x / sqrt(mean(x^2) + eps) * weight. [tokens, width], contiguous.
struct NormJob {
  float* x;
  const float* added;
  const float* weight;
  double eps;
  float* out;
  std::int64_t tokens, width;
};

// Norms (unless null) and rotates queries in place, and puts norm and rotated keys and the values
// into the cache; queries, or keys and values, may be null. Half-split rotation (Su et al.,
// arXiv 2104.09864, as GPT-NeoX arranges it).
struct RotaryJob {
  float* queries;       // [tokens, heads, dim]
  const float* keys;    // [tokens, key_heads, dim]
  const float* values;  // likewise
  const float *query_norm, *key_norm;  // [dim]
  double eps;
  const float *cosines, *sines;   // [places, dim] by position
  const std::int64_t* positions;  // [tokens], which are places in the cache
  const std::int64_t* rows;       // [tokens] of the cache
  float *stored_keys, *stored_values;  // [rows, key_heads, places, dim]
  std::int64_t tokens, heads, key_heads, dim, places;
};

// Each token attends to its row's places 0 to its position.
struct AttentionJob {
  const float* queries;                // [tokens, heads, dim]
  const float *stored_keys, *stored_values;  // [rows, key_heads, places, dim]
  const std::int64_t* positions;       // [tokens]
  const std::int64_t* rows;            // [tokens], the same throughout a sequence
  const std::int64_t* starts;          // [sequences + 1] first token of each
  float* out;                          // [tokens, heads, dim]
  double scale;
  std::int64_t sequences, heads, key_heads, dim, places;
};

// gate = gate / (1 + exp(-gate)) * up, [tokens, width], contiguous.
struct GateJob {
  float* gate;
  const float* up;
  std::int64_t tokens, width;
};

// out[t] = the first v with the largest hidden[t] weight[v]; contiguous.
struct ChooseJob {
  const float* hidden;  // [tokens, width]
  const float* weight;  // [words, width]
  std::int64_t* out;    // [tokens]
  std::int64_t tokens, words, width;
};

// Throw std::invalid_argument for an instruction set that is unknown or not supported (null: the
// best).
void layer_norm(const NormJob& job, int threads, const char* isa);
void layer_rotary(const RotaryJob& job, int threads, const char* isa);
void layer_attention(const AttentionJob& job, int threads, const char* isa);
void layer_gate(const GateJob& job, int threads, const char* isa);
void choose_tokens(const ChooseJob& job, int threads, const char* isa);

// Names of the instruction sets this processor can run, best first; the last is "portable".
const char* const* layer_instruction_sets(int* count);

// What follows is between layers.cpp and the kernels of each instruction set.

constexpr std::int64_t kWords = 32;    // words whose weights are side by side
constexpr std::int64_t kChosen = 512;  // tokens whose best words so far stay in the cache

struct LayerKernel {
  const char* name;
  void (*norm)(const NormJob& job, std::int64_t first, std::int64_t last);      // tokens
  void (*rotary)(const RotaryJob& job, std::int64_t first, std::int64_t last);  // tokens
  // A sequence's queries of one of the key heads; no place from `reach` on is looked at.
  void (*attention)(const AttentionJob& job, std::int64_t sequence, std::int64_t key_head,
                    std::int64_t reach, float* scratch);
  void (*gate)(const GateJob& job, std::int64_t first, std::int64_t last);  // tokens
  void (*choose)(const ChooseJob& job, std::int64_t first, std::int64_t last, float* scratch);
};

// Null if the compiler has no such instructions.
const LayerKernel* layers_avx2();
const LayerKernel* layers_avx512();
const LayerKernel* layers_portable();

}  // namespace contrec::cpu
