// The sampler in plain C++, in float32.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/philox.h"
#include "cpu/sampler.h"
#include "cpu/vec_portable.h"
#include "cpu/vec_float.h"
#include "cpu/sampler_chain.h"

namespace contrec::cpu {

const Sampler* sampler_portable() { return &kSampler; }

}  // namespace contrec::cpu
