// The kernels of layers.h for one set of instructions: included by each layers_*.cpp after what
// vec_tile.h needs, in float32, and keep_larger(Vec value, float id, float* best, float* ids),
// which keeps in each column the larger of value and best, and the id that goes with it.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/vec_tile.h"

namespace contrec::cpu {
namespace {

constexpr float kLowest = -__builtin_inff();

inline float inverse_root(const float* x, Int width, double eps) {
  Vec sums = Vec::set(0.0f);
  Int i = 0;
  for (; i + Vec::kWidth <= width; i += Vec::kWidth) {
    const Vec part = Vec::load(x + i);
    sums = fma(part, part, sums);
  }
  float total = sums.sum();
  for (; i < width; ++i) total += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(total / float(width) + float(eps));
}

inline void scaled(const float* x, float factor, const float* weight, float* out, Int width) {
  const Vec factors = Vec::set(factor);
  Int i = 0;
  for (; i + Vec::kWidth <= width; i += Vec::kWidth) {
    (Vec::load(x + i) * factors * Vec::load(weight + i)).store(out + i);
  }
  for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

void norm(const NormJob& job, Int first, Int last) {
  const Int width = job.width;
  for (Int t = first; t < last; ++t) {
    float* const x = job.x + t * width;
    if (job.added != nullptr) {
      const float* const added = job.added + t * width;
      Int i = 0;
      for (; i + Vec::kWidth <= width; i += Vec::kWidth) {
        (Vec::load(x + i) + Vec::load(added + i)).store(x + i);
      }
      for (; i < width; ++i) x[i] += added[i];
    }
    scaled(x, inverse_root(x, width, job.eps), job.weight, job.out + t * width, width);
  }
}

// x may be out.
inline void rotated(const float* x, const float* weight, double eps, const float* cosines,
                    const float* sines, float* out, Int dim) {
  const Int half = dim / 2;
  if (weight != nullptr) {
    scaled(x, inverse_root(x, dim, eps), weight, out, dim);
    x = out;
  }
  Int i = 0;
  for (; i + Vec::kWidth <= half; i += Vec::kWidth) {
    const Vec low = Vec::load(x + i), high = Vec::load(x + half + i);
    const Vec a = low * Vec::load(cosines + i) - high * Vec::load(sines + i);
    const Vec b = high * Vec::load(cosines + half + i) + low * Vec::load(sines + half + i);
    a.store(out + i);
    b.store(out + half + i);
  }
  for (; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    out[i] = low * cosines[i] - high * sines[i];
    out[half + i] = high * cosines[half + i] + low * sines[half + i];
  }
}

void rotary(const RotaryJob& job, Int first, Int last) {
  const Int dim = job.dim;
  for (Int t = first; t < last; ++t) {
    const Int position = job.positions[t];
    const float* const cosines = job.cosines + position * dim;
    const float* const sines = job.sines + position * dim;
    for (Int h = 0; h < job.heads && job.queries != nullptr; ++h) {
      float* const query = job.queries + (t * job.heads + h) * dim;
      rotated(query, job.query_norm, job.eps, cosines, sines, query, dim);
    }
    for (Int h = 0; h < job.key_heads && job.keys != nullptr; ++h) {
      const Int from = (t * job.key_heads + h) * dim;
      const Int to = ((job.rows[t] * job.key_heads + h) * job.places + position) * dim;
      rotated(job.keys + from, job.key_norm, job.eps, cosines, sines, job.stored_keys + to, dim);
      __builtin_memcpy(job.stored_values + to, job.values + from, std::size_t(dim) * sizeof(float));
    }
  }
}

// exp(x), 0 where that is below 2^-125.
inline Vec weight_of(Vec x) {
  const Vec bound = Vec::set(-86.5f);
  return zero_where_less(x, bound, exponential(max(bound, x)));
}

// Queries [R, dim] of rows that see ends[r] places each, over keys [dim, pitch] and values
// [places, width]; dim floats of each row go to outs[r].
template <int R>
__attribute__((noinline)) void attend(const float* queries, const float* keys, Int pitch,
                                      const float* values, Int width, Int dim, const Int* ends,
                                      float* scores, float* const* outs) {
  Int end = 0;
  for (int r = 0; r < R; ++r) end = ends[r] > end ? ends[r] : end;
  const Int padded = round_up(end, kStrip);
  Vec sums[R][2];
  for (Int strip = 0; strip < padded; strip += kStrip) {
    tile_sums<R>(queries, dim, 1, keys + strip, pitch, dim, sums);
    for (int r = 0; r < R; ++r) {
      sums[r][0].store(scores + r * pitch + strip);
      sums[r][1].store(scores + r * pitch + strip + Vec::kWidth);
    }
  }
  float inverses[R];
  for (int r = 0; r < R; ++r) {
    float* const row = scores + r * pitch;
    for (Int i = ends[r]; i < padded; ++i) row[i] = kLowest;
    Vec largest = Vec::load(row);
    for (Int i = Vec::kWidth; i < padded; i += Vec::kWidth) {
      largest = max(largest, Vec::load(row + i));
    }
    float lanes[Vec::kWidth], peak = kLowest;
    largest.store(lanes);
    for (float lane : lanes) peak = lane > peak ? lane : peak;
    Vec total = Vec::set(0.0f);
    for (Int i = 0; i < padded; i += Vec::kWidth) {
      const Vec weight = weight_of(Vec::load(row + i) - Vec::set(peak));
      weight.store(row + i);
      total = total + weight;
    }
    inverses[r] = 1.0f / total.sum();
  }
  for (Int strip = 0; strip < width; strip += kStrip) {
    tile_sums<R>(scores, pitch, 1, values + strip, width, end, sums);
    for (int r = 0; r < R; ++r) {
      const Vec inverse = Vec::set(inverses[r]);
      if (strip + kStrip <= dim) {
        (sums[r][0] * inverse).store(outs[r] + strip);
        (sums[r][1] * inverse).store(outs[r] + strip + Vec::kWidth);
        continue;
      }
      float rest[kStrip];
      (sums[r][0] * inverse).store(rest);
      (sums[r][1] * inverse).store(rest + Vec::kWidth);
      for (Int i = strip; i < dim; ++i) outs[r][i] = rest[i - strip];
    }
  }
}

template <int R = kTile, class... Rest>
void any_attend(Int rows, Rest... rest) {
  if (rows >= R) return attend<R>(rest...);
  if constexpr (R > 1) any_attend<R - 1>(rows, rest...);
}

void attention(const AttentionJob& job, Int sequence, Int key_head, Int reach, float* scratch) {
  const Int dim = job.dim, group = job.heads / job.key_heads;
  const Int pitch = round_up(reach, kStrip) + Vec::kWidth, width = round_up(dim, kStrip);
  const Int first = job.starts[sequence], last = job.starts[sequence + 1];
  float* const keys = scratch;                 // [dim, pitch]
  float* const scores = keys + dim * pitch;    // [kTile, pitch]
  float* const queries = scores + kTile * pitch;  // [kTile, dim]
  float* const padded = queries + kTile * dim;    // [reach, width]
  const Int head = (job.rows[first] * job.key_heads + key_head) * job.places * dim;
  const float* values = job.stored_values + head;
  transpose(job.stored_keys + head, reach, dim, keys, pitch);
  if (width > dim) {
    for (Int i = 0; i < reach; ++i) {
      for (Int d = 0; d < width; ++d) padded[i * width + d] = d < dim ? values[i * dim + d] : 0.0f;
    }
    values = padded;
  }
  const Int count = (last - first) * group;  // the heads of a token beside one another
  const Vec scale = Vec::set(float(job.scale));
  for (Int j = 0; j < count; j += kTile) {
    Int ends[kTile];
    float* outs[kTile];
    const Int rows = smaller(kTile, count - j);
    for (Int r = 0; r < rows; ++r) {
      const Int token = first + (j + r) / group;
      const Int at = (token * job.heads + key_head * group + (j + r) % group) * dim;
      ends[r] = job.positions[token] + 1;
      outs[r] = job.out + at;
      Int d = 0;
      for (; d + Vec::kWidth <= dim; d += Vec::kWidth) {
        (Vec::load(job.queries + at + d) * scale).store(queries + r * dim + d);
      }
      for (; d < dim; ++d) queries[r * dim + d] = job.queries[at + d] * float(job.scale);
    }
    any_attend(rows, queries, keys, pitch, values, width, dim, ends, scores, outs);
  }
}

void gate(const GateJob& job, Int first, Int last) {
  Int i = first * job.width;
  const Int end = last * job.width;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    (silu(Vec::load(job.gate + i)) * Vec::load(job.up + i)).store(job.gate + i);
  }
  for (; i < end; ++i) {
    float lanes[Vec::kWidth] = {job.gate[i]};
    silu(Vec::load(lanes)).store(lanes);
    job.gate[i] = lanes[0] * job.up[i];
  }
}

// Of hidden [R, width] and words `first` on, whose weights lie in [width, kWords].
template <int R>
__attribute__((noinline)) void choose_tile(const float* hidden, Int width, const float* weights,
                                           Int first, float* best, float* ids) {
  for (Int strip = 0; strip < kWords; strip += kStrip) {
    Vec sums[R][2];
    tile_sums<R>(hidden, width, 1, weights + strip, kWords, width, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        const Int word = first + strip + half * Vec::kWidth;
        keep_larger(sums[r][half], float(word / Vec::kWidth), best + r * Vec::kWidth,
                    ids + r * Vec::kWidth);
      }
    }
  }
}

template <int R = kTile, class... Rest>
void any_choose(Int rows, Rest... rest) {
  if (rows >= R) return choose_tile<R>(rest...);
  if constexpr (R > 1) any_choose<R - 1>(rows, rest...);
}

void choose(const ChooseJob& job, Int first, Int last, float* scratch) {
  const Int width = job.width;
  float* const weights = scratch;                       // [width, kWords]
  float* const best = weights + width * kWords;         // [kChosen, Vec::kWidth]
  float* const ids = best + kChosen * Vec::kWidth;      // likewise
  for (Int start = first; start < last; start += kChosen) {
    const Int count = smaller(kChosen, last - start);
    for (Int i = 0; i < count * Vec::kWidth; ++i) best[i] = kLowest, ids[i] = 0.0f;
    for (Int word = 0; word < job.words; word += kWords) {
      const Int words = smaller(kWords, job.words - word);
      // Words that there are not repeat the last one: later, they never replace it.
      transpose(job.weight + word * width, words, width, weights, kWords);
      for (Int w = words; w < kWords; ++w) {
        for (Int i = 0; i < width; ++i) weights[i * kWords + w] = weights[i * kWords + words - 1];
      }
      for (Int t = 0; t < count; t += kTile) {
        any_choose(count - t, job.hidden + (start + t) * width, width, weights, word,
                   best + t * Vec::kWidth, ids + t * Vec::kWidth);
      }
    }
    for (Int t = 0; t < count; ++t) {
      float value = kLowest;
      Int found = 0;
      for (int lane = 0; lane < Vec::kWidth; ++lane) {
        const float candidate = best[t * Vec::kWidth + lane];
        const Int word = smaller(Int(ids[t * Vec::kWidth + lane]) * Vec::kWidth + lane,
                                 job.words - 1);
        if (candidate > value || (candidate == value && word < found)) {
          value = candidate;
          found = word;
        }
      }
      job.out[start + t] = found;
    }
  }
}

}  // namespace
}  // namespace contrec::cpu
