// Counter-based normal noise (Philox4x32-10 and Box-Muller).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace contrec::cpu {

// Standard normals of one sampler step: out[row * dim + element], float32, for batch rows of dim
// elements. Keyed by the seed, on the counter (element / 4, column, user id low, user id high);
// the column numbers the step and the draw. The same bits whatever the batch, the number of
// threads and the processor: only operations that IEEE 754 rounds correctly are used. isa is one
// of philox_instruction_sets(), or empty for the best; throws std::invalid_argument for others.
void philox_normal(std::uint64_t seed, const std::int64_t* user_ids, std::int64_t batch,
                   std::int64_t dim, std::uint32_t column, float* out, int threads,
                   const std::string& isa = "");

// One row of the above.
void philox_row(std::uint64_t seed, std::int64_t user_id, std::uint32_t column, std::int64_t dim,
                float* out);

// The instruction sets that this processor has, best first.
std::vector<std::string> philox_instruction_sets();

constexpr int kPhiloxGroup = 16;     // counters worked on at once
constexpr int kPhiloxCounters = 64;  // of one call, at most

// Four normals for each of `count` counters, whole groups, from (first, column, user) on.
using PhiloxNormals = void(std::uint64_t seed, std::uint64_t user, std::uint32_t column,
                           std::uint32_t first, int count, float* out);

// Null if the compiler has no such instructions.
PhiloxNormals* philox_avx2();
PhiloxNormals* philox_avx512();

}  // namespace contrec::cpu
