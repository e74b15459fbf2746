// to[column, row] = from[row, column], for layers_kernel.h, in plain C++.
#pragma once

namespace contrec::cpu {
namespace {

inline void transpose(const float* from, std::int64_t rows, std::int64_t columns, float* to,
                      std::int64_t pitch) {
  constexpr std::int64_t kBlock = 8;  // whose lines stay in the cache
  for (std::int64_t c = 0; c < columns; c += kBlock) {
    const std::int64_t end = c + kBlock < columns ? c + kBlock : columns;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = c; i < end; ++i) to[i * pitch + r] = from[r * columns + i];
    }
  }
}

}  // namespace
}  // namespace contrec::cpu
