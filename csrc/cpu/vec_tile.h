// Tiles of products for one set of instructions: included once for each, after what they need was
// defined, in the unnamed namespace:
//
// - Vec: kWidth floats with load, store, set, + - * /, fma, min, max, nearest, times_power_of_two,
//   zero_where_less and sum;
// - Element, the type of what is multiplied, with store_elements(Element*, Vec);
// - kPair, how many of them a column of an Operand has; load_operand(const Element*) for
//   Vec::kWidth columns, broadcast(const Element*) of one such column to all, and
//   multiply(Operand, Operand, Vec sum), which adds the kPair products of each column;
// - kTile, rows of a tile of sums that fit the registers.
//
// No functions of the standard library here: compiled for these instructions, they could be taken
// by the linker for the rest of the program.
#pragma once

namespace contrec::cpu {
namespace {

using Int = std::int64_t;

constexpr int kStrip = 2 * Vec::kWidth;  // columns of a tile

inline Int smaller(Int a, Int b) { return a < b ? a : b; }
inline Int round_up(Int value, Int unit) { return (value + unit - 1) / unit * unit; }

// sums[R, kStrip] = a[R, depth] b: a's elements lie `row` and `column` apart, rows of b `pitch`.
template <int R>
inline __attribute__((always_inline)) void tile_sums(const Element* a, Int row, Int column,
                                                     const Element* b, Int pitch, Int depth,
                                                     Vec (&sums)[R][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Vec::set(0.0f);
  for (Int k = 0; k < depth; k += kPair) {
    const Operand left = load_operand(b), right = load_operand(b + kPair * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Operand x = broadcast(a + r * row + k * column);
      sums[r][0] = multiply(x, left, sums[r][0]);
      sums[r][1] = multiply(x, right, sums[r][1]);
    }
    b += kPair * pitch;
  }
}

}  // namespace
}  // namespace contrec::cpu
