// Eight floats for vec_tile.h, with AVX2 and FMA.
#pragma once

namespace contrec::cpu {
namespace {

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  float sum() const {
    float lanes[kWidth], total = 0.0f;
    store(lanes);
    for (float lane : lanes) total += lane;
    return total;
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec nearest(Vec a) { return {_mm256_round_ps(a.v, 0x08)}; }
inline Vec zero_where_less(Vec x, Vec bound, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_NLT_UQ), a.v)};
}
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

constexpr int kTile = 6;  // 12 sums, two operands, one broadcast

}  // namespace
}  // namespace contrec::cpu
