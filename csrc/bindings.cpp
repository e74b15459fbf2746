// Python bindings of contrec_fast._C. The only file that includes pybind11: everything behind it
// takes raw pointers and sizes, so that one build serves every torch version.
#include <pybind11/pybind11.h>

#include "cpu/features.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const contrec::cpu::Features& found = contrec::cpu::features();
  py::dict features;
  features["avx2"] = found.avx2;
  features["fma"] = found.fma;
  features["avx512f"] = found.avx512f;
  features["avx512bw"] = found.avx512bw;
  features["avx512_bf16"] = found.avx512_bf16;
  features["avx512_vnni"] = found.avx512_vnni;

  py::dict info;
  info["compiler"] = contrec::cpu::compiler();
  info["openmp"] = contrec::cpu::has_openmp();
  info["openmp_max_threads"] = contrec::cpu::openmp_max_threads();
  info["cpu_features"] = features;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels for the CPU";
  module.def("build_info", &build_info,
             "Compiler, OpenMP, and the instruction sets of the processor this runs on.");
}
