// Python bindings of what a decoder layer does between its products.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/layers.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void norm(Address x, Address added, Address weight, double eps, Address out, Int tokens, Int width,
          int threads, const char* isa) {
  const contrec::cpu::NormJob job{pointer<float>(x), pointer<const float>(added),
                                  pointer<const float>(weight), eps, pointer<float>(out), tokens,
                                  width};
  py::gil_scoped_release release;
  contrec::cpu::layer_norm(job, threads, isa);
}

void rotary(Address queries, Address keys, Address values, Address query_norm, Address key_norm,
            double eps, Address cosines, Address sines, Address positions, Address rows,
            Address stored_keys, Address stored_values, Int tokens, Int heads, Int key_heads,
            Int dim, Int places, int threads, const char* isa) {
  const contrec::cpu::RotaryJob job{pointer<float>(queries),
                                    pointer<const float>(keys),
                                    pointer<const float>(values),
                                    pointer<const float>(query_norm),
                                    pointer<const float>(key_norm),
                                    eps,
                                    pointer<const float>(cosines),
                                    pointer<const float>(sines),
                                    pointer<const Int>(positions),
                                    pointer<const Int>(rows),
                                    pointer<float>(stored_keys),
                                    pointer<float>(stored_values),
                                    tokens,
                                    heads,
                                    key_heads,
                                    dim,
                                    places};
  py::gil_scoped_release release;
  contrec::cpu::layer_rotary(job, threads, isa);
}

void attention(Address queries, Address stored_keys, Address stored_values, Address positions,
               Address rows, Address starts, Address out, double scale, Int sequences, Int heads,
               Int key_heads, Int dim, Int places, int threads, const char* isa) {
  const contrec::cpu::AttentionJob job{pointer<const float>(queries),
                                       pointer<const float>(stored_keys),
                                       pointer<const float>(stored_values),
                                       pointer<const Int>(positions),
                                       pointer<const Int>(rows),
                                       pointer<const Int>(starts),
                                       pointer<float>(out),
                                       scale,
                                       sequences,
                                       heads,
                                       key_heads,
                                       dim,
                                       places};
  py::gil_scoped_release release;
  contrec::cpu::layer_attention(job, threads, isa);
}

void gate(Address gate, Address up, Int tokens, Int width, int threads, const char* isa) {
  const contrec::cpu::GateJob job{pointer<float>(gate), pointer<const float>(up), tokens, width};
  py::gil_scoped_release release;
  contrec::cpu::layer_gate(job, threads, isa);
}

void choose(Address hidden, Address weight, Address out, Int tokens, Int words, Int width,
            int threads, const char* isa) {
  const contrec::cpu::ChooseJob job{pointer<const float>(hidden), pointer<const float>(weight),
                                    pointer<Int>(out), tokens, words, width};
  py::gil_scoped_release release;
  contrec::cpu::choose_tokens(job, threads, isa);
}

std::vector<std::string> instruction_sets() {
  int count;
  const char* const* names = contrec::cpu::layer_instruction_sets(&count);
  return {names, names + count};
}

}  // namespace

// Positional arguments: these are called often.
void bind_layers(py::module_& module) {
  module.def("layer_instruction_sets", &instruction_sets,
             "Values of `isa` below that this processor has, best first.");
  module.def("layer_norm", &norm, "See NormJob in csrc/cpu/layers.h; threads, isa (or None).");
  module.def("layer_rotary", &rotary, "See RotaryJob; threads, isa.");
  module.def("layer_attention", &attention, "See AttentionJob; threads, isa.");
  module.def("layer_gate", &gate, "See GateJob; threads, isa.");
  module.def("choose_tokens", &choose, "See ChooseJob; threads, isa.");
}
