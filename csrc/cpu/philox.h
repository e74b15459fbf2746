// Counter-based normal noise (Philox4x32-10 and Box-Muller).
#pragma once

#include <cstdint>

namespace contrec::cpu {

// Standard normals of one sampler step: out[row * dim + element], float32, for batch rows of dim
// elements. Keyed by the seed, on the counter (element / 4, column, user id low, user id high);
// the column numbers the step and the draw. The same bits whatever the batch, the number of
// threads and the processor: only operations that IEEE 754 rounds correctly are used.
void philox_normal(std::uint64_t seed, const std::int64_t* user_ids, std::int64_t batch,
                   std::int64_t dim, std::uint32_t column, float* out, int threads);

// One row of the above.
void philox_row(std::uint64_t seed, std::int64_t user_id, std::uint32_t column, std::int64_t dim,
                float* out);

}  // namespace contrec::cpu
