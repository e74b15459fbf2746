#include "cpu/topk_scan.h"

#include <cstddef>

#include "cpu/features.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CONTREC_X86_64 1
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own shuffles, unmasked
#endif
#endif

// Everything between the two is compiled for an instruction set; only code that stays in this
// file may be (no inline function of the standard library).
#if defined(__clang__)
#define CONTREC_TEXT(x) #x
#define CONTREC_TARGET_BEGIN(features) \
  _Pragma(CONTREC_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define CONTREC_TARGET_END _Pragma("clang attribute pop")
#else
#define CONTREC_TEXT(x) #x
#define CONTREC_TARGET_BEGIN(features) \
  _Pragma("GCC push_options") _Pragma(CONTREC_TEXT(GCC target(features)))
#define CONTREC_TARGET_END _Pragma("GCC pop_options")
#endif

namespace contrec::cpu {
namespace {

inline float low_element(std::uint32_t pair) {
  const std::uint32_t bits = pair << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float high_element(std::uint32_t pair) { return low_element(pair >> 16); }

#ifdef CONTREC_X86_64

CONTREC_TARGET_BEGIN("avx512f")
// Lane i of the result is the sum over the lanes of sums[i]: each level adds the halves of two
// vectors into one, in pairs that make the lanes come out in order.
inline __m512 avx512_totals(const __m512 (&sums)[kLanes]) {
  __m512 pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 first = sums[i + i / 4 * 4], second = sums[i + i / 4 * 4 + 4];
    pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x44),
                             _mm512_shuffle_f32x4(first, second, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(pairs[i], pairs[i + 4], 0x88),
                             _mm512_shuffle_f32x4(pairs[i], pairs[i + 4], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eights[i] = _mm512_add_ps(_mm512_unpacklo_ps(fours[i], fours[i + 2]),
                              _mm512_unpackhi_ps(fours[i], fours[i + 2]));
  }
  return _mm512_add_ps(_mm512_unpacklo_ps(eights[0], eights[1]),
                       _mm512_unpackhi_ps(eights[0], eights[1]));
}
CONTREC_TARGET_END

CONTREC_TARGET_BEGIN("avx512f,avx512bw,avx512bf16")
namespace avx512_bf16 {
struct Isa {
  static constexpr int kTileItems = 6, kTileGroups = 4;
  using Vec = __m512;
  using QueryPair = __m512i;
  using ItemPair = __m512i;
  static Vec fill(float value) { return _mm512_set1_ps(value); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static QueryPair queries(const void* panels, std::int64_t step) {
    return _mm512_loadu_si512(static_cast<const std::uint32_t*>(panels) + step * kLanes);
  }
  static ItemPair item(std::uint32_t pair) { return _mm512_set1_epi32(int(pair)); }
  static Vec add(Vec sum, QueryPair query, ItemPair item) {
    return _mm512_dpbf16_ps(sum, (__m512bh)query, (__m512bh)item);
  }
  static unsigned reaches(Vec sum, Vec other, Vec matching, unsigned named) {
    const Vec threshold = _mm512_mask_blend_ps(__mmask16(named), other, matching);
    return _mm512_cmp_ps_mask(sum, threshold, _CMP_GE_OQ);
  }
  static void add_row(Vec& sum, Vec&, const void* queries, std::int64_t start,
                      const std::uint16_t* item) {
    const auto* query = static_cast<const std::uint16_t*>(queries) + start;
    sum = add(sum, _mm512_loadu_si512(query), _mm512_loadu_si512(item));
  }
  static Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec totals(const Vec (&sums)[kLanes]) { return avx512_totals(sums); }
};
#include "cpu/topk_kernel.h"
}  // namespace avx512_bf16
CONTREC_TARGET_END

CONTREC_TARGET_BEGIN("avx512f")
namespace avx512f {
struct Isa {
  static constexpr int kTileItems = 5, kTileGroups = 4;
  using Vec = __m512;
  struct QueryPair {
    Vec low, high;
  };
  struct ItemPair {
    Vec low, high;
  };
  static Vec fill(float value) { return _mm512_set1_ps(value); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static QueryPair queries(const void* panels, std::int64_t step) {
    const float* from = static_cast<const float*>(panels) + step * 2 * kLanes;
    return {load(from), load(from + kLanes)};
  }
  static ItemPair item(std::uint32_t pair) {
    return {fill(low_element(pair)), fill(high_element(pair))};
  }
  static Vec add(Vec sum, const QueryPair& query, const ItemPair& item) {
    return _mm512_fmadd_ps(query.high, item.high, _mm512_fmadd_ps(query.low, item.low, sum));
  }
  static unsigned reaches(Vec sum, Vec other, Vec matching, unsigned named) {
    const Vec threshold = _mm512_mask_blend_ps(__mmask16(named), other, matching);
    return _mm512_cmp_ps_mask(sum, threshold, _CMP_GE_OQ);
  }
  static Vec widen(const std::uint16_t* item) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)item));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static void add_row(Vec& sum, Vec& sum2, const void* queries, std::int64_t start,
                      const std::uint16_t* item) {
    const float* query = static_cast<const float*>(queries) + start;
    sum = _mm512_fmadd_ps(load(query), widen(item), sum);
    sum2 = _mm512_fmadd_ps(load(query + kLanes), widen(item + kLanes), sum2);
  }
  static Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec totals(const Vec (&sums)[kLanes]) { return avx512_totals(sums); }
};
#include "cpu/topk_kernel.h"
}  // namespace avx512f
CONTREC_TARGET_END

CONTREC_TARGET_BEGIN("avx2,fma")
namespace avx2 {
struct Isa {
  static constexpr int kTileItems = 5, kTileGroups = 1;
  struct Vec {
    __m256 first, last;
  };
  struct QueryPair {
    const float* from;
  };
  struct ItemPair {
    __m256 low, high;
  };
  static Vec fill(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void store(float* to, Vec value) {
    _mm256_storeu_ps(to, value.first);
    _mm256_storeu_ps(to + 8, value.last);
  }
  static QueryPair queries(const void* panels, std::int64_t step) {
    return {static_cast<const float*>(panels) + step * 2 * kLanes};
  }
  static ItemPair item(std::uint32_t pair) {
    return {_mm256_set1_ps(low_element(pair)), _mm256_set1_ps(high_element(pair))};
  }
  static Vec add_product(const Vec& sum, const float* query, __m256 item) {
    return {_mm256_fmadd_ps(_mm256_loadu_ps(query), item, sum.first),
            _mm256_fmadd_ps(_mm256_loadu_ps(query + 8), item, sum.last)};
  }
  static Vec add(const Vec& sum, QueryPair query, const ItemPair& item) {
    return add_product(add_product(sum, query.from, item.low), query.from + kLanes, item.high);
  }
  static unsigned half(__m256 sum, __m256 other, __m256 matching, unsigned named) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(named)), bit);
    const __m256 mask = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit));
    const __m256 threshold = _mm256_blendv_ps(other, matching, mask);
    return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(sum, threshold, _CMP_GE_OQ)));
  }
  static unsigned reaches(const Vec& sum, const Vec& other, const Vec& matching, unsigned named) {
    return half(sum.first, other.first, matching.first, named & 255) |
           half(sum.last, other.last, matching.last, named >> 8) << 8;
  }
  static __m256 widen(const std::uint16_t* item) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)item));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static void add_row(Vec& sum, Vec& sum2, const void* queries, std::int64_t start,
                      const std::uint16_t* item) {
    const float* query = static_cast<const float*>(queries) + start;
    sum.first = _mm256_fmadd_ps(_mm256_loadu_ps(query), widen(item), sum.first);
    sum.last = _mm256_fmadd_ps(_mm256_loadu_ps(query + 8), widen(item + 8), sum.last);
    sum2.first = _mm256_fmadd_ps(_mm256_loadu_ps(query + 16), widen(item + 16), sum2.first);
    sum2.last = _mm256_fmadd_ps(_mm256_loadu_ps(query + 24), widen(item + 24), sum2.last);
  }
  static Vec plus(const Vec& a, const Vec& b) {
    return {_mm256_add_ps(a.first, b.first), _mm256_add_ps(a.last, b.last)};
  }
  // The sums over the lanes of eight vectors.
  static __m256 totals_of_eight(const Vec* sums) {
    __m256 pairs[4], fours[2];
    for (int i = 0; i < 4; ++i) {
      pairs[i] = _mm256_hadd_ps(_mm256_add_ps(sums[2 * i].first, sums[2 * i].last),
                                _mm256_add_ps(sums[2 * i + 1].first, sums[2 * i + 1].last));
    }
    for (int i = 0; i < 2; ++i) fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
    return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                         _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
  }
  static Vec totals(const Vec (&sums)[kLanes]) {
    return {totals_of_eight(sums), totals_of_eight(sums + 8)};
  }
};
#include "cpu/topk_kernel.h"
}  // namespace avx2
CONTREC_TARGET_END

#endif

namespace portable {
struct Isa {
  static constexpr int kTileItems = 2, kTileGroups = 1;
  struct Vec {
    float lane[kLanes];
  };
  struct QueryPair {
    const float* from;
  };
  struct ItemPair {
    float low, high;
  };
  static Vec fill(float value) {
    Vec result;
    for (float& lane : result.lane) lane = value;
    return result;
  }
  static Vec load(const float* from) {
    Vec result;
    __builtin_memcpy(&result, from, sizeof result);
    return result;
  }
  static void store(float* to, const Vec& value) { __builtin_memcpy(to, &value, sizeof value); }
  static QueryPair queries(const void* panels, std::int64_t step) {
    return {static_cast<const float*>(panels) + step * 2 * kLanes};
  }
  static ItemPair item(std::uint32_t pair) { return {low_element(pair), high_element(pair)}; }
  static Vec add(Vec sum, QueryPair query, ItemPair item) {
    for (int i = 0; i < kLanes; ++i) {
      sum.lane[i] += query.from[i] * item.low + query.from[kLanes + i] * item.high;
    }
    return sum;
  }
  static unsigned reaches(const Vec& sum, const Vec& other, const Vec& matching, unsigned named) {
    unsigned reached = 0;
    for (int i = 0; i < kLanes; ++i) {
      const float threshold = (named >> i & 1) != 0 ? matching.lane[i] : other.lane[i];
      reached |= unsigned(sum.lane[i] >= threshold) << i;
    }
    return reached;
  }
  static void add_row(Vec& sum, Vec& sum2, const void* queries, std::int64_t start,
                      const std::uint16_t* item) {
    const float* query = static_cast<const float*>(queries) + start;
    for (int i = 0; i < kLanes; ++i) {
      sum.lane[i] += query[i] * low_element(item[i]);
      sum2.lane[i] += query[kLanes + i] * low_element(item[kLanes + i]);
    }
  }
  static Vec plus(Vec a, const Vec& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec totals(const Vec (&sums)[kLanes]) {
    Vec result = fill(0.0f);
    for (int item = 0; item < kLanes; ++item) {
      for (int i = 0; i < kLanes; ++i) result.lane[item] += sums[item].lane[i];
    }
    return result;
  }
};
#include "cpu/topk_kernel.h"
}  // namespace portable

}  // namespace

const ScanKernel* scan_kernels(int* count) {
  static ScanKernel kernels[4];
  static const int found = [] {
    int n = 0;
#ifdef CONTREC_X86_64
    const Features& cpu = features();
    if (cpu.avx512f && cpu.avx512bw && cpu.avx512_bf16) {
      kernels[n++] = {"avx512_bf16", true, avx512_bf16::scan_panels, avx512_bf16::scan_rows};
    }
    if (cpu.avx512f) {
      kernels[n++] = {"avx512f", false, avx512f::scan_panels, avx512f::scan_rows};
    }
    if (cpu.avx2 && cpu.fma) kernels[n++] = {"avx2", false, avx2::scan_panels, avx2::scan_rows};
#endif
    kernels[n++] = {"portable", false, portable::scan_panels, portable::scan_rows};
    return n;
  }();
  *count = found;
  return kernels;
}

}  // namespace contrec::cpu
