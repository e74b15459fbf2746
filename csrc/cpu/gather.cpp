#include "cpu/gather.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "cpu/gather_product.h"

#ifdef __GNUC__
#define CONTREC_PREFETCH(address) __builtin_prefetch(address, 0, 2)  // into the L2 cache
#else
#define CONTREC_PREFETCH(address)
#endif

namespace contrec::cpu {
namespace {

constexpr std::int64_t kParallelFrom = 1 << 18;  // bytes; fewer do not repay waking threads
constexpr std::int64_t kStreamFrom = 16 << 20;   // bytes; more do not stay in the cache

[[noreturn]] void refuse(const char* name, const char* bounds, std::int64_t limit,
                         std::int64_t found) {
  throw std::out_of_range(std::string(name) + ": expected " + bounds + std::to_string(limit) +
                          ", got " + std::to_string(found));
}

// Copies a row and fetches the next one: rows lie anywhere, which no prefetcher foresees.
// kStream: around the cache, where what is written is larger than that and need not be read to be
// overwritten; `to` is then a multiple of 16.
template <bool kStream>
void copy_row(const char* from, std::int64_t bytes, char* to, const char* next) {
  std::int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    CONTREC_PREFETCH(next + i);
#ifdef __SSE2__
    __m128i part[4];
    std::memcpy(part, from + i, sizeof part);
    for (int k = 0; k < 4 && kStream; ++k) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i) + k, part[k]);
    }
    if (!kStream) std::memcpy(to + i, part, sizeof part);
#else
    std::memcpy(to + i, from + i, 64);
#endif
  }
  std::memcpy(to + i, from + i, std::size_t(bytes - i));
}

inline void end_of_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

const ProductKernel& kernel_named(const char* name) {
  int count;
  const ProductKernel* kernels = product_kernels(&count);
  if (name == nullptr) return kernels[0];
  for (int i = 0; i < count; ++i) {
    if (std::string(name) == kernels[i].name) return kernels[i];
  }
  throw std::invalid_argument(std::string("isa: expected one that this processor has, got ") +
                              name);
}

char* place_of(const GatherArguments& a, std::int64_t position) {
  return a.out + position / a.positions.length * a.batch_stride +
         position % a.positions.length * a.position_stride;
}

const char* source_of(const GatherArguments& a, std::int64_t position) {
  const std::int64_t row = a.positions.rows[position];
  return row == -1 ? a.text_table + a.positions.token_ids[position] * a.text_stride
                   : a.token_table + row * a.token_stride;
}

// The positions of each layer's tokens, in order.
std::vector<std::vector<std::int64_t>> positions_by_layer(const GatherArguments& a) {
  std::vector<std::vector<std::int64_t>> found(std::size_t(a.layers));
  for (std::int64_t p = 0; p < a.positions.batch * a.positions.length; ++p) {
    const std::int64_t row = a.positions.rows[p];
    if (row != -1) found[std::size_t(row % a.layers)].push_back(p);
  }
  return found;
}

struct ProductTask {
  std::int64_t layer;
  const std::int64_t* positions;
  int rows, columns;
  std::int64_t column;
};

std::vector<ProductTask> product_tasks(const GatherArguments& a,
                                       const std::vector<std::vector<std::int64_t>>& positions) {
  std::vector<ProductTask> tasks;
  for (std::int64_t layer = 0; layer < a.layers; ++layer) {
    const std::vector<std::int64_t>& all = positions[std::size_t(layer)];
    // Columns outermost: their weights stay in the cache.
    for (std::int64_t column = 0; column < a.width; column += kProductColumns) {
      const int columns = int(std::min(a.width - column, std::int64_t(kProductColumns)));
      for (std::size_t first = 0; first < all.size(); first += kProductRows) {
        const int rows = int(std::min(all.size() - first, std::size_t(kProductRows)));
        tasks.push_back({layer, all.data() + first, rows, columns, column});
      }
    }
  }
  return tasks;
}

void run(const GatherArguments& a, const ProductTask& task, const ProductKernel& kernel) {
  const void* hidden[kProductRows];
  void* out[kProductRows];
  for (int r = 0; r < task.rows; ++r) {
    const std::int64_t position = task.positions[r];
    hidden[r] = a.token_table + a.positions.rows[position] * a.token_stride;
    out[r] = place_of(a, position) + task.column * a.element_bytes;
  }
  const std::int64_t column = task.layer * a.width + task.column;
  const ProductBlock block = {hidden,
                              out,
                              task.rows,
                              task.columns,
                              a.weight + column * a.inner * a.element_bytes,
                              a.bias + column * a.element_bytes,
                              a.inner};
  (a.dtype == Dtype::kFloat32 ? kernel.float32 : kernel.bfloat16)(block);
}

}  // namespace

void check_positions(const GatherPositions& at) {
  for (std::int64_t p = 0; p < at.batch * at.length; ++p) {
    const std::int64_t row = at.rows[p], id = at.token_ids[p];
    if (row < -1 || row >= at.tokens) refuse("rows", "-1 or rows below ", at.tokens, row);
    if (row == -1 && (id < 0 || id >= at.words)) {
      refuse("token_ids", "ids from 0 and below ", at.words, id);
    }
  }
}

const char* const* gather_instruction_sets(int* count) {
  static const char* names[4];
  const ProductKernel* kernels = product_kernels(count);
  for (int i = 0; i < *count; ++i) names[i] = kernels[i].name;
  return names;
}

void gather_tokens(const GatherArguments& a, int threads, const char* instruction_set) {
  const GatherPositions& at = a.positions;
  const ProductKernel& kernel = kernel_named(instruction_set);
  check_positions(at);
  const bool factored = a.weight != nullptr;
  std::vector<std::vector<std::int64_t>> by_layer;
  if (factored) by_layer = positions_by_layer(a);
  const std::vector<ProductTask> tasks =
      factored ? product_tasks(a, by_layer) : std::vector<ProductTask>();
  const std::int64_t count = at.batch * at.length, bytes = a.width * a.element_bytes;
  const bool aligned =
      (reinterpret_cast<std::uintptr_t>(a.out) | std::uintptr_t(a.batch_stride) |
       std::uintptr_t(a.position_stride)) % 16 == 0;
  const bool stream = aligned && count * bytes >= kStreamFrom;
  if (count * bytes < kParallelFrom) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (std::int64_t p = 0; p < count; ++p) {
      if (factored && at.rows[p] != -1) continue;
      const char* next = source_of(a, std::min(p + 1, count - 1));
      (stream ? copy_row<true> : copy_row<false>)(source_of(a, p), bytes, place_of(a, p), next);
    }
    if (stream) end_of_stream();
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < tasks.size(); ++i) run(a, tasks[i], kernel);
  }
}

}  // namespace contrec::cpu
