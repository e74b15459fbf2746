#include "cpu/topk_candidates.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/topk_exact.h"

namespace contrec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float below(double value) {
  return std::max(std::nextafter(float(value), -kInfinity), -FLT_MAX);
}

float above(double value) { return std::nextafter(float(value), kInfinity); }

std::uint16_t to_bfloat16(float value) {  // nearest, ties to even; value is finite
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

QueryBlock::QueryBlock(const TopkArguments& arguments, std::int64_t first, int count, bool paired,
                       bool by_rows)
    : arguments(arguments),
      first(first),
      count(count),
      groups((count + kLanes - 1) / kLanes),
      size_(padded(arguments.dim)),
      paired_(paired),
      by_rows_(by_rows),
      bonus_(arguments.matched != nullptr && arguments.pi > 0),
      wide_(std::size_t(count * size_)),
      norms_(std::size_t(count)),
      errors_(std::size_t(count)),
      kinds_(std::size_t(count), Kind::kScanned),
      floors_(new std::atomic<float>[std::size_t(count)]) {
  const std::int64_t dim = arguments.dim;
  const std::int64_t packed = by_rows ? count * ((dim + kRowAlign - 1) / kRowAlign * kRowAlign)
                                      : groups * ((dim + 1) / 2 * 2 * kLanes);
  if (paired) {
    pairs_.resize(std::size_t(packed));
  } else {
    floats_.resize(std::size_t(packed));
  }
  std::vector<double> work(static_cast<std::size_t>(size_));
  for (int query = 0; query < count; ++query) {
    floors_[std::size_t(query)].store(-kInfinity, std::memory_order_relaxed);
    prepare(query, work);
  }
  name_groups();
}

void QueryBlock::prepare(int query, std::vector<double>& work) {
  const std::int64_t dim = arguments.dim;
  double* wide = &wide_[std::size_t(query * size_)];
  widen(arguments.queries, arguments.query_dtype, first + query, dim, wide);
  const double norm = std::sqrt(fixed_order_dot(wide, wide, size_, work.data()));
  norms_[std::size_t(query)] = norm;
  if (!(norm < std::numeric_limits<double>::infinity())) {
    kinds_[std::size_t(query)] = Kind::kEmpty;
  } else if (std::all_of(wide, wide + dim, [](double x) { return x == 0; })) {
    kinds_[std::size_t(query)] = Kind::kZero;
  }
  std::vector<std::uint16_t> scan(static_cast<std::size_t>(dim), std::uint16_t(0));
  double& error = errors_[std::size_t(query)];
  // As scan_of in contrec_fast/ops/catalog.py: elsewhere float64 itself may be inexact.
  if (norm > 0x1p-400 && norm < 0x1p400) {
    double squares = 0;
    for (std::int64_t i = 0; i < dim; ++i) {
      const double unit = wide[i] / norm;
      scan[std::size_t(i)] = to_bfloat16(float(unit));
      const double off = unit - double(from_bfloat16(scan[std::size_t(i)]));
      squares += off * off;
    }
    const double own = std::sqrt(squares) * (1 + 0x1p-20) + 0x1p-40;
    // A scan row's norm is at most 1 + 2^-8. The rest: float32 sums in any order, of terms that
    // add up to about 1, and every rounding of a bound or a score to float32.
    error = own * (1 + 0x1p-7) + double(2 * dim + 64) * 0x1p-23;
  } else {
    error = kInfinity;
  }
  pack(query, scan);
}

void QueryBlock::pack(int query, const std::vector<std::uint16_t>& scan) {
  const std::int64_t dim = arguments.dim;
  const std::int64_t steps = (dim + 1) / 2;
  const std::int64_t width = (dim + kRowAlign - 1) / kRowAlign * kRowAlign;
  const std::int64_t group = query / kLanes, lane = query % kLanes;
  for (std::int64_t i = 0; i < dim; ++i) {
    const std::uint16_t value = scan[std::size_t(i)];
    const std::int64_t pair = group * steps + i / 2;
    if (by_rows_ && paired_) {
      pairs_[std::size_t(query * width + i)] = value;
    } else if (by_rows_) {
      floats_[std::size_t(query * width + i)] = from_bfloat16(value);
    } else if (paired_) {
      pairs_[std::size_t((pair * kLanes + lane) * 2 + i % 2)] = value;
    } else {
      floats_[std::size_t((pair * 2 + i % 2) * kLanes + lane)] = from_bfloat16(value);
    }
  }
}

void QueryBlock::name_groups() {
  const std::int64_t number = bonus_ ? arguments.matched_groups : 0;
  named_.assign(std::size_t((number + 1) * groups), 0);  // row 0: items of group -1
  for (int query = 0; query < count && number > 0; ++query) {
    const bool* matched = arguments.matched + (first + query) * number;
    const std::uint16_t bit = std::uint16_t(1 << query % kLanes);
    const bool* next = matched;
    while ((next = static_cast<const bool*>(
                std::memchr(next, 1, std::size_t(matched + number - next)))) != nullptr) {
      named_[std::size_t((next - matched + 1) * groups + query / kLanes)] |= bit;
      ++next;
    }
  }
}

float QueryBlock::exact(int query, std::int64_t item, double* work) const {
  widen(arguments.vectors, arguments.vector_dtype, item, arguments.dim, work);
  const double* wide = &wide_[std::size_t(query * size_)];
  double scale = norms_[std::size_t(query)] * arguments.norms[item];
  if (scale == 0) scale = 1;  // a zero query scores 0, not 0 / 0
  double score = fixed_order_dot(wide, work, size_, work) / scale;
  if (bonus_) score *= factor(query, item);
  return float(score);
}

void QueryBlock::prefetch(std::int64_t item) const {
  const std::int64_t bytes = arguments.dim * width_of(arguments.vector_dtype);
  const char* row = static_cast<const char*>(arguments.vectors) + item * bytes;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

double QueryBlock::factor(int query, std::int64_t item) const {
  const unsigned bits = named_[std::size_t(named_row(item) * groups + query / kLanes)];
  return (bits >> query % kLanes & 1) != 0 ? 1.0 + arguments.pi : 1.0;
}

bool QueryBlock::seen(int query, std::int64_t item) const {
  if (arguments.seen_rows == nullptr) return false;
  const std::int64_t user = arguments.seen_rows[first + query];
  if (user < 0) return false;
  return std::binary_search(arguments.seen_ids + arguments.seen_offsets[user],
                            arguments.seen_ids + arguments.seen_offsets[user + 1], item);
}

void QueryBlock::raise_floor(int query, float value) {
  std::atomic<float>& floor = floors_[std::size_t(query)];
  float current = floor.load(std::memory_order_relaxed);
  while (current < value &&
         !floor.compare_exchange_weak(current, value, std::memory_order_relaxed)) {
  }
}

ScanQueries QueryBlock::packed() const {
  const void* data = paired_ ? static_cast<const void*>(pairs_.data()) : floats_.data();
  return {arguments.dim, count, groups, data, data, nullptr, nullptr, named_.data()};
}

std::int64_t Candidates::capacity(const TopkArguments& arguments) {
  return std::min(2 * arguments.k + 64, arguments.rows + 1);
}

Candidates::Candidates(QueryBlock& block)
    : block_(block),
      capacity_(capacity(block.arguments)),
      entries_(new Entry[std::size_t(block.count * capacity_)]),
      sizes_(std::size_t(block.count)),
      floors_(std::size_t(block.count), -kInfinity),
      matching_(std::size_t(block.groups * kLanes), std::nanf("")),
      other_(matching_),
      lowers_(std::size_t(capacity_)),
      work_(std::size_t(padded(block.arguments.dim))) {
  for (int query = 0; query < block.count; ++query) {
    if (block.scanned(query)) set_floor(query, -kInfinity);
  }
}

ScanQueries Candidates::queries() const {
  ScanQueries result = block_.packed();
  result.matching = matching_.data();
  result.other = other_.data();
  return result;
}

// An item reaches the floor only if product + bias >= floor / factor - error: a bound is
// multiplied by the factor, which raises it or, where it is negative, lowers it.
void Candidates::set_floor(int query, float floor) {
  const auto at = std::size_t(query);
  floors_[at] = floor;
  const double error = block_.error(query);
  const bool blind = !(error < kInfinity);
  other_[at] = blind ? -FLT_MAX : below(double(floor) - error);
  matching_[at] = blind ? -FLT_MAX : below(double(floor) / block_.largest_factor() - error);
}

void Candidates::refresh() {
  for (int query = 0; query < block_.count; ++query) {
    const float floor = block_.floor(query);
    if (floor > floors_[std::size_t(query)]) set_floor(query, floor);
  }
}

void Candidates::offer(int query, std::int64_t item, float found) {
  const double factor = block_.factor(query, item), error = block_.error(query);
  const float upper = above(factor * (double(found) + error));
  if (upper < floors_[std::size_t(query)] || block_.seen(query, item)) return;
  const double own = block_.arguments.errors[item];
  const bool blind = !(error < kInfinity && own < kInfinity);
  const float lower =
      blind ? -kInfinity : below(factor * (double(found) - 2 * own - error));
  std::int64_t& size = sizes_[std::size_t(query)];
  entries_[std::size_t(query * capacity_ + size)] = {upper, lower, item};
  ++statistics.kept;
  if (++size == capacity_) thin(query);
}

void Candidates::thin(int query) {
  const std::int64_t k = block_.arguments.k;
  Entry* const from = &entries_[std::size_t(query * capacity_)];
  Entry* to = from + capacity_;
  const auto raise = [&](float floor) {
    block_.raise_floor(query, floor);
    set_floor(query, std::max(floors_[std::size_t(query)], block_.floor(query)));
  };
  if (k < capacity_) {
    for (std::int64_t i = 0; i < capacity_; ++i) lowers_[std::size_t(i)] = from[i].lower;
    const auto kth = lowers_.begin() + (k - 1);
    std::nth_element(lowers_.begin(), kth, lowers_.end(), std::greater<float>());
    raise(*kth);
    const float floor = floors_[std::size_t(query)];
    to = std::remove_if(from, to, [floor](const Entry& entry) { return entry.upper < floor; });
    if (to - from > k + (capacity_ - k) / 2) {
      // Too many bounds overlap: settle them.
      ++statistics.crowded;
      statistics.rescored += settle(block_, query, from, to, work_.data());
      std::nth_element(from, from + (k - 1), to, comes_before);
      to = from + k;
      raise(from[k - 1].lower);
    }
  }
  sizes_[std::size_t(query)] = to - from;
}

std::int64_t settle(const QueryBlock& block, int query, Candidates::Entry* begin,
                    Candidates::Entry* end, double* work) {
  constexpr std::ptrdiff_t kAhead = 2;
  std::int64_t settled = 0;
  for (Candidates::Entry* entry = begin; entry != end; ++entry) {
    if (end - entry > kAhead) block.prefetch(entry[kAhead].item);
    if (entry->lower == entry->upper) continue;
    const float score = block.exact(query, entry->item, work);
    entry->lower = entry->upper = std::isnan(score) ? kInfinity : score;
    ++settled;
  }
  return settled;
}

}  // namespace contrec::cpu
