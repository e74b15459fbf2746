// Python bindings of contrec_fast._C. Only bindings*.cpp include pybind11: everything behind them
// takes raw pointers and sizes, so that one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/denoise.h"
#include "cpu/features.h"
#include "cpu/gather.h"
#include "cpu/philox.h"
#include "cpu/sampler.h"
#include "cpu/topk.h"

namespace py = pybind11;

void bind_cross_entropy(py::module_& module);
void bind_layers(py::module_& module);

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
                   std::int64_t dim, std::uint32_t column, std::uintptr_t out, int threads,
                   const std::string& isa) {
  py::gil_scoped_release release;
  contrec::cpu::philox_normal(seed, reinterpret_cast<const std::int64_t*>(user_ids), batch, dim,
                              column, reinterpret_cast<float*>(out), threads, isa);
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::dict cosine_topk(std::uintptr_t queries, int query_dtype, std::int64_t batch,
                     std::uintptr_t vectors, int vector_dtype, std::int64_t rows, std::int64_t dim,
                     std::uintptr_t norms, std::uintptr_t scan, std::uintptr_t errors,
                     std::uintptr_t groups, std::uintptr_t eligible, std::int64_t k,
                     std::uintptr_t matched, std::int64_t matched_groups, double pi,
                     std::uintptr_t seen_offsets, std::int64_t seen_users, std::uintptr_t seen_ids,
                     std::uintptr_t seen_rows, std::uintptr_t scores, std::uintptr_t ids,
                     int threads, const char* isa) {
  contrec::cpu::TopkArguments arguments;
  arguments.queries = pointer<const void>(queries);
  arguments.query_dtype = contrec::cpu::Dtype(query_dtype);
  arguments.batch = batch;
  arguments.vectors = pointer<const void>(vectors);
  arguments.vector_dtype = contrec::cpu::Dtype(vector_dtype);
  arguments.rows = rows;
  arguments.dim = dim;
  arguments.norms = pointer<const double>(norms);
  arguments.scan = pointer<const std::uint16_t>(scan);
  arguments.errors = pointer<const float>(errors);
  arguments.groups = pointer<const std::int32_t>(groups);
  arguments.eligible = pointer<const bool>(eligible);
  arguments.k = k;
  arguments.matched = pointer<const bool>(matched);
  arguments.matched_groups = matched_groups;
  arguments.pi = pi;
  arguments.seen_offsets = pointer<const std::int64_t>(seen_offsets);
  arguments.seen_users = seen_users;
  arguments.seen_ids = pointer<const std::int64_t>(seen_ids);
  arguments.seen_rows = pointer<const std::int64_t>(seen_rows);
  arguments.scores = pointer<float>(scores);
  arguments.ids = pointer<std::int64_t>(ids);
  contrec::cpu::TopkStatistics found;
  {
    py::gil_scoped_release release;
    found = contrec::cpu::cosine_topk(arguments, threads, isa);
  }
  py::dict statistics;
  statistics["kept"] = found.kept;
  statistics["rescored"] = found.rescored;
  statistics["crowded"] = found.crowded;
  return statistics;
}

py::list topk_instruction_sets() {
  int count;
  const char* const* names = contrec::cpu::topk_instruction_sets(&count);
  py::list result;
  for (int i = 0; i < count; ++i) result.append(names[i]);
  return result;
}

using contrec::cpu::Instructions;

const std::vector<std::pair<std::string, Instructions>> kInstructions = {
    {"avx512_bf16", Instructions::kAVX512BF16},
    {"avx512f", Instructions::kAVX512},
    {"avx2", Instructions::kAVX2},
    {"portable", Instructions::kPortable},
};

std::vector<std::string> sampler_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [name, instructions] : kInstructions) {
    if (contrec::cpu::has(instructions)) names.push_back(name);
  }
  return names;
}

template <class Tensors>
void read_addresses(Tensors& tensors, const std::vector<std::uintptr_t>& addresses) {
  if (sizeof tensors != addresses.size() * sizeof(void*)) {
    throw std::invalid_argument("tensors: a wrong number of them");
  }
  std::memcpy(&tensors, addresses.data(), sizeof tensors);
}

// Tensors in the order of the network's structure in csrc/cpu/sampler.h.
void sample(const std::string& network, const std::vector<std::uintptr_t>& tensors,
            std::int64_t dim, std::int64_t hidden, std::int64_t depth, std::int64_t steps,
            std::int64_t noises, bool multistep, float guidance, std::uintptr_t coefficients,
            std::int64_t batch, std::int64_t samples, std::uintptr_t condition,
            std::uintptr_t noise, std::int64_t noise_entries, std::uint64_t seed,
            std::uintptr_t user_ids, bool round_noise, std::uintptr_t out,
            const std::string& isa, int threads) {
  contrec::cpu::SamplerJob job{};
  if (network == "linear") {
    job.network = contrec::cpu::Network::kLinear;
    read_addresses(job.linear, tensors);
  } else if (network == "mlp") {
    job.network = contrec::cpu::Network::kMLP;
    read_addresses(job.mlp, tensors);
  } else {
    const bool separable = network == "separable";
    job.network = separable ? contrec::cpu::Network::kSeparable : contrec::cpu::Network::kAdaLN;
    read_addresses(job.adaln, tensors);
  }
  job.dim = dim;
  job.hidden = hidden;
  job.depth = depth;
  job.steps = steps;
  job.noises = noises;
  job.multistep = multistep;
  job.guidance = guidance;
  job.coefficients = pointer<const float>(coefficients);
  job.batch = batch;
  job.samples = samples;
  job.condition = pointer<const float>(condition);
  job.noise = pointer<const float>(noise);
  job.noise_entries = noise_entries;
  job.seed = seed;
  job.user_ids = pointer<const std::int64_t>(user_ids);
  job.round_noise = round_noise;
  job.out = pointer<float>(out);
  for (const auto& [name, set] : kInstructions) {
    if (name == isa && contrec::cpu::has(set)) {
      py::gil_scoped_release release;
      return contrec::cpu::sample(job, set, threads);
    }
  }
  throw std::invalid_argument("isa: not on this processor: " + isa);
}

contrec::cpu::GatherPositions gather_positions(std::uintptr_t token_ids, std::uintptr_t rows,
                                               std::int64_t batch, std::int64_t length,
                                               std::int64_t words, std::int64_t tokens) {
  return {pointer<const std::int64_t>(token_ids), pointer<const std::int64_t>(rows), batch, length,
          words, tokens};
}

void gather_tokens(std::uintptr_t token_ids, std::uintptr_t rows, std::int64_t batch,
                   std::int64_t length, std::int64_t words, std::int64_t tokens,
                   std::uintptr_t text_table, std::int64_t text_stride, std::uintptr_t token_table,
                   std::int64_t token_stride, std::int64_t width, std::int64_t element_bytes,
                   std::uintptr_t out, std::int64_t batch_stride, std::int64_t position_stride,
                   std::uintptr_t weight, std::uintptr_t bias, std::int64_t layers,
                   std::int64_t inner, int dtype, int threads, const char* isa) {
  const contrec::cpu::GatherArguments arguments = {
      gather_positions(token_ids, rows, batch, length, words, tokens),
      pointer<const char>(text_table),
      text_stride,
      pointer<const char>(token_table),
      token_stride,
      width,
      element_bytes,
      pointer<char>(out),
      batch_stride,
      position_stride,
      pointer<const char>(weight),
      pointer<const char>(bias),
      layers,
      inner,
      contrec::cpu::Dtype(dtype)};
  py::gil_scoped_release release;
  contrec::cpu::gather_tokens(arguments, threads, isa);
}

void gather_tokens_backward(std::uintptr_t token_ids, std::uintptr_t rows, std::int64_t batch,
                            std::int64_t length, std::int64_t words, std::int64_t tokens,
                            std::uintptr_t gradient, std::int64_t batch_stride,
                            std::int64_t position_stride, std::int64_t width, int dtype,
                            std::uintptr_t text_gradient, std::uintptr_t token_gradient,
                            int threads) {
  const contrec::cpu::GatherGradients arguments = {
      gather_positions(token_ids, rows, batch, length, words, tokens),
      pointer<const char>(gradient),
      batch_stride,
      position_stride,
      width,
      contrec::cpu::Dtype(dtype),
      pointer<char>(text_gradient),
      pointer<char>(token_gradient)};
  py::gil_scoped_release release;
  contrec::cpu::gather_tokens_backward(arguments, threads);
}

std::vector<std::string> gather_instruction_sets() {
  int count;
  const char* const* names = contrec::cpu::gather_instruction_sets(&count);
  return {names, names + count};
}

// One of the passes of csrc/cpu/denoise.h; `tensors` are the members of its structure in order.
template <class Tensors, void (*run)(const contrec::cpu::Batch&, const Tensors&)>
void denoise_pass(const std::vector<std::uintptr_t>& tensors, bool bfloat16, std::int64_t rows,
                  std::int64_t width, std::uintptr_t index, float guidance, std::uintptr_t dropped,
                  int threads) {
  Tensors members;
  read_addresses(members, tensors);
  const contrec::cpu::Batch batch{bfloat16, rows, width, pointer<const std::int64_t>(index),
                                  guidance, pointer<const bool>(dropped), threads};
  py::gil_scoped_release release;
  run(batch, members);
}

template <class Tensors, void (*run)(const contrec::cpu::Batch&, const Tensors&)>
void define_denoise_pass(py::module_& module, const char* name) {
  module.def(name, &denoise_pass<Tensors, run>, py::arg("tensors"), py::kw_only(),
             py::arg("bfloat16"), py::arg("rows"), py::arg("width"), py::arg("index") = 0,
             py::arg("guidance") = 0.0f, py::arg("dropped") = 0, py::arg("threads") = 1,
             "A pass over rows; see csrc/cpu/denoise.h.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels for the CPU";
  bind_cross_entropy(module);
  bind_layers(module);
  module.def("build_info", &build_info,
             "Compiler, OpenMP, and the instruction sets of the processor this runs on.");
  module.def("philox_normal", &philox_normal, py::arg("seed"), py::arg("user_ids"),
             py::arg("batch"), py::arg("dim"), py::arg("column"), py::arg("out"),
             py::arg("threads"), py::arg("isa") = "",
             "Write [batch, dim] float32 normals at the address `out`; see csrc/cpu/philox.h.");
  module.def("philox_instruction_sets", &contrec::cpu::philox_instruction_sets,
             "Values of `isa` that this processor has, best first.");
  module.def("cosine_topk", &cosine_topk, py::kw_only(), py::arg("queries"),
             py::arg("query_dtype"), py::arg("batch"), py::arg("vectors"), py::arg("vector_dtype"),
             py::arg("rows"), py::arg("dim"), py::arg("norms"), py::arg("scan"),
             py::arg("errors"), py::arg("groups"), py::arg("eligible"), py::arg("k"),
             py::arg("matched"), py::arg("matched_groups"), py::arg("pi"),
             py::arg("seen_offsets"), py::arg("seen_users"), py::arg("seen_ids"),
             py::arg("seen_rows"), py::arg("scores"), py::arg("ids"), py::arg("threads"),
             py::arg("isa"),
             "Write scores and ids at their addresses; see TopkArguments in csrc/cpu/topk.h.");
  module.def("topk_instruction_sets", &topk_instruction_sets,
             "Values of `isa` that this processor has, best first.");
  module.def("sampler_instruction_sets", &sampler_instruction_sets,
             "Values of `isa` below that this processor has, best first.");
  module.def("sample", &sample, py::kw_only(), py::arg("network"), py::arg("tensors"),
             py::arg("dim"), py::arg("hidden"), py::arg("depth"), py::arg("steps"),
             py::arg("noises"), py::arg("multistep"), py::arg("guidance"),
             py::arg("coefficients"), py::arg("batch"), py::arg("samples"), py::arg("condition"),
             py::arg("noise"), py::arg("noise_entries"), py::arg("seed"), py::arg("user_ids"),
             py::arg("round_noise"), py::arg("out"), py::arg("isa"), py::arg("threads"),
             "Write [samples, batch, dim] float32 at the address `out`; see csrc/cpu/sampler.h.");
  module.def("gather_instruction_sets", &gather_instruction_sets,
             "Values of `isa` below that this processor has, best first.");
  module.def("gather_tokens", &gather_tokens, py::kw_only(), py::arg("token_ids"), py::arg("rows"),
             py::arg("batch"), py::arg("length"), py::arg("words"), py::arg("tokens"),
             py::arg("text_table"), py::arg("text_stride"), py::arg("token_table"),
             py::arg("token_stride"), py::arg("width"), py::arg("element_bytes"), py::arg("out"),
             py::arg("batch_stride"), py::arg("position_stride"), py::arg("weight"),
             py::arg("bias"), py::arg("layers"), py::arg("inner"), py::arg("dtype"),
             py::arg("threads"), py::arg("isa"),
             "Write [batch, length, width] at the address `out`; see csrc/cpu/gather.h.");
  module.def("gather_tokens_backward", &gather_tokens_backward, py::kw_only(),
             py::arg("token_ids"), py::arg("rows"), py::arg("batch"), py::arg("length"),
             py::arg("words"), py::arg("tokens"), py::arg("gradient"), py::arg("batch_stride"),
             py::arg("position_stride"), py::arg("width"), py::arg("dtype"),
             py::arg("text_gradient"), py::arg("token_gradient"), py::arg("threads"),
             "Write the gradients of both tables at their addresses; see csrc/cpu/gather.h.");
  using namespace contrec::cpu;
  define_denoise_pass<Hidden, hidden>(module, "denoise_hidden");
  define_denoise_pass<Norm, norm>(module, "denoise_norm");
  define_denoise_pass<Residual, residual>(module, "denoise_residual");
  define_denoise_pass<SiluGradient, silu_gradient>(module, "denoise_silu_gradient");
  define_denoise_pass<SumByIndex, sum_by_index>(module, "denoise_sum_by_index");
}
