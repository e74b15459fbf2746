#include "cpu/philox.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/clones.h"

namespace contrec::cpu {
namespace {

constexpr int kBlocks = 64;  // counters worked on at once; each gives four normals
constexpr std::int64_t kParallelFrom = 1 << 18;  // elements; fewer do not repay waking threads

inline double from_bits(std::uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint64_t to_bits(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Natural logarithm of whole / 2^24, whole in 1 .. 2^24; relative error below 4e-16.
inline double log_of(std::int32_t whole) {
  // whole = 2^exponent * f with f in [sqrt(1/2), sqrt(2)); log f = 2 atanh((f - 1) / (f + 1)).
  const std::uint64_t bits = to_bits(double(whole));
  const std::uint64_t exponent = (bits - 0x3fe6a09e667f3bcdULL) >> 52;
  const double f = from_bits(bits - (exponent << 52));
  const double power = from_bits(exponent | 0x4330000000000000ULL) - (4503599627370496.0 + 24.0);
  const double s = (f - 1.0) / (f + 1.0);
  const double z = s * s;
  double series = 1.0 / 23.0;
  series = series * z + 1.0 / 21.0;
  series = series * z + 1.0 / 19.0;
  series = series * z + 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  series = series * z + 1.0;
  return power * 0.69314718055994530942 + 2.0 * s * series;
}

// Taylor series on [0, pi / 2]; absolute error below 4e-16.
inline double sine_of(double x) {
  const double z = x * x;
  double series = 1.0 / 51090942171709440000.0;
  series = series * z - 1.0 / 121645100408832000.0;
  series = series * z + 1.0 / 355687428096000.0;
  series = series * z - 1.0 / 1307674368000.0;
  series = series * z + 1.0 / 6227020800.0;
  series = series * z - 1.0 / 39916800.0;
  series = series * z + 1.0 / 362880.0;
  series = series * z - 1.0 / 5040.0;
  series = series * z + 1.0 / 120.0;
  series = series * z - 1.0 / 6.0;
  return x + x * (series * z);
}

inline double cosine_of(double x) {
  const double z = x * x;
  double series = -1.0 / 1124000727777607680000.0;
  series = series * z + 1.0 / 2432902008176640000.0;
  series = series * z - 1.0 / 6402373705728000.0;
  series = series * z + 1.0 / 20922789888000.0;
  series = series * z - 1.0 / 87178291200.0;
  series = series * z + 1.0 / 479001600.0;
  series = series * z - 1.0 / 3628800.0;
  series = series * z + 1.0 / 40320.0;
  series = series * z - 1.0 / 720.0;
  series = series * z + 1.0 / 24.0;
  series = series * z - 1.0 / 2.0;
  return 1.0 + series * z;
}

// Four normals for each of `count` counters, from block number `first` on.
CONTREC_CLONES void normals(std::uint64_t seed, std::uint64_t user, std::uint32_t column,
                            std::uint32_t first, int count, float* out) {
  alignas(64) std::uint32_t words[4][kBlocks];
  for (int lane = 0; lane < count; ++lane) {
    std::uint32_t c0 = first + std::uint32_t(lane), c1 = column;
    std::uint32_t c2 = std::uint32_t(user), c3 = std::uint32_t(user >> 32);
    std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t(c0) * 0xD2511F53u;
      const std::uint64_t p1 = std::uint64_t(c2) * 0xCD9E8D57u;
      c0 = std::uint32_t(p1 >> 32) ^ c1 ^ k0;
      c2 = std::uint32_t(p0 >> 32) ^ c3 ^ k1;
      c1 = std::uint32_t(p1);
      c3 = std::uint32_t(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][lane] = c0;
    words[1][lane] = c1;
    words[2][lane] = c2;
    words[3][lane] = c3;
  }
  // Box-Muller: u = (first + 1) / 2^24 of the upper 24 bits, the angle 2 pi second / 2^24 as a
  // number of quarter turns and a rest.
  alignas(64) float pair[2][kBlocks];
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t* uniforms = words[2 * half];
    const std::uint32_t* angles = words[2 * half + 1];
    for (int lane = 0; lane < count; ++lane) {
      const double minus_two_log = -2.0 * log_of(std::int32_t(uniforms[lane] >> 8) + 1);
      const double radius = std::sqrt(minus_two_log);
      const std::uint32_t angle = angles[lane];
      const double rest = double(std::int32_t(angle >> 8 & 0x3FFFFF)) * 3.7450702829239286e-07;
      const double cosine = cosine_of(rest), sine = sine_of(rest);
      const bool odd = (angle >> 30 & 1) != 0;
      const double x = odd ? -sine : cosine, y = odd ? cosine : sine;
      const double signed_radius = (angle >> 31) != 0 ? -radius : radius;
      pair[0][lane] = float(signed_radius * x);
      pair[1][lane] = float(signed_radius * y);
    }
    for (int lane = 0; lane < count; ++lane) {
      out[4 * lane + 2 * half] = pair[0][lane];
      out[4 * lane + 2 * half + 1] = pair[1][lane];
    }
  }
}

}  // namespace

void philox_row(std::uint64_t seed, std::int64_t user_id, std::uint32_t column, std::int64_t dim,
                float* out) {
  const std::int64_t width = 4 * kBlocks;
  alignas(64) float buffer[4 * kBlocks];
  for (std::int64_t start = 0; start < dim; start += width) {
    const std::int64_t wanted = std::min(width, dim - start);
    const int count = int((wanted + 3) / 4);
    normals(seed, std::uint64_t(user_id), column, std::uint32_t(start / 4), count, buffer);
    std::memcpy(out + start, buffer, std::size_t(wanted) * sizeof(float));
  }
}

void philox_normal(std::uint64_t seed, const std::int64_t* user_ids, std::int64_t batch,
                   std::int64_t dim, std::uint32_t column, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * dim >= kParallelFrom)
  for (std::int64_t row = 0; row < batch; ++row) {
    philox_row(seed, user_ids[row], column, dim, out + row * dim);
  }
}

}  // namespace contrec::cpu
