// Sums of products with AVX-512F; included by gather_product.cpp, once for each set with it.

using Vec = __m512;
constexpr int kRows = 4;

inline void four_sums(const Vec* sums, float* totals) {
  // Within each fourth of the register, the four totals over that fourth; then the fourths.
  const Vec low = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]),
                                _mm512_unpackhi_ps(sums[0], sums[1]));
  const Vec high = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]),
                                 _mm512_unpackhi_ps(sums[2], sums[3]));
  const Vec each = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44),
                                 _mm512_shuffle_ps(low, high, 0xee));
  const __m128 first = _mm_add_ps(_mm512_extractf32x4_ps(each, 0), _mm512_extractf32x4_ps(each, 1));
  const __m128 last = _mm_add_ps(_mm512_extractf32x4_ps(each, 2), _mm512_extractf32x4_ps(each, 3));
  _mm_storeu_ps(totals, _mm_add_ps(first, last));
}

struct Float : FloatElement {
  static constexpr int kLanes = 16;
  using Operand = Vec;
  static Operand load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec add(Vec sum, Operand a, Operand b) { return _mm512_fmadd_ps(a, b, sum); }
};
