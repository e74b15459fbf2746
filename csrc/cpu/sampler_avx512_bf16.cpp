// The sampler with AVX-512F, its products in bfloat16.
#include <cstddef>
#include <cstdint>

#include "cpu/philox.h"
#include "cpu/sampler.h"

#ifdef CONTREC_TARGETS
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,fma")
#include "cpu/vec_avx512.h"
#include "cpu/sampler_bf16.h"
#include "cpu/sampler_chain.h"
#endif

namespace contrec::cpu {

const Sampler* sampler_avx512_bf16() {
#ifdef CONTREC_TARGETS
  return &kSampler;
#else
  return nullptr;
#endif
}

}  // namespace contrec::cpu
