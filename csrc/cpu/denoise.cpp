#include "cpu/denoise.h"

#include <algorithm>
#include <memory>

#include "cpu/clones.h"
#include "cpu/features.h"

namespace contrec::cpu {
namespace {

// One float: loops over columns are vectorised by the compiler, once per set of instructions.
struct Vec {
  float v;
  static Vec set(float x) { return {x}; }
};
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec nearest(Vec a) { return {(a.v + 12582912.0f) - 12582912.0f}; }  // 1.5 * 2^23
inline Vec times_power_of_two(Vec a, Vec n) {
  const std::uint32_t bits = std::uint32_t(std::int32_t(n.v) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return {a.v * power};
}

}  // namespace
}  // namespace contrec::cpu

#include "cpu/elementwise.h"

namespace contrec::cpu {
namespace {

using Int = std::int64_t;

struct BFloat16 {
  std::uint16_t bits;
};

inline float get(const float* p, Int i) { return p[i]; }
inline float get(const BFloat16* p, Int i) {
  const std::uint32_t bits = std::uint32_t(p[i].bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline void put(float* p, Int i, float value) { p[i] = value; }
inline void put(BFloat16* p, Int i, float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  p[i].bits = std::uint16_t(value == value ? rounded : 0x7fc0);
}

template <class T>
inline const T* of(const void* data, Int offset) {
  return static_cast<const T*>(data) + offset;
}
template <class T>
inline T* of(void* data, Int offset) {
  return static_cast<T*>(data) + offset;
}

// Row r's row of a table; null without the table.
template <class T>
inline const T* row_of(const Batch& b, const Table& table, Int r) {
  if (table.data == nullptr) return nullptr;
  const Int row = b.index != nullptr && table.stride != 0 ? b.index[r] : r;
  return of<T>(table.data, row * table.stride);
}

inline float guidance_of(const Batch& b, Int r) {
  return b.dropped != nullptr && b.dropped[r] ? 0.0f : b.guidance;
}

template <class T>
__attribute__((always_inline)) inline void hidden_rows(const Batch& b, const Hidden& h, Int first,
                                                       Int last) {
  for (Int r = first; r < last; ++r) {
    const Int place = r * b.width;
    const T* __restrict shared = of<T>(h.shared, place);
    const T* __restrict time = row_of<T>(b, h.time, r);
    T* __restrict u = of<T>(h.u, place);
    const float w = guidance_of(b, r);
    if (h.null.data == nullptr) {
      if (h.grad == nullptr) {
        for (Int i = 0; i < b.width; ++i) put(u, i, gelu({get(shared, i) + get(time, i)}).v);
        continue;
      }
      const T* __restrict grad = of<T>(h.grad, place);
      T* __restrict sum = of<T>(h.sum, place);
      for (Int i = 0; i < b.width; ++i) {
        Vec value;
        const float slope = gelu_derivative({get(shared, i) + get(time, i)}, value).v;
        put(u, i, value.v);
        put(sum, i, get(grad, i) * slope);
      }
      continue;
    }
    const T* __restrict condition = of<T>(h.condition, place);
    const T* __restrict null = row_of<T>(b, h.null, r);
    if (h.grad == nullptr) {
      for (Int i = 0; i < b.width; ++i) {
        const float a = get(shared, i) + get(time, i);
        const float with = gelu({a + get(condition, i)}).v, without = gelu({a + get(null, i)}).v;
        put(u, i, (1 + w) * with - w * without);
      }
      continue;
    }
    const T* __restrict grad = of<T>(h.grad, place);
    T* __restrict of_condition = of<T>(h.of_condition, place);
    T* __restrict sum = of<T>(h.sum, place);
#pragma omp simd
    for (Int i = 0; i < b.width; ++i) {
      const float a = get(shared, i) + get(time, i), g = get(grad, i);
      Vec with, without;
      const float one = (1 + w) * g * gelu_derivative({a + get(condition, i)}, with).v;
      const float other = w * g * gelu_derivative({a + get(null, i)}, without).v;
      put(u, i, (1 + w) * with.v - w * without.v);
      put(of_condition, i, one);
      put(sum, i, one - other);
    }
  }
}

// Parts of the modulation of row r of a branch: sum of two rows, the second of which may be absent.
template <class T>
struct Parts {
  const T *__restrict one, *__restrict time;
  Parts(const Batch& b, const Modulation& m, int branch, Int r)
      : one(branch == 0 ? of<T>(m.users.data, r * m.users.stride) : row_of<T>(b, m.null, r)),
        time(row_of<T>(b, m.time, r)) {}
  // Written to `to` [width].
  __attribute__((always_inline)) void read(Int part, Int width, float plus,
                                           float* __restrict to) const {
    const T* __restrict a = one + part * width;
    if (time == nullptr) {
      for (Int i = 0; i < width; ++i) to[i] = get(a, i) + plus;
      return;
    }
    const T* __restrict t = time + part * width;
    for (Int i = 0; i < width; ++i) to[i] = get(a, i) + get(t, i) + plus;
  }
};

// Rows [first, last) of one branch, or folded of all; `scratch` holds 6 widths of floats.
template <class T>
__attribute__((always_inline)) inline void norm_rows(const Batch& b, const Norm& n, int branch,
                                                     Int first, Int last,
                                                     float* __restrict scratch) {
  const Int width = b.width;
  const float share = 1.0f / float(width);
  float* __restrict x = scratch;  // normalised state
  float* __restrict shift = scratch + width;
  float* __restrict scale = scratch + 2 * width;  // 1 + scale
  float* __restrict total = scratch + 3 * width;  // of inner, over the branches
  float* __restrict slope = scratch + 4 * width;  // gradient of the normalised state
  float* __restrict weight = scratch + 5 * width;
  for (Int i = 0; i < width; ++i) weight[i] = n.weight ? get(of<T>(n.weight, 0), i) : 1.0f;
  const T* __restrict bias = of<T>(n.bias, 0);
  float* __restrict sums = nullptr;
  if (n.grad != nullptr && n.weight != nullptr) {
    sums = n.of_norm + (branch * ((b.rows + kChunk - 1) / kChunk) + first / kChunk) * 2 * width;
    for (Int i = 0; i < 2 * width; ++i) sums[i] = 0;
  }
  for (Int r = first; r < last; ++r) {
    const float w = guidance_of(b, r);
    const int branches = n.folded ? n.branches : branch + 1;
    for (int k = n.folded ? 0 : branch; k < branches; ++k) {
      const Int place = (k * b.rows + r) * width;
      const T* __restrict state = of<T>(n.state, k * n.state_stride + r * width);
      float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (Int i = 0; i < width; ++i) sum += get(state, i);
      const float mean = sum * share;
#pragma omp simd reduction(+ : squares)
      for (Int i = 0; i < width; ++i) {
        x[i] = get(state, i) - mean;
        squares += x[i] * x[i];
      }
      const float scaling = 1.0f / __builtin_sqrtf(squares * share + 1e-6f);
      for (Int i = 0; i < width; ++i) x[i] *= scaling;
      const Parts<T> parts(b, n.modulation, k, r);
      parts.read(0, width, 0.0f, shift);
      parts.read(1, width, 1.0f, scale);
      // What a gradient of inner counts for in this branch.
      const float factor = !n.folded || n.branches == 1 ? 1.0f : k == 0 ? 1 + w : -w;
      if (n.folded) {
        if (k == 0) {
          for (Int i = 0; i < width; ++i) total[i] = 0;
        }
        for (Int i = 0; i < width; ++i) total[i] += factor * (x[i] * scale[i] + shift[i]);
      } else {
        T* __restrict inner = of<T>(n.inner, place);
        if (bias == nullptr) {
          for (Int i = 0; i < width; ++i) put(inner, i, x[i] * scale[i] + shift[i]);
        } else {
          for (Int i = 0; i < width; ++i) {
            put(inner, i, (x[i] * weight[i] + get(bias, i)) * scale[i] + shift[i]);
          }
        }
      }
      if (n.grad == nullptr) continue;
      const T* __restrict grad = of<T>(n.grad, n.folded ? r * width : place);
      T* __restrict of_parts = of<T>(n.of_modulation, (k * b.rows + r) * n.modulation_stride);
      float along = 0, level = 0;
#pragma omp simd reduction(+ : along, level)
      for (Int i = 0; i < width; ++i) {
        const float g = factor * get(grad, i), of_norm = g * scale[i];
        const float value = x[i] * weight[i] + (bias ? get(bias, i) : 0.0f);
        put(of_parts, i, g);
        put(of_parts, width + i, g * value);
        slope[i] = of_norm * weight[i];
        level += slope[i];
        along += slope[i] * x[i];
        if (sums) {
          sums[i] += of_norm * x[i];
          sums[width + i] += of_norm;
        }
      }
      level *= share;
      along *= share;
      T* __restrict of_state = of<T>(n.of_state, place);
      for (Int i = 0; i < width; ++i) {
        float value = scaling * (slope[i] - level - x[i] * along);
        if (n.after) value += get(of<T>(n.after, place), i);
        put(of_state, i, value);
      }
    }
    if (n.folded) {
      T* __restrict inner = of<T>(n.inner, r * width);
      for (Int i = 0; i < width; ++i) put(inner, i, total[i]);
    }
  }
}

template <class T>
__attribute__((always_inline)) inline void residual_rows(const Batch& b, const Residual& n,
                                                         int branch, Int first, Int last,
                                                         float* __restrict gate) {
  for (Int r = first; r < last; ++r) {
    const Int place = (branch * b.rows + r) * b.width;
    Parts<T>(b, n.modulation, branch, r).read(2, b.width, 0.0f, gate);
    const T* __restrict value = of<T>(n.value, place);
    T* __restrict out = of<T>(n.out, place);
    if (n.grad == nullptr) {
      const T* __restrict state = of<T>(n.state, branch * n.state_stride + r * b.width);
      for (Int i = 0; i < b.width; ++i) put(out, i, get(state, i) + gate[i] * get(value, i));
      continue;
    }
    const T* __restrict grad = of<T>(n.grad, place);
    T* __restrict of_gate =
        of<T>(n.of_modulation, (branch * b.rows + r) * n.modulation_stride + 2 * b.width);
    for (Int i = 0; i < b.width; ++i) {
      const float g = get(grad, i);
      put(out, i, gate[i] * g);
      put(of_gate, i, get(value, i) * g);
    }
  }
}

template <class T>
__attribute__((always_inline)) inline void silu_rows(const Batch& b, const SiluGradient& s, Int first,
                                                     Int last) {
  const T* __restrict x = of<T>(s.value, 0);
  T *__restrict g = of<T>(s.grad, 0), *__restrict a = of<T>(s.activated, 0);
  for (Int i = first * b.width; i < last * b.width; ++i) {
    Vec silu;
    const float slope = silu_derivative({get(x, i)}, silu).v;
    put(g, i, get(g, i) * slope);
    put(a, i, silu.v);
  }
}

// The copies for each set of instructions; OpenMP's regions would not be copied, so these are
// called from within them.
CONTREC_CLONES void hidden_part(const Batch& b, const Hidden& h, Int first, Int last) {
  if (b.bfloat16) return hidden_rows<BFloat16>(b, h, first, last);
  hidden_rows<float>(b, h, first, last);
}
CONTREC_CLONES void norm_part(const Batch& b, const Norm& n, int branch, Int first, Int last,
                              float* scratch) {
  if (b.bfloat16) return norm_rows<BFloat16>(b, n, branch, first, last, scratch);
  norm_rows<float>(b, n, branch, first, last, scratch);
}
CONTREC_CLONES void residual_part(const Batch& b, const Residual& n, int branch, Int first,
                                  Int last, float* gate) {
  if (b.bfloat16) return residual_rows<BFloat16>(b, n, branch, first, last, gate);
  residual_rows<float>(b, n, branch, first, last, gate);
}
CONTREC_CLONES void silu_part(const Batch& b, const SiluGradient& s, Int first, Int last) {
  if (b.bfloat16) return silu_rows<BFloat16>(b, s, first, last);
  silu_rows<float>(b, s, first, last);
}
CONTREC_CLONES void sum_part(const Batch& b, const SumByIndex& s, Int first, Int last) {
  for (Int r = 0; r < b.rows; ++r) {
    float* __restrict sum = s.out + b.index[r] * b.width;
    if (b.bfloat16) {
      const BFloat16* __restrict row = of<BFloat16>(s.values, r * b.width);
      for (Int i = first; i < last; ++i) sum[i] += get(row, i);
    } else {
      const float* __restrict row = of<float>(s.values, r * b.width);
      for (Int i = first; i < last; ++i) sum[i] += row[i];
    }
  }
}

// use(task, first row, last row, scratch) for each chunk of rows, `times` over.
template <class Use>
void for_chunks(const Batch& b, int times, Int widths, Use&& use) {
  const Int chunks = (b.rows + kChunk - 1) / kChunk, tasks = times * chunks;
  const int team = int(std::min<Int>(b.threads, tasks * b.width < 512 ? 1 : tasks));
  // Outside of the threads, which nothing may be thrown in; a cache line lies between their parts.
  const Int part = widths * b.width + 16;
  const std::unique_ptr<float[]> scratch(new float[std::size_t(team * part)]);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (Int task = 0; task < tasks; ++task) {
    const Int first = task % chunks * kChunk;
    use(int(task / chunks), first, std::min(first + kChunk, b.rows),
        scratch.get() + thread_number() * part);
  }
}

}  // namespace

void hidden(const Batch& b, const Hidden& h) {
  for_chunks(b, 1, 0, [&](int, Int first, Int last, float*) { hidden_part(b, h, first, last); });
}

void norm(const Batch& b, const Norm& n) {
  for_chunks(b, n.folded ? 1 : n.branches, 6, [&](int branch, Int first, Int last, float* scratch) {
    norm_part(b, n, branch, first, last, scratch);
  });
}

void residual(const Batch& b, const Residual& n) {
  for_chunks(b, n.branches, 1, [&](int branch, Int first, Int last, float* gate) {
    residual_part(b, n, branch, first, last, gate);
  });
}

void silu_gradient(const Batch& b, const SiluGradient& s) {
  for_chunks(b, 1, 0, [&](int, Int first, Int last, float*) { silu_part(b, s, first, last); });
}

void sum_by_index(const Batch& b, const SumByIndex& s) {
  std::fill(s.out, s.out + s.table_rows * b.width, 0.0f);
  // By columns: every sum is one thread's.
  const Int team = std::min<Int>(b.threads, (b.width + 63) / 64);
  const Int part = (b.width + team - 1) / team;
#pragma omp parallel for num_threads(int(team)) if (team > 1)
  for (Int member = 0; member < team; ++member) {
    sum_part(b, s, member * part, std::min(b.width, (member + 1) * part));
  }
}

}  // namespace contrec::cpu
