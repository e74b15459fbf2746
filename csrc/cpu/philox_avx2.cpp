// Normals with AVX2.
#include <cmath>
#include <cstring>

#include "cpu/clones.h"
#include "cpu/philox.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx2")

namespace contrec::cpu {
namespace {

typedef std::uint64_t Lanes __attribute__((vector_size(32)));

inline Lanes product(Lanes a, Lanes b) { return Lanes(_mm256_mul_epu32(__m256i(a), __m256i(b))); }

}  // namespace
}  // namespace contrec::cpu

#include "cpu/philox_normals.h"
#endif

namespace contrec::cpu {

PhiloxNormals* philox_avx2() {
#ifdef CONTREC_TARGETS
  return &normals;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
