// The chain of a block of rows, for one set of instructions: see sampler_product.h.
#pragma once

#include "cpu/sampler_product.h"

namespace contrec::cpu {
namespace {

// Places in a block of scratch memory, each a whole number of cache lines.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(Int count) {
    T* place = reinterpret_cast<T*>(start_ + used_);
    used_ += round_up(count * Int(sizeof(T)), 64);
    return place;
  }
  Int used() const { return used_; }

 private:
  char* start_;
  Int used_ = 0;
};

// Rows of operands are a cache line apart modulo 4096, lest they share the same sets of the cache.
inline Int operand_stride(Int width) {
  const Int line = 64 / Int(sizeof(Element));
  return round_up(round_up(width, kPanel), 8 * line) + line;
}

template <class Use>
inline void for_vectors(Int width, Use&& use) {
  for (Int i = 0; i < width; i += Vec::kWidth) use(i);
}

// The state of a block and what all networks share.
struct Chain {
  const SamplerJob& job;
  const Int first, rows, width, stride;  // width: D'
  float *x, *x0, *noise;                 // [rows, D']
  Element* operand[2];                   // [rows, stride]: x as a factor, now and after the step
  const float* c;                        // coefficients of the step
  bool noisy;                            // whether it adds noise

  Chain(const SamplerJob& job, Int first, Int rows, Arena& arena)
      : job(job), first(first), rows(rows), width(round_up(job.dim, kPanel)),
        stride(operand_stride(job.dim)) {
    x = arena.take<float>(rows * width);
    x0 = arena.take<float>(job.multistep ? rows * width : 0);
    noise = arena.take<float>(rows * width);
    for (auto& o : operand) o = arena.take<Element>(rows * stride);
  }

  Int user(Int row) const { return (first + row) % job.batch; }

  // Noise of an entry: 0 is x_T, i + 1 belongs to step i.
  void draw(Int entry) {
    for (Int row = 0; row < rows; ++row) {
      const Int sample = (first + row) / job.batch;
      float* place = noise + row * width;
      if (job.noise != nullptr) {
        const Int from = ((sample * job.noise_entries + entry) * job.batch + user(row)) * job.dim;
        __builtin_memcpy(place, job.noise + from, std::size_t(job.dim) * sizeof(float));
      } else {
        const std::uint32_t column = std::uint32_t(entry) + 65536u * std::uint32_t(sample);
        philox_row(job.seed, job.user_ids[user(row)], column, job.dim, place);
        if (job.round_noise) {
          for (Int i = 0; i < job.dim; ++i) place[i] = rounded_to_bf16(place[i]);
        }
      }
      for (Int i = job.dim; i < width; ++i) place[i] = 0.0f;
    }
  }

  // The users' conditions as operands, in the place of x.
  const Element* condition() {
    alignas(64) float padded[kPanel];
    for (Int row = 0; row < rows; ++row) {
      const float* from = job.condition + user(row) * job.dim;
      for (Int i = 0; i < width; i += kPanel) {
        for (Int j = 0; j < kPanel; ++j) padded[j] = i + j < job.dim ? from[i + j] : 0.0f;
        for_vectors(kPanel, [&](Int j) {
          store_elements(operand[0] + row * stride + i + j, Vec::load(padded + j));
        });
      }
    }
    return operand[0];
  }

  void start() {
    draw(0);
    for (Int row = 0; row < rows; ++row) {
      for_vectors(width, [&](Int i) {
        const Vec value = Vec::load(noise + row * width + i);
        value.store(x + row * width + i);
        if (job.multistep) Vec::set(0.0f).store(x0 + row * width + i);
        store_elements(operand[0] + row * stride + i, value);
      });
    }
  }

  void begin_step(Int step) {
    c = job.coefficients + 6 * step;
    noisy = step + 1 < job.noises;
    if (noisy) draw(step + 1);
  }

  // x after the step, given the network's output f for these columns of a row.
  void advance(Int row, Int column, Vec f) {
    const Int place = row * width + column;
    const Vec before = Vec::load(x + place);
    Vec after = fma(Vec::set(c[0]), f, Vec::set(c[1]) * before);
    if (job.multistep) {
      after = fma(Vec::set(c[3]), Vec::load(x0 + place), after);
      fma(Vec::set(c[4]), before, Vec::set(c[5]) * f).store(x0 + place);
    }
    if (noisy) after = fma(Vec::set(c[2]), Vec::load(noise + place), after);
    after.store(x + place);
    store_elements(operand[1] + row * stride + column, after);
  }

  void end_step() {
    Element* now = operand[0];
    operand[0] = operand[1];
    operand[1] = now;
  }

  void finish() const {
    for (Int row = 0; row < rows; ++row) {
      __builtin_memcpy(job.out + (first + row) * job.dim, x + row * width,
                       std::size_t(job.dim) * sizeof(float));
    }
  }
};

struct LinearChain : Chain {
  float* user_terms;  // [rows, D']

  LinearChain(const SamplerJob& job, Int first, Int rows, Arena& arena)
      : Chain(job, first, rows, arena), user_terms(arena.take<float>(rows * width)) {}

  void prepare() {
    const Vec scale = Vec::set(1.0f + job.guidance);
    product(condition(), stride, rows, job.linear.of_condition, job.dim, width,
            [&](Int row, Int i, Vec v) { (v * scale).store(user_terms + row * width + i); });
  }

  void step(Int step) {
    const float* time = job.linear.times + step * width;
    product(operand[0], stride, rows, job.linear.of_x, job.dim, width,
            [&](Int row, Int i, Vec v) {
              advance(row, i, v + Vec::load(time + i) + Vec::load(user_terms + row * width + i));
            });
  }
};

struct MLPChain : Chain {
  const Int hidden, hidden_stride;  // H'
  float* user_terms;                // [rows, H']
  Element* activations;             // [rows, hidden_stride]

  MLPChain(const SamplerJob& job, Int first, Int rows, Arena& arena)
      : Chain(job, first, rows, arena), hidden(round_up(job.hidden, kPanel)),
        hidden_stride(operand_stride(job.hidden)),
        user_terms(arena.take<float>(rows * hidden)),
        activations(arena.take<Element>(rows * hidden_stride)) {}

  void prepare() {
    product(condition(), stride, rows, job.mlp.of_condition, job.dim, hidden,
            [&](Int row, Int i, Vec v) { v.store(user_terms + row * hidden + i); });
  }

  void step(Int step) {
    const MLPTensors& t = job.mlp;
    const float* time = t.times + step * hidden;
    const bool guided = job.guidance != 0.0f;
    const Vec w = Vec::set(job.guidance), one_w = Vec::set(1.0f + job.guidance);
    product(operand[0], stride, rows, t.of_x, job.dim, hidden, [&](Int row, Int i, Vec v) {
      const Vec shared = v + Vec::load(time + i);
      Vec u = gelu(shared + Vec::load(user_terms + row * hidden + i));
      if (guided) u = one_w * u - w * gelu(shared + Vec::load(t.null + i));
      store_elements(activations + row * hidden_stride + i, u);
    });
    product(activations, hidden_stride, rows, t.output, job.hidden, width,
            [&](Int row, Int i, Vec v) { advance(row, i, v + Vec::load(t.output_bias + i)); });
  }
};

struct AdaLNChain : Chain {
  const Int hidden, hidden_stride, modulations;  // H', M'
  const bool separable, guided;
  const Int both, chunk;  // rows of both branches; steps whose modulations are made at once
  float *c_terms;         // [rows, H'] the condition's projection
  float* user_modulation;  // [chunk, rows, M'], or [rows, M'] when separable
  float* state;            // [both, H'] the residual stream, of the null branch after the other
  Element *inner, *expanded;  // [both, hidden_stride]; inner also for modulations

  AdaLNChain(const SamplerJob& job, Int first, Int rows, Arena& arena)
      : Chain(job, first, rows, arena), hidden(round_up(job.hidden, kPanel)),
        hidden_stride(operand_stride(job.hidden)), modulations((3 * job.depth + 2) * hidden),
        separable(job.network == Network::kSeparable), guided(job.guidance != 0.0f),
        both(guided ? 2 * rows : rows),
        chunk(separable ? 1 : smaller(2 * kMaxRows / rows, job.steps)) {
    c_terms = arena.take<float>(rows * hidden);
    // No less for fewer rows, whose chunks are longer: a smaller block fits the same memory.
    const Int modulated = separable ? rows : smaller(2 * kMaxRows, job.steps * rows);
    user_modulation = arena.take<float>(modulated * modulations);
    state = arena.take<float>(both * hidden);
    inner = arena.take<Element>((both > modulated ? both : modulated) * hidden_stride);
    expanded = arena.take<Element>(both * hidden_stride);
  }

  void prepare() {
    const AdaLNTensors& t = job.adaln;
    product(condition(), stride, rows, t.condition, job.dim, hidden, [&](Int row, Int i, Vec v) {
      (v + Vec::load(t.condition_bias + i)).store(c_terms + row * hidden + i);
    });
    if (separable) modulate(0, 1);
  }

  // Modulations of all users at `count` steps: bulk products, out of the chain.
  void modulate(Int step, Int count) {
    const AdaLNTensors& t = job.adaln;
    for (Int row = 0; row < count * rows; ++row) {
      const float* time = t.times + (step + row / rows) * hidden;
      for_vectors(hidden, [&](Int i) {
        Vec v = Vec::load(c_terms + row % rows * hidden + i);
        if (!separable) v = v + Vec::load(time + i);
        store_elements(inner + row * hidden_stride + i, silu(v));
      });
    }
    product(inner, hidden_stride, count * rows, t.modulation, job.hidden, modulations,
            [&](Int row, Int i, Vec v) {
              (v + Vec::load(t.modulation_bias + i)).store(user_modulation + row * modulations + i);
            });
  }

  // A row of the state, normalised; of columns i on.
  struct Normalised {
    const float* row;
    Vec mean, scale;  // 1 / sqrt(variance + 1e-6)
    Vec operator()(Int i) const { return (Vec::load(row + i) - mean) * scale; }
  };

  Normalised normalised(Int index) const {
    const float* row = state + index * hidden;
    const float count = float(job.hidden);
    Vec sum = Vec::set(0.0f);
    for_vectors(hidden, [&](Int i) { sum = sum + Vec::load(row + i); });
    const float average = sum.sum() / count;
    const Vec mean = Vec::set(average);
    const Int whole = job.hidden / Vec::kWidth * Vec::kWidth;
    Vec squares = Vec::set(0.0f);
    for_vectors(whole, [&](Int i) {
      const Vec v = Vec::load(row + i) - mean;
      squares = fma(v, v, squares);
    });
    float total = squares.sum();
    for (Int i = whole; i < job.hidden; ++i) total += (row[i] - average) * (row[i] - average);
    return {row, mean, Vec::set(1.0f / __builtin_sqrtf(total / count + 1e-6f))};
  }

  void step(Int step) {
    const AdaLNTensors& t = job.adaln;
    if (!separable && step % chunk == 0) modulate(step, smaller(chunk, job.steps - step));
    const Int entry = separable ? 0 : step % chunk * rows;
    const float* null = t.null_modulation + step * modulations;
    const float* time = separable ? t.time_modulation + step * modulations : nullptr;
    const Int matrix = hidden * round_up(job.hidden, 2);
    // Part `part` of a row's modulation, of the null branch for the second half of the rows.
    const auto modulation = [&](Int row, Int part, Int i) {
      const Int place = part * hidden + i;
      if (row >= rows) return Vec::load(null + place);
      const Vec of_user = Vec::load(user_modulation + (entry + row) * modulations + place);
      return separable ? of_user + Vec::load(time + place) : of_user;
    };
    const Vec one = Vec::set(1.0f);

    product(operand[0], stride, rows, t.input, job.dim, hidden, [&](Int row, Int i, Vec v) {
      v = v + Vec::load(t.input_bias + i);
      v.store(state + row * hidden + i);
      if (guided) v.store(state + (rows + row) * hidden + i);
    });
    for (Int block = 0; block < job.depth; ++block) {
      const float* weight = t.norm + 2 * block * hidden;
      const float* bias = weight + hidden;
      for (Int row = 0; row < both; ++row) {
        const Normalised norm = normalised(row);
        for_vectors(hidden, [&](Int i) {
          Vec v = fma(norm(i), Vec::load(weight + i), Vec::load(bias + i));
          v = fma(v, one + modulation(row, 3 * block + 1, i), modulation(row, 3 * block, i));
          store_elements(inner + row * hidden_stride + i, v);
        });
      }
      const float* expand_bias = t.expand_bias + block * hidden;
      product(inner, hidden_stride, both, static_cast<const Element*>(t.expand) + block * matrix,
              job.hidden, hidden, [&](Int row, Int i, Vec v) {
                v = silu(v + Vec::load(expand_bias + i));
                store_elements(expanded + row * hidden_stride + i, v);
              });
      const float* contract_bias = t.contract_bias + block * hidden;
      product(expanded, hidden_stride, both,
              static_cast<const Element*>(t.contract) + block * matrix, job.hidden, hidden,
              [&](Int row, Int i, Vec v) {
                float* place = state + row * hidden + i;
                v = v + Vec::load(contract_bias + i);
                fma(modulation(row, 3 * block + 2, i), v, Vec::load(place)).store(place);
              });
    }
    // The output layer: one product for both branches.
    const Int part = 3 * job.depth;
    const Vec w = Vec::set(job.guidance), one_w = Vec::set(1.0f + job.guidance);
    for (Int row = 0; row < rows; ++row) {
      const Normalised norm = normalised(row), null_norm = guided ? normalised(rows + row) : norm;
      for_vectors(hidden, [&](Int i) {
        Vec u = fma(norm(i), one + modulation(row, part + 1, i), modulation(row, part, i));
        if (guided) {
          const Vec shift = Vec::load(null + part * hidden + i);
          const Vec scale = Vec::load(null + (part + 1) * hidden + i);
          u = one_w * u - w * fma(null_norm(i), one + scale, shift);
        }
        store_elements(inner + row * hidden_stride + i, u);
      });
    }
    product(inner, hidden_stride, rows, t.output, job.hidden, width,
            [&](Int row, Int i, Vec v) { advance(row, i, v + Vec::load(t.output_bias + i)); });
  }
};

template <class Network>
Int bytes_of(const SamplerJob& job, Int rows) {
  Arena arena(nullptr);
  Network(job, 0, rows, arena);
  return arena.used();
}

template <class Network>
void run_chain(const SamplerJob& job, Int first, Int rows, void* scratch) {
  Arena arena(scratch);
  Network chain(job, first, rows, arena);
  chain.prepare();
  chain.start();
  for (Int step = 0; step < job.steps; ++step) {
    chain.begin_step(step);
    chain.step(step);
    chain.end_step();
  }
  chain.finish();
}

Int scratch_bytes(const SamplerJob& job, Int rows) {
  if (job.network == Network::kLinear) return bytes_of<LinearChain>(job, rows);
  if (job.network == Network::kMLP) return bytes_of<MLPChain>(job, rows);
  return bytes_of<AdaLNChain>(job, rows);
}

void run(const SamplerJob& job, Int first, Int rows, void* scratch) {
  if (job.network == Network::kLinear) return run_chain<LinearChain>(job, first, rows, scratch);
  if (job.network == Network::kMLP) return run_chain<MLPChain>(job, first, rows, scratch);
  run_chain<AdaLNChain>(job, first, rows, scratch);
}

constexpr Sampler kSampler = {&scratch_bytes, &run};

}  // namespace
}  // namespace contrec::cpu
