#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/clones.h"
#include "cpu/gather.h"
#include "cpu/topk_exact.h"  // width_of

namespace contrec::cpu {
namespace {

constexpr std::int64_t kColumns = 512;          // summed at a time, to stay in the L1 cache
constexpr std::int64_t kParallelFrom = 1 << 16;  // elements; fewer do not repay waking threads

CONTREC_CLONES void add_float(const float* row, std::int64_t count, float* sums) {
  for (std::int64_t i = 0; i < count; ++i) sums[i] += row[i];
}

CONTREC_CLONES void add_double(const double* row, std::int64_t count, double* sums) {
  for (std::int64_t i = 0; i < count; ++i) sums[i] += row[i];
}

CONTREC_CLONES void add_bfloat16(const std::uint16_t* row, std::int64_t count, float* sums) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = std::uint32_t(row[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    sums[i] += value;
  }
}

CONTREC_CLONES void narrow_bfloat16(const float* sums, std::int64_t count, std::uint16_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &sums[i], sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[i] = std::uint16_t(sums[i] != sums[i] ? 0x7fc0 : rounded);
  }
}

// The positions that show each row of both tables, in order.
struct Shown {
  std::vector<std::int64_t> rows;       // those that some position shows; text first, then tokens
  std::vector<std::int64_t> starts;     // [rows + 1] into positions
  std::vector<std::int64_t> positions;
};

Shown shown_by_row(const GatherGradients& a) {
  const GatherPositions& at = a.positions;
  const std::int64_t count = at.batch * at.length;
  std::vector<std::int64_t> place(std::size_t(at.words + at.tokens) + 1);
  const auto key = [&at](std::int64_t p) {
    return std::size_t(at.rows[p] == -1 ? at.token_ids[p] : at.words + at.rows[p]);
  };
  const auto wanted = [&](std::int64_t p) {
    return (at.rows[p] == -1 ? a.text_gradient : a.token_gradient) != nullptr;
  };
  for (std::int64_t p = 0; p < count; ++p) {
    if (wanted(p)) ++place[key(p)];
  }
  Shown shown;
  std::int64_t start = 0;
  for (std::size_t row = 0; row < place.size(); ++row) {
    const std::int64_t times = place[row];
    place[row] = start;
    if (times == 0) continue;
    shown.rows.push_back(std::int64_t(row));
    shown.starts.push_back(start);
    start += times;
  }
  shown.starts.push_back(start);
  shown.positions.resize(std::size_t(start));
  for (std::int64_t p = 0; p < count; ++p) {
    if (wanted(p)) shown.positions[std::size_t(place[key(p)]++)] = p;
  }
  return shown;
}

// The sum of some columns of the rows of the gradient at these positions, written to `out`.
void sum_rows(const GatherGradients& a, const std::int64_t* positions, std::int64_t count,
              std::int64_t column, std::int64_t columns, char* out) {
  alignas(64) union {
    float single[kColumns];
    double wide[kColumns];
  } sums;
  std::memset(&sums, 0, sizeof sums);
  const std::int64_t size = width_of(a.dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t p = positions[i], length = a.positions.length;
    const char* row = a.gradient + p / length * a.batch_stride + p % length * a.position_stride;
    row += column * size;
    if (a.dtype == Dtype::kFloat32) {
      add_float(reinterpret_cast<const float*>(row), columns, sums.single);
    } else if (a.dtype == Dtype::kFloat64) {
      add_double(reinterpret_cast<const double*>(row), columns, sums.wide);
    } else {
      add_bfloat16(reinterpret_cast<const std::uint16_t*>(row), columns, sums.single);
    }
  }
  if (a.dtype == Dtype::kBFloat16) {
    narrow_bfloat16(sums.single, columns, reinterpret_cast<std::uint16_t*>(out + column * size));
  } else {
    std::memcpy(out + column * size, &sums, std::size_t(columns * size));
  }
}

}  // namespace

void gather_tokens_backward(const GatherGradients& a, int threads) {
  check_positions(a.positions);
  const Shown shown = shown_by_row(a);
  const std::int64_t size = width_of(a.dtype);
  const std::int64_t parts = (a.width + kColumns - 1) / kColumns;
  const std::int64_t tasks = std::int64_t(shown.rows.size()) * parts;
  if (std::int64_t(shown.positions.size()) * a.width < kParallelFrom) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 4)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::size_t i = std::size_t(task / parts);
    const std::int64_t column = task % parts * kColumns, row = shown.rows[i];
    const std::int64_t token = row - a.positions.words;
    char* out = token < 0 ? a.text_gradient + row * a.width * size
                          : a.token_gradient + token * a.width * size;
    sum_rows(a, shown.positions.data() + shown.starts[i], shown.starts[i + 1] - shown.starts[i],
             column, std::min(kColumns, a.width - column), out);
  }
}

}  // namespace contrec::cpu
