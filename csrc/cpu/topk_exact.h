// Scores of the operation cosine_topk as it specifies them: float64, in a fixed order.
#pragma once

#include <cstdint>

#include "cpu/topk.h"

namespace contrec::cpu {

// Smallest power of two of at least `width`.
std::int64_t padded(std::int64_t width);

// Bytes of an element.
std::int64_t width_of(Dtype dtype);

// out[0 .. dim) = the row as float64, then zeros up to padded(dim).
void widen(const void* rows, Dtype dtype, std::int64_t row, std::int64_t dim, double* out);

// Sum of left[i] * right[i] over padded(dim) elements: the upper half is added to the lower half
// until one is left. Writes to `work`, of the same size (which may be `left` or `right`).
double fixed_order_dot(const double* left, const double* right, std::int64_t size, double* work);

}  // namespace contrec::cpu
