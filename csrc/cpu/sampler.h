// A guided sampler's whole chain for blocks of rows: `sample` on the CPU.
#pragma once

#include <cstdint>

#include "cpu/clones.h"

namespace contrec::cpu {

enum class Network { kLinear, kMLP, kAdaLN, kSeparable };

// Which instructions to use; later ones need a processor with more. Only kAVX512BF16 multiplies
// in bfloat16, the others in float32.
enum class Instructions { kPortable, kAVX2, kAVX512, kAVX512BF16 };

// Widths below are rounded up to whole panels of kPanel columns, the rest being zeros: D', H' (the
// hidden width) and, in an AdaLN head, each of the modulations' parts. A "matrix" [N, K] of
// weights is stored by panels: [N' / kPanel, K'' / pair, kPanel, pair], K'' being K rounded up to
// an even number, with pair = 1 for float32 and 2 for bfloat16. All other tensors are float32.
constexpr int kPanel = 32;

struct LinearTensors {
  const void* of_x;          // matrix [D, D]
  const void* of_condition;  // matrix [D, D]
  const float* times;        // [steps, D'], with the bias and -w times the null branch's term
};

struct MLPTensors {
  const void* of_x;          // matrix [H, D]
  const void* of_condition;  // matrix [H, D]
  const float* times;        // [steps, H'], bias included
  const float* null;         // [H']
  const void* output;        // matrix [D, H]
  const float* output_bias;  // [D']
};

struct AdaLNTensors {
  const void* input;               // matrix [H, D]
  const float* input_bias;         // [H']
  const void* condition;           // matrix [H, D]
  const float* condition_bias;     // [H']
  const float* times;              // [steps, H']; not used when separable
  const void* modulation;          // matrix [M, H], M' = (3 depth + 2) H'
  const float* modulation_bias;    // [M']
  const float* time_modulation;    // [steps, M'], or null unless separable
  const float* null_modulation;    // [steps, M']
  const float* norm;               // [depth, 2, H']
  const void* expand;              // depth matrices [H, H]
  const float* expand_bias;        // [depth, H']
  const void* contract;            // depth matrices [H, H]
  const float* contract_bias;      // [depth, H']
  const void* output;              // matrix [D, H]
  const float* output_bias;        // [D']
};

struct SamplerJob {
  Network network;
  union {
    LinearTensors linear;
    MLPTensors mlp;
    AdaLNTensors adaln;
  };
  std::int64_t dim, hidden, depth;  // D; H; blocks of an AdaLN head
  std::int64_t steps, noises;       // noises: x_T and how many of the first steps add noise
  bool multistep;                   // whether a step uses the prediction of the one before
  float guidance;
  // [steps, 6] c_f, c_x, sigma, c_previous, p_x, p_f: the step is
  // x' = c_f f + c_x x + sigma noise + c_previous x0_previous, with x0 = p_x x + p_f f.
  const float* coefficients;
  std::int64_t batch, samples;
  const float* condition;         // [batch, D]
  const float* noise;             // [samples, noise_entries, batch, D], or null: counter-based
  std::int64_t noise_entries;
  std::uint64_t seed;
  const std::int64_t* user_ids;   // [batch]
  bool round_noise;               // counter-based noise to bfloat16
  float* out;                     // [samples, batch, D]
};

// Whether this build and this processor have these instructions.
bool has(Instructions instructions);

// Runs the job. A row's result does not depend on the others or on the number of threads: every
// sum of products is taken in one order, by one thread.
void sample(const SamplerJob& job, Instructions instructions, int threads);

// A row block's worth of the job for one set of instructions: rows [first, first + rows) of the
// samples * batch, at most kMaxRows. `scratch` is 64-byte aligned; more rows need no fewer bytes.
struct Sampler {
  std::int64_t (*scratch_bytes)(const SamplerJob&, std::int64_t rows);
  void (*run)(const SamplerJob&, std::int64_t first, std::int64_t rows, void* scratch);
};
constexpr std::int64_t kMaxRows = 64;

const Sampler* sampler_portable();
const Sampler* sampler_avx2();         // null where this build lacks it
const Sampler* sampler_avx512();       // likewise
const Sampler* sampler_avx512_bf16();  // likewise

}  // namespace contrec::cpu
