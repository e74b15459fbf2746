// Cross-entropy over a catalog with AVX-512F.
#include <cstddef>
#include <cstdint>

#include "cpu/cross_entropy.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx512f,fma")
#include "cpu/vec_avx512.h"
#include "cpu/vec_float.h"
#include "cpu/cross_entropy_kernel.h"
#endif

namespace contrec::cpu {

const CrossEntropyKernel* cross_entropy_avx512() {
#ifdef CONTREC_TARGETS
  static constexpr CrossEntropyKernel kernel = {"avx512f", &forward, &backward};
  return &kernel;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
