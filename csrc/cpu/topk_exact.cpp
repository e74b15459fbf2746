#include "cpu/topk_exact.h"

#include <cstring>

#include "cpu/clones.h"

namespace contrec::cpu {
namespace {

CONTREC_CLONES void widen_float(const float* row, std::int64_t dim, double* out) {
  for (std::int64_t i = 0; i < dim; ++i) out[i] = double(row[i]);
}

CONTREC_CLONES void widen_bfloat16(const std::uint16_t* row, std::int64_t dim, double* out) {
  for (std::int64_t i = 0; i < dim; ++i) {
    const std::uint32_t bits = std::uint32_t(row[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    out[i] = double(value);
  }
}

CONTREC_CLONES void widen_float16(const std::uint16_t* row, std::int64_t dim, double* out) {
  for (std::int64_t i = 0; i < dim; ++i) {
    const std::uint64_t bits = row[i];
    const std::uint64_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const std::uint64_t wide = exponent == 31 ? 2047 : exponent + 1008;
    const std::uint64_t normal = wide << 52 | mantissa << 42;
    double value;
    std::memcpy(&value, &normal, sizeof value);
    value = exponent == 0 ? double(std::int32_t(mantissa)) * 0x1p-24 : value;
    out[i] = bits >> 15 != 0 ? -value : value;
  }
}

}  // namespace

std::int64_t padded(std::int64_t width) {
  std::int64_t size = 1;
  while (size < width) size *= 2;
  return size;
}

std::int64_t width_of(Dtype dtype) {
  if (dtype == Dtype::kFloat64) return 8;
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

void widen(const void* rows, Dtype dtype, std::int64_t row, std::int64_t dim, double* out) {
  const std::int64_t start = row * dim;
  switch (dtype) {
    case Dtype::kFloat32:
      widen_float(static_cast<const float*>(rows) + start, dim, out);
      break;
    case Dtype::kFloat64:
      std::memcpy(out, static_cast<const double*>(rows) + start, std::size_t(dim) * sizeof *out);
      break;
    case Dtype::kBFloat16:
      widen_bfloat16(static_cast<const std::uint16_t*>(rows) + start, dim, out);
      break;
    case Dtype::kFloat16:
      widen_float16(static_cast<const std::uint16_t*>(rows) + start, dim, out);
      break;
  }
  for (std::int64_t i = dim, end = padded(dim); i < end; ++i) out[i] = 0.0;
}

CONTREC_CLONES double fixed_order_dot(const double* left, const double* right, std::int64_t size,
                                      double* work) {
  for (std::int64_t i = 0; i < size; ++i) work[i] = left[i] * right[i];
  while (size > 1) {
    size /= 2;
    const double* upper = work + size;
    for (std::int64_t i = 0; i < size; ++i) work[i] += upper[i];
  }
  return work[0];
}

}  // namespace contrec::cpu
