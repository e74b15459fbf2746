// Cross-entropy over a catalog with AVX2 and FMA.
#include <cstddef>
#include <cstdint>

#include "cpu/cross_entropy.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#include "cpu/vec_avx2.h"
#include "cpu/vec_float.h"
#include "cpu/cross_entropy_kernel.h"
#endif

namespace contrec::cpu {

const CrossEntropyKernel* cross_entropy_avx2() {
#ifdef CONTREC_TARGETS
  static constexpr CrossEntropyKernel kernel = {"avx2", &forward, &backward};
  return &kernel;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
