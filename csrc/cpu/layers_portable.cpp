// Decoder layers in plain C++.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/layers.h"
#include "cpu/layers_transpose.h"
#include "cpu/vec_portable.h"
#include "cpu/vec_float.h"

namespace contrec::cpu {
namespace {

inline void keep_larger(Vec value, float id, float* best, float* ids) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    if (value.v[i] > best[i]) best[i] = value.v[i], ids[i] = id;
  }
}

}  // namespace
}  // namespace contrec::cpu

#include "cpu/layers_kernel.h"

namespace contrec::cpu {

const LayerKernel* layers_portable() {
  static constexpr LayerKernel kernel = {"portable", &norm, &rotary, &attention, &gate, &choose};
  return &kernel;
}

}  // namespace contrec::cpu
