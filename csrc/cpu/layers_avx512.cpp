// Decoder layers with AVX-512F.
#include <cstddef>
#include <cstdint>

#include "cpu/layers.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx512f,fma")
#include "cpu/vec_avx512.h"
#include "cpu/vec_float.h"

namespace contrec::cpu {
namespace {

inline void keep_larger(Vec value, float id, float* best, float* ids) {
  const __m512 before = _mm512_loadu_ps(best);
  const __mmask16 larger = _mm512_cmp_ps_mask(value.v, before, _CMP_GT_OQ);
  _mm512_storeu_ps(best, _mm512_mask_mov_ps(before, larger, value.v));
  _mm512_mask_storeu_ps(ids, larger, _mm512_set1_ps(id));
}

// to[column, row] = from[row, column] of 16 x 16.
inline void transpose_16(const float* from, std::int64_t pitch, float* to, std::int64_t to_pitch) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * pitch);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // columns 0, 1, 2, 3 of each fourth, rows i to i + 3
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_ps(to + i * to_pitch, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_storeu_ps(to + (i + 8) * to_pitch, _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(to + (i + 4) * to_pitch, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(to + (i + 12) * to_pitch, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

inline void transpose(const float* from, std::int64_t rows, std::int64_t columns, float* to,
                      std::int64_t pitch) {
  for (std::int64_t r = 0; r < rows; r += 16) {
    for (std::int64_t c = 0; c < columns; c += 16) {
      if (r + 16 <= rows && c + 16 <= columns) {
        transpose_16(from + r * columns + c, columns, to + c * pitch + r, pitch);
        continue;
      }
      for (std::int64_t i = r; i < rows && i < r + 16; ++i) {
        for (std::int64_t j = c; j < columns && j < c + 16; ++j) {
          to[j * pitch + i] = from[i * columns + j];
        }
      }
    }
  }
}

}  // namespace
}  // namespace contrec::cpu

#include "cpu/layers_kernel.h"
#endif

namespace contrec::cpu {

const LayerKernel* layers_avx512() {
#ifdef CONTREC_TARGETS
  static constexpr LayerKernel kernel = {"avx512f", &norm, &rotary, &attention, &gate, &choose};
  return &kernel;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
