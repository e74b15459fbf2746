// Four floats for vec_tile.h, with plain C++.
#pragma once

namespace contrec::cpu {
namespace {

struct Vec {
  static constexpr int kWidth = 4;
  float v[kWidth];
  static Vec load(const float* p) {
    Vec a;
    for (int i = 0; i < kWidth; ++i) a.v[i] = p[i];
    return a;
  }
  static Vec set(float x) {
    Vec a;
    for (float& lane : a.v) lane = x;
    return a;
  }
  void store(float* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = v[i];
  }
  float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
};

template <class Use>
inline Vec each(Use&& use) {
  Vec result;
  for (int i = 0; i < Vec::kWidth; ++i) result.v[i] = use(i);
  return result;
}

inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec zero_where_less(Vec x, Vec bound, Vec a) {
  return each([&](int i) { return x.v[i] < bound.v[i] ? 0.0f : a.v[i]; });
}
// Adding 1.5 * 2^23 leaves no bits for a fraction.
inline Vec nearest(Vec a) {
  return each([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
inline Vec times_power_of_two(Vec a, Vec n) {
  return each([&](int i) {
    const std::uint32_t bits = std::uint32_t(std::int32_t(n.v[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return a.v[i] * power;
  });
}

constexpr int kTile = 4;

}  // namespace
}  // namespace contrec::cpu
