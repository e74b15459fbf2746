#include "cpu/sampler.h"

#include <algorithm>
#include <memory>

#include "cpu/features.h"

namespace contrec::cpu {
namespace {

const Sampler* sampler_of(Instructions instructions) {
  const Features& found = features();
  switch (instructions) {
    case Instructions::kAVX512BF16:
      return found.avx512_bf16 && found.avx512bw ? sampler_avx512_bf16() : nullptr;
    case Instructions::kAVX512:
      return found.avx512f ? sampler_avx512() : nullptr;
    case Instructions::kAVX2:
      return found.avx2 && found.fma ? sampler_avx2() : nullptr;
    default:
      return sampler_portable();
  }
}

}  // namespace

bool has(Instructions instructions) { return sampler_of(instructions) != nullptr; }

void sample(const SamplerJob& job, Instructions instructions, int threads) {
  const Sampler& sampler = *sampler_of(instructions);
  const std::int64_t rows = job.samples * job.batch;
  // As many equal blocks as keep every thread busy to the end.
  const std::int64_t rounds = (rows + threads * kMaxRows - 1) / (threads * kMaxRows);
  const std::int64_t block = (rows + threads * rounds - 1) / (threads * rounds);
  const std::int64_t blocks = (rows + block - 1) / block;
  const std::int64_t line = 64, bytes = sampler.scratch_bytes(job, block);
  const int team = int(std::min<std::int64_t>(threads, blocks));
  const std::unique_ptr<char[]> memory(new char[std::size_t(team * bytes + line)]);
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory.get());
  char* scratch = memory.get() + (line - address % line) % line;
#pragma omp parallel for schedule(static) num_threads(team)
  for (int member = 0; member < team; ++member) {
    for (std::int64_t b = member; b < blocks; b += team) {
      const std::int64_t first = b * block;
      sampler.run(job, first, std::min(block, rows - first), scratch + member * bytes);
    }
  }
}

}  // namespace contrec::cpu
