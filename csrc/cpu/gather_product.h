// Products of rows of a factored token table with its last layer, for gather.cpp.
#pragma once

#include <cstdint>

namespace contrec::cpu {

constexpr int kProductRows = 32, kProductColumns = 256;  // of a block at most; a whole of tiles

// out[r][c] = bias[c] + sum over i of hidden[r][i] weight[c, i], each in an order of its own that
// depends on `inner` and the instruction set only. Elements are float32 or bfloat16, sums float32.
struct ProductBlock {
  const void* const* hidden;  // [rows] of [inner]
  void* const* out;           // [rows] of [columns]
  int rows, columns;
  const void* weight;  // [columns, inner]
  const void* bias;    // [columns]
  std::int64_t inner;
};

struct ProductKernel {
  const char* name;
  void (*float32)(const ProductBlock&);
  void (*bfloat16)(const ProductBlock&);
};

// Those that this processor can run, best first.
const ProductKernel* product_kernels(int* count);

}  // namespace contrec::cpu
