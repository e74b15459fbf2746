#include "cpu/gather_product.h"

#include <cstddef>

#include "cpu/clones.h"
#include "cpu/features.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#endif

namespace contrec::cpu {
namespace {

inline float widen_bfloat16(std::uint16_t element) {
  const std::uint32_t bits = std::uint32_t(element) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint16_t narrow_bfloat16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return std::uint16_t(value != value ? 0x7fc0 : rounded);
}

struct FloatElement {
  using Element = float;
  static float widen(float element) { return element; }
  static float narrow(float value) { return value; }
};

struct BFloat16Element {
  using Element = std::uint16_t;
  static float widen(std::uint16_t element) { return widen_bfloat16(element); }
  static std::uint16_t narrow(float value) { return narrow_bfloat16(value); }
};

#ifdef CONTREC_TARGETS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16")
namespace avx512_bf16 {
#include "cpu/gather_avx512.h"
struct BFloat16 : BFloat16Element {
  static constexpr int kLanes = 32;
  using Operand = __m512i;
  static Operand load(const std::uint16_t* p) { return _mm512_loadu_si512(p); }
  static Vec add(Vec sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#include "cpu/gather_kernel.h"
}  // namespace avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f")
namespace avx512f {
#include "cpu/gather_avx512.h"
struct BFloat16 : BFloat16Element {
  static constexpr int kLanes = 16;
  using Operand = Vec;
  static Operand load(const std::uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static Vec add(Vec sum, Operand a, Operand b) { return _mm512_fmadd_ps(a, b, sum); }
};
#include "cpu/gather_kernel.h"
}  // namespace avx512f
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
using Vec = __m256;
constexpr int kRows = 2;
inline void four_sums(const Vec* sums, float* totals) {
  const Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]),
                                   _mm256_hadd_ps(sums[2], sums[3]));
  const __m128 high = _mm256_extractf128_ps(pairs, 1);
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(pairs), high));
}
struct Float : FloatElement {
  static constexpr int kLanes = 8;
  using Operand = Vec;
  static Operand load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec add(Vec sum, Operand a, Operand b) { return _mm256_fmadd_ps(a, b, sum); }
};
struct BFloat16 : BFloat16Element {
  static constexpr int kLanes = 8;
  using Operand = Vec;
  static Operand load(const std::uint16_t* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static Vec add(Vec sum, Operand a, Operand b) { return _mm256_fmadd_ps(a, b, sum); }
};
#include "cpu/gather_kernel.h"
}  // namespace avx2
#pragma GCC pop_options

#endif

namespace portable {
struct Vec {
  float lanes[4];
};
constexpr int kRows = 2;
inline void four_sums(const Vec* sums, float* totals) {
  for (int c = 0; c < 4; ++c) {
    const float* lanes = sums[c].lanes;
    totals[c] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}
template <class Base>
struct Lanes : Base {
  static constexpr int kLanes = 4;
  using Operand = Vec;
  static Operand load(const typename Base::Element* p) {
    return {{Base::widen(p[0]), Base::widen(p[1]), Base::widen(p[2]), Base::widen(p[3])}};
  }
  static Vec add(Vec sum, Operand a, Operand b) {
    for (int i = 0; i < 4; ++i) sum.lanes[i] += a.lanes[i] * b.lanes[i];
    return sum;
  }
};
using Float = Lanes<FloatElement>;
using BFloat16 = Lanes<BFloat16Element>;
#include "cpu/gather_kernel.h"
}  // namespace portable

}  // namespace

const ProductKernel* product_kernels(int* count) {
  static ProductKernel kernels[4];
  static const int found = [] {
    int n = 0;
#ifdef CONTREC_TARGETS
    const Features& has = features();
    if (has.avx512_bf16 && has.avx512bw) {
      kernels[n++] = {"avx512_bf16", avx512_bf16::product<avx512_bf16::Float>,
                      avx512_bf16::product<avx512_bf16::BFloat16>};
    }
    if (has.avx512f) {
      kernels[n++] = {"avx512f", avx512f::product<avx512f::Float>,
                      avx512f::product<avx512f::BFloat16>};
    }
    if (has.avx2 && has.fma) {
      kernels[n++] = {"avx2", avx2::product<avx2::Float>, avx2::product<avx2::BFloat16>};
    }
#endif
    kernels[n++] = {"portable", portable::product<portable::Float>,
                    portable::product<portable::BFloat16>};
    return n;
  }();
  *count = found;
  return kernels;
}

}  // namespace contrec::cpu
