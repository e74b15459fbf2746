// Python bindings of the cross-entropy over a catalog.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/cross_entropy.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void cross_entropy(std::uintptr_t queries, std::uintptr_t vectors, bool low, std::int64_t batch,
                   std::int64_t items, std::int64_t dim, bool cosine, std::uintptr_t targets,
                   double temperature, double smoothing, std::uintptr_t seen_offsets,
                   std::int64_t seen_users, std::uintptr_t seen_ids, std::uintptr_t seen_rows,
                   std::uintptr_t peaks, std::uintptr_t totals, std::uintptr_t losses,
                   std::uintptr_t gradient, std::uintptr_t query_gradient,
                   std::uintptr_t vector_gradient, int threads, const char* isa) {
  contrec::cpu::CrossEntropyJob job{};
  job.queries = pointer<const void>(queries);
  job.vectors = pointer<const void>(vectors);
  job.low = low;
  job.batch = batch;
  job.items = items;
  job.dim = dim;
  job.cosine = cosine;
  job.targets = pointer<const std::int64_t>(targets);
  job.temperature = temperature;
  job.smoothing = smoothing;
  job.seen_offsets = pointer<const std::int64_t>(seen_offsets);
  job.seen_users = seen_users;
  job.seen_ids = pointer<const std::int64_t>(seen_ids);
  job.seen_rows = pointer<const std::int64_t>(seen_rows);
  job.peaks = pointer<float>(peaks);
  job.totals = pointer<float>(totals);
  job.losses = pointer<float>(losses);
  job.gradient = pointer<const float>(gradient);
  job.query_gradient = pointer<float>(query_gradient);
  job.vector_gradient = pointer<float>(vector_gradient);
  py::gil_scoped_release release;
  if (losses != 0) return contrec::cpu::cross_entropy_forward(job, threads, isa);
  contrec::cpu::cross_entropy_backward(job, threads, isa);
}

std::vector<std::string> instruction_sets() {
  int count;
  const char* const* names = contrec::cpu::cross_entropy_instruction_sets(&count);
  return {names, names + count};
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  module.def("cross_entropy_instruction_sets", &instruction_sets,
             "Values of `isa` below that this processor has, best first.");
  module.def("cross_entropy", &cross_entropy, py::kw_only(), py::arg("queries"),
             py::arg("vectors"), py::arg("low"), py::arg("batch"), py::arg("items"),
             py::arg("dim"), py::arg("cosine"), py::arg("targets"), py::arg("temperature"),
             py::arg("smoothing"), py::arg("seen_offsets"), py::arg("seen_users"),
             py::arg("seen_ids"), py::arg("seen_rows"), py::arg("peaks"), py::arg("totals"),
             py::arg("losses"), py::arg("gradient"), py::arg("query_gradient"),
             py::arg("vector_gradient"), py::arg("threads"), py::arg("isa"),
             "The forward pass where `losses` is an address, else the backward pass; see "
             "CrossEntropyJob in csrc/cpu/cross_entropy.h.");
}
