// The sampler with AVX-512F, in float32.
#include <cstddef>
#include <cstdint>

#include "cpu/philox.h"
#include "cpu/sampler.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx512f,fma")
#include "cpu/vec_avx512.h"
#include "cpu/vec_float.h"
#include "cpu/sampler_chain.h"
#endif

namespace contrec::cpu {

const Sampler* sampler_avx512() {
#ifdef CONTREC_TARGETS
  return &kSampler;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
