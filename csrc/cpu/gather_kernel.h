// The products of one instruction set; included once for each, after
//   Vec                       sums of several products
//   kRows                     rows of a tile, whose 4 kRows sums fit the registers
//   four_sums                 the totals of four Vec
//   Float, BFloat16           Element; Operand, kLanes of them; load(Element*);
//                             add(Vec, Operand, Operand); widen and narrow, from and to float

template <class Type, int kCount>
inline __attribute__((always_inline)) void product_tile(const typename Type::Element* const* hidden,
                                                        const typename Type::Element* const* weight,
                                                        std::int64_t steps,
                                                        Vec (*__restrict__ sums)[4]) {
  for (std::int64_t at = 0; at < steps * Type::kLanes; at += Type::kLanes) {
    typename Type::Operand right[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) right[c] = Type::load(weight[c] + at);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const typename Type::Operand left = Type::load(hidden[r] + at);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = Type::add(sums[r][c], left, right[c]);
    }
  }
}

template <class Type>
void product(const ProductBlock& block) {
  using Element = typename Type::Element;
  const std::int64_t steps = block.inner / Type::kLanes, done = steps * Type::kLanes;
  const std::size_t rest = std::size_t(block.inner - done) * sizeof(Element);
  // What is left of a row after whole steps, then zeros.
  Element hidden_rest[kProductRows][Type::kLanes] = {};
  for (int r = 0; r < block.rows && rest != 0; ++r) {
    __builtin_memcpy(hidden_rest[r], static_cast<const Element*>(block.hidden[r]) + done, rest);
  }
  const Element* const weights = static_cast<const Element*>(block.weight);
  float totals[kProductRows][kProductColumns];
  for (int column = 0; column < block.columns; column += 4) {
    const Element *weight[4], *weight_rest[4];
    Element rest_of_weight[4][Type::kLanes];
    for (int c = 0; c < 4; ++c) {  // beyond the last column: that one again
      const int real = column + c < block.columns ? column + c : block.columns - 1;
      weight[c] = weights + real * block.inner;
      if (rest == 0) continue;
      __builtin_memset(rest_of_weight[c], 0, sizeof rest_of_weight[c]);
      __builtin_memcpy(rest_of_weight[c], weight[c] + done, rest);
      weight_rest[c] = rest_of_weight[c];
    }
    for (int row = 0; row < block.rows; row += kRows) {
      const Element *hidden[kRows], *rest_of_hidden[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int real = row + r < block.rows ? row + r : block.rows - 1;
        hidden[r] = static_cast<const Element*>(block.hidden[real]);
        rest_of_hidden[r] = hidden_rest[real];
      }
      Vec sums[kRows][4] = {};
      product_tile<Type, kRows>(hidden, weight, steps, sums);
      if (rest != 0) product_tile<Type, kRows>(rest_of_hidden, weight_rest, 1, sums);
      for (int r = 0; r < kRows; ++r) four_sums(sums[r], totals[row + r] + column);
    }
  }
  const Element* const bias = static_cast<const Element*>(block.bias);
  for (int row = 0; row < block.rows; ++row) {
    Element* const out = static_cast<Element*>(block.out[row]);
    for (int c = 0; c < block.columns; ++c) {
      out[c] = Type::narrow(totals[row][c] + Type::widen(bias[c]));
    }
  }
}
