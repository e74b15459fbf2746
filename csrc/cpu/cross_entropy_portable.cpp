// Cross-entropy over a catalog in plain C++.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/cross_entropy.h"
#include "cpu/vec_portable.h"
#include "cpu/vec_float.h"
#include "cpu/cross_entropy_kernel.h"

namespace contrec::cpu {

const CrossEntropyKernel* cross_entropy_portable() {
  static constexpr CrossEntropyKernel kernel = {"portable", &forward, &backward};
  return &kernel;
}

}  // namespace contrec::cpu
