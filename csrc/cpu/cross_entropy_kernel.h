// Chunks of items for one set of instructions: included by each cross_entropy_*.cpp after what
// vec_tile.h needs, in float32.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/vec_tile.h"

namespace contrec::cpu {
namespace {

constexpr Int kDepth = 256;  // inner dimension at a time: what is multiplied stays in the cache
constexpr Int kWeightPitch = kQueries + 16;
static_assert(kItems % kTile == 0 && kLossPanel % kStrip == 0, "whole tiles");

// c[R, kStrip] = or += a[R, depth] b.
template <int R>
__attribute__((noinline)) void tile(const float* a, Int row, Int column, const float* b, Int pitch,
                                    Int depth, float* c, Int c_pitch, bool add) {
  Vec sums[R][2];
  tile_sums<R>(a, row, column, b, pitch, depth, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      float* place = c + r * c_pitch + half * Vec::kWidth;
      (add ? Vec::load(place) + sums[r][half] : sums[r][half]).store(place);
    }
  }
}

template <int R = kTile>
void any_tile(Int rows, const float* a, Int row, Int column, const float* b, Int pitch, Int depth,
              float* c, Int c_pitch, bool add) {
  if (rows >= R) return tile<R>(a, row, column, b, pitch, depth, c, c_pitch, add);
  if constexpr (R > 1) any_tile<R - 1>(rows, a, row, column, b, pitch, depth, c, c_pitch, add);
}

// c[rows, columns] = or += a[rows, depth] b[depth, columns], columns being whole strips.
inline void product(Int rows, Int columns, Int depth, const float* a, Int row, Int column,
                    const float* b, Int pitch, float* c, Int c_pitch, bool add) {
  for (Int k = 0; k < depth; k += kDepth) {
    const Int part = smaller(kDepth, depth - k);
    for (Int strip = 0; strip < columns; strip += kStrip) {
      for (Int r = 0; r < rows; r += kTile) {
        any_tile(rows - r, a + r * row + k * column, row, column, b + k * pitch + strip, pitch,
                 part, c + r * c_pitch + strip, c_pitch, add || k > 0);
      }
    }
  }
}

// exp(x), 0 where that is below 2^-125; NaN stays.
inline Vec weight_of(Vec x) {
  const Vec bound = Vec::set(-86.5f);
  return zero_where_less(x, bound, exponential(max(bound, x)));
}

// Places of the scratch memory.
struct Scratch {
  float* items;       // [kItems, pitch] normalised
  float* gradients;   // [kItems, pitch]
  float* weights;     // [kItems, kWeightPitch] logits, then what they become
  double* inverses;   // [kItems] 1 / norm
  Int* cursors;       // [padded] first place in seen_ids that is not below the tile
  Int* excluded;      // [kItems * kLossPanel] places in a panel's part of `weights`

  Scratch(const LossBlock& block, void* memory) {
    char* place = static_cast<char*>(memory);
    const auto take = [&place](Int bytes) {
      char* const taken = place;
      place += round_up(bytes, 64);
      return taken;
    };
    items = reinterpret_cast<float*>(take(kItems * block.pitch * Int(sizeof(float))));
    gradients = reinterpret_cast<float*>(take(kItems * block.pitch * Int(sizeof(float))));
    weights = reinterpret_cast<float*>(take(kItems * kWeightPitch * Int(sizeof(float))));
    inverses = reinterpret_cast<double*>(take(kItems * Int(sizeof(double))));
    cursors = reinterpret_cast<Int*>(take(block.padded * Int(sizeof(Int))));
    excluded = reinterpret_cast<Int*>(take(kItems * kLossPanel * Int(sizeof(Int))));
  }
};

// Rows of the catalog from item `start` on, as float32 and normalised where wanted.
void load_items(const LossBlock& block, Int start, Int count, const Scratch& scratch) {
  const CrossEntropyJob& job = *block.job;
  for (Int i = 0; i < count; ++i) {
    float* to = scratch.items + i * block.pitch;
    if (job.low) {
      const auto* from = static_cast<const std::uint16_t*>(job.vectors) + (start + i) * job.dim;
      for (Int d = 0; d < job.dim; ++d) {
        const std::uint32_t bits = std::uint32_t(from[d]) << 16;
        __builtin_memcpy(to + d, &bits, sizeof bits);
      }
    } else {
      const auto* from = static_cast<const float*>(job.vectors) + (start + i) * job.dim;
      __builtin_memcpy(to, from, std::size_t(job.dim) * sizeof(float));
    }
    for (Int d = job.dim; d < block.pitch; ++d) to[d] = 0.0f;
    if (!job.cosine) continue;
    double sums[8] = {};
    for (Int d = 0; d < block.pitch; d += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += double(to[d + j]) * double(to[d + j]);
    }
    for (int half = 4; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    const double norm = __builtin_sqrt(sums[0]);
    const double inverse = 1.0 / (norm < kShortest ? kShortest : norm);
    for (Int d = 0; d < job.dim; ++d) to[d] = float(double(to[d]) * inverse);
    // What is shorter is divided by a constant, which the sign tells.
    scratch.inverses[i] = norm < kShortest ? -inverse : inverse;
  }
}

void begin_chunk(const LossBlock& block, Int start, const Scratch& scratch) {
  for (Int query = 0; query < block.padded; ++query) {
    Int low = block.seen_begin[query], high = block.seen_end[query];
    while (low < high) {
      const Int middle = low + (high - low) / 2;
      if (block.job->seen_ids[middle] < start) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    scratch.cursors[query] = low;
  }
}

// Finds the items of a tile that queries [panel, panel + kLossPanel) leave out; their number.
Int find_excluded(const LossBlock& block, Int panel, Int start, Int count, Int pitch,
                  const Scratch& scratch) {
  if (block.job->seen_offsets == nullptr) return 0;
  Int found = 0;
  for (Int lane = 0; lane < kLossPanel; ++lane) {
    Int place = scratch.cursors[panel + lane], last = -1;
    for (; place < block.seen_end[panel + lane]; ++place) {
      const Int item = block.job->seen_ids[place];
      if (item >= start + count) break;
      if (item == last || item == block.targets[panel + lane]) continue;
      last = item;
      scratch.excluded[found++] = (item - start) * pitch + lane;
    }
    scratch.cursors[panel + lane] = place;
  }
  return found;
}

// logits[count, kLossPanel] of a panel's queries.
inline void logits_of(const LossBlock& block, Int panel, Int count, const Scratch& scratch,
                      float* logits, Int pitch) {
  const Int dim = block.job->dim;
  product(count, kLossPanel, dim, scratch.items, block.pitch, 1, block.columns + panel * dim,
          kLossPanel, logits, pitch, false);
}

void forward(const LossBlock& block, Int chunk, Int chunk_start, Int chunk_stop, void* memory) {
  const Scratch scratch(block, memory);
  float* const logits = scratch.weights;
  const Int from = chunk * block.padded;
  const bool smoothing = block.job->smoothing > 0;
  for (Int query = 0; query < block.padded; ++query) {
    block.chunk_peaks[from + query] = -3.4028235e38f;
    block.chunk_totals[from + query] = block.chunk_sums[from + query] = 0.0f;
  }
  begin_chunk(block, chunk_start, scratch);
  for (Int start = chunk_start; start < chunk_stop; start += kItems) {
    const Int count = smaller(kItems, chunk_stop - start);
    load_items(block, start, count, scratch);
    for (Int panel = 0; panel < block.padded; panel += kLossPanel) {
      logits_of(block, panel, count, scratch, logits, kLossPanel);
      for (Int lane = 0; lane < kLossPanel; ++lane) {
        const Int at = block.targets[panel + lane] - start;
        if (0 <= at && at < count) {
          block.target_logits[panel + lane] = logits[at * kLossPanel + lane];
        }
      }
      const Int excluded = find_excluded(block, panel, start, count, kLossPanel, scratch);
      if (smoothing) {
        for (Int i = 0; i < excluded; ++i) logits[scratch.excluded[i]] = 0.0f;
        for (Int lane = 0; lane < kLossPanel; lane += Vec::kWidth) {
          float* place = block.chunk_sums + from + panel + lane;
          Vec sum = Vec::set(0.0f);
          for (Int i = 0; i < count; ++i) sum = sum + Vec::load(logits + i * kLossPanel + lane);
          (Vec::load(place) + sum).store(place);
        }
      }
      for (Int i = 0; i < excluded; ++i) logits[scratch.excluded[i]] = -__builtin_inff();
      for (Int lane = 0; lane < kLossPanel; lane += Vec::kWidth) {
        float* peak = block.chunk_peaks + from + panel + lane;
        float* total = block.chunk_totals + from + panel + lane;
        const Vec before = Vec::load(peak);
        Vec top = before, sum = Vec::set(0.0f);
        for (Int i = 0; i < count; ++i) {
          top = max(Vec::load(logits + i * kLossPanel + lane), top);
        }
        for (Int i = 0; i < count; ++i) {
          sum = sum + weight_of(Vec::load(logits + i * kLossPanel + lane) - top);
        }
        fma(Vec::load(total), weight_of(before - top), sum).store(total);
        top.store(peak);
      }
    }
  }
}

// Logits of some queries to the gradients of the logits.
void weigh(const LossBlock& block, Int first, Int queries, Int start, Int count,
           const Scratch& scratch) {
  for (Int panel = first; panel < first + queries; panel += kLossPanel) {
    float* const weights = scratch.weights + (panel - first);
    logits_of(block, panel, count, scratch, weights, kWeightPitch);
    for (Int lane = 0; lane < kLossPanel; lane += Vec::kWidth) {
      const Vec peak = Vec::load(block.peaks + panel + lane);
      const Vec weight = Vec::load(block.weight + panel + lane);
      const Vec smooth = Vec::load(block.smooth + panel + lane);
      for (Int i = 0; i < count; ++i) {
        float* place = weights + i * kWeightPitch + lane;
        (weight_of(Vec::load(place) - peak) * weight - smooth).store(place);
      }
    }
    const Int excluded = find_excluded(block, panel, start, count, kWeightPitch, scratch);
    for (Int i = 0; i < excluded; ++i) weights[scratch.excluded[i]] = 0.0f;
    for (Int lane = 0; lane < kLossPanel; ++lane) {
      const Int at = block.targets[panel + lane] - start;
      if (0 <= at && at < count) weights[at * kWeightPitch + lane] -= block.hit[panel + lane];
    }
  }
}

// The gradients of a tile of normalised items to those of the items.
void store_gradients(const LossBlock& block, Int start, Int count, const Scratch& scratch) {
  const CrossEntropyJob& job = *block.job;
  for (Int i = 0; i < count; ++i) {
    const float* unit = scratch.items + i * block.pitch;
    const float* from = scratch.gradients + i * block.pitch;
    float* to = job.vector_gradient + (start + i) * job.dim;
    double inverse = job.cosine ? scratch.inverses[i] : 1.0, along = 0.0;
    if (job.cosine && !(inverse < 0)) {
      double sums[8] = {};
      for (Int d = 0; d < block.pitch - 16; d += 8) {
        for (int j = 0; j < 8; ++j) sums[j] += double(unit[d + j]) * double(from[d + j]);
      }
      for (double sum : sums) along += sum;
    }
    if (inverse < 0) inverse = -inverse;
    for (Int d = 0; d < job.dim; ++d) {
      const float value = float((double(from[d]) - along * double(unit[d])) * inverse);
      to[d] = block.add ? to[d] + value : value;
    }
  }
}

void backward(const LossBlock& block, Int chunk, Int chunk_start, Int chunk_stop, void* memory) {
  const Scratch scratch(block, memory);
  const Int width = block.pitch - 16;
  float* const query_gradients =
      block.query_gradients == nullptr ? nullptr
                                       : block.query_gradients + chunk * block.padded * block.pitch;
  begin_chunk(block, chunk_start, scratch);
  for (Int start = chunk_start; start < chunk_stop; start += kItems) {
    const Int count = smaller(kItems, chunk_stop - start);
    load_items(block, start, count, scratch);
    for (Int first = 0; first < block.padded; first += kQueries) {
      const Int queries = smaller(kQueries, block.padded - first);
      weigh(block, first, queries, start, count, scratch);
      if (query_gradients != nullptr) {
        product(queries, width, count, scratch.weights, 1, kWeightPitch, scratch.items,
                block.pitch, query_gradients + first * block.pitch, block.pitch,
                start > chunk_start);
      }
      if (block.job->vector_gradient != nullptr) {
        product(count, width, queries, scratch.weights, kWeightPitch, 1,
                block.rows + first * block.pitch, block.pitch, scratch.gradients, block.pitch,
                first > 0);
      }
    }
    if (block.job->vector_gradient != nullptr) store_gradients(block, start, count, scratch);
  }
}

}  // namespace
}  // namespace contrec::cpu
