#include "cpu/philox.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/features.h"

namespace contrec::cpu {
namespace {

constexpr std::int64_t kParallelFrom = 1 << 18;  // elements; fewer do not repay waking threads

using Lanes = std::uint64_t;

inline Lanes product(Lanes a, Lanes b) { return std::uint64_t(std::uint32_t(a)) * b; }

}  // namespace
}  // namespace contrec::cpu

#include "cpu/philox_normals.h"

namespace contrec::cpu {
namespace {

struct Version {
  const char* isa;
  PhiloxNormals* normals;
};

// What this processor can run, best first.
const std::vector<Version>& versions() {
  static const std::vector<Version> found = [] {
    std::vector<Version> list;
    if (features().avx512f && philox_avx512()) list.push_back({"avx512f", philox_avx512()});
    if (features().avx2 && philox_avx2()) list.push_back({"avx2", philox_avx2()});
    list.push_back({"portable", &normals});
    return list;
  }();
  return found;
}

void row_of(PhiloxNormals* normals_of, std::uint64_t seed, std::int64_t user_id,
            std::uint32_t column, std::int64_t dim, float* out) {
  alignas(64) float buffer[4 * kPhiloxCounters];
  for (std::int64_t start = 0; start < dim; start += 4 * kPhiloxCounters) {
    const int wanted = int(std::min<std::int64_t>(4 * kPhiloxCounters, dim - start));
    const int groups = (wanted + 4 * kPhiloxGroup - 1) / (4 * kPhiloxGroup);
    const bool whole = wanted == 4 * kPhiloxGroup * groups;
    normals_of(seed, std::uint64_t(user_id), column, std::uint32_t(start / 4),
               groups * kPhiloxGroup, whole ? out + start : buffer);
    if (!whole) std::memcpy(out + start, buffer, std::size_t(wanted) * sizeof(float));
  }
}

}  // namespace

std::vector<std::string> philox_instruction_sets() {
  std::vector<std::string> names;
  for (const Version& version : versions()) names.push_back(version.isa);
  return names;
}

void philox_row(std::uint64_t seed, std::int64_t user_id, std::uint32_t column, std::int64_t dim,
                float* out) {
  row_of(versions().front().normals, seed, user_id, column, dim, out);
}

void philox_normal(std::uint64_t seed, const std::int64_t* user_ids, std::int64_t batch,
                   std::int64_t dim, std::uint32_t column, float* out, int threads,
                   const std::string& isa) {
  PhiloxNormals* chosen = nullptr;
  for (const Version& version : versions()) {
    if (chosen == nullptr && (isa.empty() || isa == version.isa)) chosen = version.normals;
  }
  if (chosen == nullptr) {
    std::string names;
    for (const Version& version : versions()) names += std::string(version.isa) + ", ";
    throw std::invalid_argument("isa: expected one of " + names + "got " + isa);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * dim >= kParallelFrom)
  for (std::int64_t row = 0; row < batch; ++row) {
    row_of(chosen, seed, user_ids[row], column, dim, out + row * dim);
  }
}

}  // namespace contrec::cpu
