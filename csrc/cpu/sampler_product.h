// Products of the sampler for one set of instructions: included by each
// sampler_*.cpp through sampler_chain.h, after it has defined what vec_tile.h needs.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/vec_tile.h"

namespace contrec::cpu {
namespace {

constexpr Int kDepth = 256 * kPair;      // inner dimension at a time: its weights stay in L1
static_assert(kPanel % kStrip == 0, "a panel is a whole number of strips");

inline float rounded_to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

// c[R, kStrip] += a[R, depth] b, b a strip of a panel.
template <int R>
__attribute__((noinline)) void tile(const Element* a, Int stride, const Element* b, Int depth,
                                    float* c) {
  Vec sums[R][2];
  tile_sums<R>(a, stride, 1, b, kPanel, depth, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      float* place = c + r * kPanel + half * Vec::kWidth;
      (Vec::load(place) + sums[r][half]).store(place);
    }
  }
}

template <int R = kTile>
void any_tile(Int rows, const Element* a, Int stride, const Element* b, Int depth, float* c) {
  if (rows == R) return tile<R>(a, stride, b, depth, c);
  if constexpr (R > 1) any_tile<R - 1>(rows, a, stride, b, depth, c);
}

// epilogue(row, column, Vec) for each vector of a[rows, depth] times a matrix [columns, depth].
template <class Epilogue>
inline void product(const Element* a, Int stride, Int rows, const void* matrix, Int depth,
                    Int columns, Epilogue&& epilogue) {
  alignas(64) float c[2 * kMaxRows * kPanel];
  const Int padded = round_up(depth, 2), tiles = (rows + kTile - 1) / kTile;
  const Element* panel = static_cast<const Element*>(matrix);
  for (Int column = 0; column < columns; column += kPanel, panel += padded * kPanel) {
    for (Int i = 0; i < rows * kPanel; ++i) c[i] = 0.0f;
    for (Int k = 0; k < padded; k += kDepth) {
      const Int part = smaller(kDepth, padded - k);
      Int row = 0;
      for (Int t = 0; t < tiles; ++t) {
        const Int count = (rows - row + tiles - t - 1) / (tiles - t);  // tiles of nearly one size
        for (int strip = 0; strip < kPanel; strip += kStrip) {
          any_tile(count, a + row * stride + k, stride, panel + k * kPanel + kPair * strip, part,
                   c + row * kPanel + strip);
        }
        row += count;
      }
    }
    for (Int row = 0; row < rows; ++row) {
      for (int i = 0; i < kPanel; i += Vec::kWidth) {
        epilogue(row, column + i, Vec::load(c + row * kPanel + i));
      }
    }
  }
}

}  // namespace
}  // namespace contrec::cpu
