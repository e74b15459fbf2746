// Python bindings of contrec_fast._C. The only file that includes pybind11: everything behind it
// takes raw pointers and sizes, so that one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/features.h"
#include "cpu/philox.h"

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

// Addresses come as integers (`tensor.data_ptr()`); the caller checks shapes and dtypes.
void philox_normal(std::uint64_t seed, std::uintptr_t user_ids, std::int64_t batch,
                   std::int64_t dim, std::uint32_t column, std::uintptr_t out, int threads) {
  py::gil_scoped_release release;
  contrec::cpu::philox_normal(seed, reinterpret_cast<const std::int64_t*>(user_ids), batch, dim,
                              column, reinterpret_cast<float*>(out), threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels for the CPU";
  module.def("build_info", &build_info,
             "Compiler, OpenMP, and the instruction sets of the processor this runs on.");
  module.def("philox_normal", &philox_normal, py::arg("seed"), py::arg("user_ids"),
             py::arg("batch"), py::arg("dim"), py::arg("column"), py::arg("out"),
             py::arg("threads"),
             "Write [batch, dim] float32 normals at the address `out`; see csrc/cpu/philox.h.");
}
