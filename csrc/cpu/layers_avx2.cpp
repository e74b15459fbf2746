// Decoder layers with AVX2 and FMA.
#include <cstddef>
#include <cstdint>

#include "cpu/layers.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#include "cpu/vec_avx2.h"
#include "cpu/vec_float.h"

namespace contrec::cpu {
namespace {

inline void keep_larger(Vec value, float id, float* best, float* ids) {
  const __m256 before = _mm256_loadu_ps(best);
  const __m256 larger = _mm256_cmp_ps(value.v, before, _CMP_GT_OQ);
  _mm256_storeu_ps(best, _mm256_blendv_ps(before, value.v, larger));
  const __m256 id_before = _mm256_loadu_ps(ids);
  _mm256_storeu_ps(ids, _mm256_blendv_ps(id_before, _mm256_set1_ps(id), larger));
}

}  // namespace
}  // namespace contrec::cpu

#include "cpu/layers_transpose.h"
#include "cpu/layers_kernel.h"
#endif

namespace contrec::cpu {

const LayerKernel* layers_avx2() {
#ifdef CONTREC_TARGETS
  static constexpr LayerKernel kernel = {"avx2", &norm, &rotary, &attention, &gate, &choose};
  return &kernel;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
