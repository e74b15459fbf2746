// Normals with AVX-512F.
#include <cmath>
#include <cstring>

#include "cpu/clones.h"
#include "cpu/philox.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx512f")

namespace contrec::cpu {
namespace {

typedef std::uint64_t Lanes __attribute__((vector_size(64)));

inline Lanes product(Lanes a, Lanes b) { return Lanes(_mm512_mul_epu32(__m512i(a), __m512i(b))); }

}  // namespace
}  // namespace contrec::cpu

#include "cpu/philox_normals.h"
#endif

namespace contrec::cpu {

PhiloxNormals* philox_avx512() {
#ifdef CONTREC_TARGETS
  return &normals;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
