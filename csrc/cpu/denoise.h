// What stands around the products of a denoiser's evaluation and of its gradients, each in one
// pass over rows: `denoise` on the CPU. The products are the library's.
//
// All tensors of a call have one dtype, float32 or bfloat16, and rows without gaps; arithmetic is
// in float32. A row's result does not depend on the others or on the number of threads. Members of
// the structures other than `Batch` are addresses and 64-bit integers, as Python hands them over.
#pragma once

#include <cstdint>

namespace contrec::cpu {

// A table of rows of which row r of the batch uses row index[r]; all the same one if stride is 0.
struct Table {
  const void* data;  // null: no such term
  std::int64_t stride;
};

struct Batch {
  bool bfloat16;
  std::int64_t rows, width;
  const std::int64_t* index;  // [rows] into tables, or null: row r uses row r
  float guidance;             // w
  const bool* dropped;        // [rows] where w is 0, or null
  int threads;
};

// Activations of a hidden layer: with a = shared + time and c the condition's part,
// u = (1 + w) gelu(a + c) - w gelu(a + null), or gelu(a + c) without null.
// With grad = dL/du also of_condition = dL/dc and sum = dL/da.
struct Hidden {
  const void *shared, *condition;  // [rows, width]; without a condition that is in `shared`
  Table time, null;
  const void* grad;                // [rows, width] or null
  void *u, *of_condition, *sum;    // [rows, width]; the gradients only with grad and null
};
void hidden(const Batch& batch, const Hidden& tensors);

// Modulations: parts side by side, [., parts * width]. Rows of the null branch take `null`, the
// others `users` [rows, ...]; to both comes `time`.
struct Modulation {
  Table users, time, null;
};

// A modulated layer norm of `branches` (1 or 2: conditional, null) times `rows` rows of the state,
// inner = norm(h) (1 + scale) + shift with parts 0 and 1 of the modulation; folded, the sum of
// (1 + w) times the conditional and -w times the null branch's [rows, width].
struct Norm {
  const void* state;            // [branches, rows, width], state_stride apart
  std::int64_t branches, folded;
  std::int64_t state_stride;    // between branches; 0: both have the same
  const void *weight, *bias;    // [width] or null
  Modulation modulation;
  void* inner;                  // [branches, rows, width], folded [rows, width]
  // Gradients, if grad is not null: of the state, of the modulation's parts 0 and 1 and, with a
  // weight, sums of those of weight and bias over kChunk rows each.
  const void* grad;             // of inner
  const void* after;            // [branches, rows, width] added to of_state, or null
  void* of_state;               // [branches, rows, width]
  void* of_modulation;          // [branches, rows, modulation_stride]
  std::int64_t modulation_stride;
  float* of_norm;               // [branches * ceil(rows / kChunk), 2, width]
};
constexpr std::int64_t kChunk = 32;
void norm(const Batch& batch, const Norm& tensors);

// state + gate * value, the gate being part 2 of the modulation; of its gradient `grad`, gate *
// grad and, as part 2 of that of the modulation, value * grad.
struct Residual {
  const void* state;
  std::int64_t branches, state_stride;
  const void* value;  // [branches, rows, width]
  Modulation modulation;
  const void* grad;   // [branches, rows, width] or null
  void *out;          // [branches, rows, width]
  void* of_modulation;
  std::int64_t modulation_stride;
};
void residual(const Batch& batch, const Residual& tensors);

// silu(value) and grad * silu'(value), which replaces grad; [rows, width] each.
struct SiluGradient {
  const void* value;
  void *grad, *activated;
};
void silu_gradient(const Batch& batch, const SiluGradient& tensors);

// out[t] = sum of the batch rows with index t, in their order: float32 [table_rows, width].
struct SumByIndex {
  const void* values;  // [rows, width]
  float* out;
  std::int64_t table_rows;
};
void sum_by_index(const Batch& batch, const SumByIndex& tensors);

}  // namespace contrec::cpu
