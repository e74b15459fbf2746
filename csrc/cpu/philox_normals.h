// Normals of a few counters, for the philox*.cpp: one copy for each instruction set, all the same
// bits. Before this come Lanes (a vector of 64-bit integers, or one) and product (of the lower
// halves).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/philox.h"

namespace contrec::cpu {
namespace {

// Philox4x32-10: words[i][counter] is integer i of a counter, in the lower half.
inline void philox(std::uint64_t seed, std::uint64_t user, std::uint32_t column,
                   std::uint32_t first, int count,
                   std::uint64_t (&words)[4][kPhiloxCounters]) {
  constexpr int kLanes = sizeof(Lanes) / sizeof(std::uint64_t);
  const Lanes multiplier0 = Lanes{} + 0xD2511F53u, multiplier1 = Lanes{} + 0xCD9E8D57u;
  for (int i = 0; i < count; ++i) words[0][i] = first + std::uint32_t(i);
  for (int i = 0; i < count; i += kLanes) {
    // What the upper halves hold is never used.
    Lanes c0, c1 = Lanes{} + column, c2 = Lanes{} + user, c3 = Lanes{} + (user >> 32);
    std::memcpy(&c0, words[0] + i, sizeof c0);
    std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Lanes p0 = product(c0, multiplier0), p1 = product(c2, multiplier1);
      c0 = (p1 >> 32) ^ c1 ^ (Lanes{} + k0);
      c2 = (p0 >> 32) ^ c3 ^ (Lanes{} + k1);
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    std::memcpy(words[0] + i, &c0, sizeof c0);
    std::memcpy(words[1] + i, &c1, sizeof c1);
    std::memcpy(words[2] + i, &c2, sizeof c2);
    std::memcpy(words[3] + i, &c3, sizeof c3);
  }
}

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// sqrt(-2 log(whole / 2^24)), whole in 1 .. 2^24; -0 for the last. Relative error below
// 1.6 * 2^-24 (checked for each).
inline float radius_of(std::int32_t whole) {
  // whole = 2^exponent * (1 + t), t in [sqrt(1/2) - 1, sqrt(2) - 1] and exact; 2 log(1 + t) =
  // 2 t - t^2 + t^3 series(t), with the least relative error of a series this long.
  const std::uint32_t bits = to_bits(float(whole));
  const std::int32_t exponent = std::int32_t(bits - 0x3f3504f3u) >> 23;
  const float t = from_bits(bits - (std::uint32_t(exponent) << 23)) - 1.0f;
  const float power = float(exponent - 24);
  float series = -0x1.385014p-3f;
  series = series * t + 0x1.0541dep-2f;
  series = series * t - 0x1.0d802ep-2f;
  series = series * t + 0x1.22d78ap-2f;
  series = series * t - 0x1.547206p-2f;
  series = series * t + 0x1.99a02ep-2f;
  series = series * t - 0x1.000228p-1f;
  series = series * t + 0x1.555554p-1f;
  // 2 log 2 is in two parts, the upper one so short that its product is exact.
  const float square = t * t;
  const float small = (square * (t * series) + power * 0x1.7f7d1cp-19f) - square;
  return std::sqrt((power * -0x1.62e4p+0f - 2.0f * t) - small);
}

// Box-Muller: u = (first + 1) / 2^24 of the upper 24 bits, the angle 2 pi second / 2^24. The
// relative errors are below 1.6 * 2^-24 in the radius, 1.2 in the sine and 1.6 in the cosine
// (checked for each of the 2^22 rests), which with two roundings bounds the distance from the
// rounded exact normal to 4 ulp; of 300 million compared, 16 were 3 apart and none more.
inline void box_muller(std::uint32_t first, std::uint32_t second, float& x, float& y) {
  const float radius = radius_of(std::int32_t(first >> 8) + 1);
  // The nearest quarter turn and the signed rest, at most half of one, in quarters: both exact, so
  // that sines near zero are accurate too. Series with the least relative error; the sine's first
  // coefficient, pi / 2, is split so that one part's product is exact.
  const std::uint32_t quarter = second + (1u << 29);
  const float turn = float(std::int32_t(second << 2) >> 10) * 0x1p-22f;
  const float square = turn * turn;
  float sine = -0x1.2d1970p-8f;
  sine = sine * square + 0x1.465b8ep-4f;
  sine = sine * square - 0x1.4abbb0p-1f;
  sine = sine * square + 0x1.21fb52p-4f;
  sine = 1.5f * turn + turn * sine;
  float cosine = 0x1.d4f7eep-11f;
  cosine = cosine * square - 0x1.55b2b6p-6f;
  cosine = cosine * square + 0x1.03c1b0p-2f;
  cosine = cosine * square - 0x1.3bd3ccp+0f;
  cosine = 1.0f + square * cosine;
  const bool odd = (quarter >> 30 & 1) != 0;
  x = radius * (odd ? sine : cosine);
  y = radius * (odd ? cosine : sine);
  x = from_bits(to_bits(x) ^ ((quarter + (1u << 30)) & 0x80000000u));
  y = from_bits(to_bits(y) ^ (quarter & 0x80000000u));
}

void normals(std::uint64_t seed, std::uint64_t user, std::uint32_t column, std::uint32_t first,
             int count, float* out) {
  alignas(64) std::uint64_t words[4][kPhiloxCounters];
  philox(seed, user, column, first, count, words);
  for (int start = 0; start < count; start += kPhiloxGroup) {
    alignas(64) float values[4][kPhiloxGroup];
    for (int half = 0; half < 4; half += 2) {
      const std::uint64_t *uniform = words[half] + start, *angle = words[half + 1] + start;
      for (int i = 0; i < kPhiloxGroup; ++i) {
        box_muller(std::uint32_t(uniform[i]), std::uint32_t(angle[i]), values[half][i],
                   values[half + 1][i]);
      }
    }
    float* place = out + 4 * start;
    for (int i = 0; i < kPhiloxGroup; ++i) {
      for (int word = 0; word < 4; ++word) place[4 * i + word] = values[word][i];
    }
  }
}

}  // namespace
}  // namespace contrec::cpu
