// Products in bfloat16 with float32 sums for sampler_chain.h, with AVX512_BF16.
#pragma once

namespace contrec::cpu {
namespace {

using Element = std::uint16_t;
using Operand = __m512bh;
constexpr int kPair = 2;
inline void store_elements(Element* p, Vec a) {
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
inline Operand load_operand(const Element* p) {
  Operand value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
inline Operand broadcast(const Element* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<Operand>(_mm512_set1_epi32(pair));
}
inline Vec multiply(Operand a, Operand b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }

}  // namespace
}  // namespace contrec::cpu
