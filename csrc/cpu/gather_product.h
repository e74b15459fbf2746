// Products of rows of a factored token table with its last layer, for gather.cpp.
#pragma once

#include <cstdint>

namespace contrec::cpu {

constexpr int kProductRows = 32;  // at most so many rows in a block

// out[r][c] = bias[c] + sum over i of hidden[r][i] weight[c, i], each in an order of its own that
// depends on `inner` and the instruction set only. Elements are float32 or bfloat16, sums float32.
struct ProductBlock {
  const void* const* hidden;  // [rows] of [inner]
  void* const* out;           // [rows] of [columns]
  int rows;
  const void* weight;  // [columns, inner]
  const void* bias;    // [columns]
  std::int64_t inner, columns;
};

struct ProductKernel {
  const char* name;
  void (*float32)(const ProductBlock&);
  void (*bfloat16)(const ProductBlock&);
};

// Those that this processor can run, best first.
const ProductKernel* product_kernels(int* count);

}  // namespace contrec::cpu
