// What cosine_topk knows of a block of queries, and the items it keeps for them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/topk.h"
#include "cpu/topk_scan.h"

namespace contrec::cpu {

// Some consecutive queries, in float64 and packed for the scan; shared by all threads.
class QueryBlock {
 public:
  QueryBlock(const TopkArguments& arguments, std::int64_t first, int count, bool paired,
             bool by_rows);

  // The score as specified, rounded to float32. work: [padded(dim)].
  float exact(int query, std::int64_t item, double* work) const;
  // Announces that `exact` will read an item.
  void prefetch(std::int64_t item) const;
  // 1 + pi where the item's group is named by the query's text, else 1.
  double factor(int query, std::int64_t item) const;
  bool seen(int query, std::int64_t item) const;
  // Row of `named` for an item.
  std::int64_t named_row(std::int64_t item) const {
    return bonus_ ? std::int64_t(arguments.groups[item]) + 1 : 0;
  }
  // How far a query's bound may be from the product of the scan, beside the item's own error.
  double error(int query) const { return errors_[std::size_t(query)]; }
  double largest_factor() const { return bonus_ ? 1.0 + arguments.pi : 1.0; }
  // Not scanned: a zero query scores 0 with every item; one of infinite norm has no list.
  bool scanned(int query) const { return !zero(query) && !empty(query); }
  bool zero(int query) const { return kinds_[std::size_t(query)] == Kind::kZero; }
  bool empty(int query) const { return kinds_[std::size_t(query)] == Kind::kEmpty; }

  // A score that a query's k-th best one certainly reaches.
  float floor(int query) const { return floors_[query].load(std::memory_order_relaxed); }
  void raise_floor(int query, float value);

  // Without the thresholds, which every thread has its own of.
  ScanQueries packed() const;

  const TopkArguments& arguments;
  const std::int64_t first;
  const int count, groups;

 private:
  enum class Kind : char { kScanned, kZero, kEmpty };
  void prepare(int query, std::vector<double>& work);
  void pack(int query, const std::vector<std::uint16_t>& scan);
  void name_groups();

  const std::int64_t size_;  // padded(dim)
  const bool paired_, by_rows_, bonus_;
  std::vector<double> wide_, norms_, errors_;
  std::vector<Kind> kinds_;
  std::vector<std::uint16_t> named_;
  std::vector<std::uint16_t> pairs_;  // what the scan reads: bfloat16 or float32
  std::vector<float> floats_;
  std::unique_ptr<std::atomic<float>[]> floors_;
};

// The items one thread keeps for a block of queries: a bounded number for each.
//
// An item is dropped when its bound is below the query's floor, or when k items whose exact
// scores are known come before it. So no dropped item belongs to a list.
class Candidates {
 public:
  struct Entry {
    float upper, lower;  // bounds of the rounded score; equal once it is known
    std::int64_t item;
  };

  // Entries held for a query.
  static std::int64_t capacity(const TopkArguments& arguments);

  explicit Candidates(QueryBlock& block);

  // `found`: bias (the item's error) + product of the scan. For ScanKernel.
  void offer(int query, std::int64_t item, float found);
  // Take over the floors that other threads have raised.
  void refresh();
  const Entry* begin(int query) const { return &entries_[query * capacity_]; }
  const Entry* end(int query) const { return begin(query) + sizes_[std::size_t(query)]; }
  ScanQueries queries() const;

  TopkStatistics statistics;

 private:
  void thin(int query);
  void set_floor(int query, float floor);

  QueryBlock& block_;
  const std::int64_t capacity_;
  std::unique_ptr<Entry[]> entries_;
  std::vector<std::int64_t> sizes_;
  std::vector<float> floors_, matching_, other_, lowers_;
  std::vector<double> work_;
};

// Replace the bounds of entries by their scores. Returns how many had none. work: [padded(dim)].
std::int64_t settle(const QueryBlock& block, int query, Candidates::Entry* begin,
                    Candidates::Entry* end, double* work);

// Orders exact entries as lists are: by score descending, then id ascending.
inline bool comes_before(const Candidates::Entry& a, const Candidates::Entry& b) {
  return a.lower > b.lower || (a.lower == b.lower && a.item < b.item);
}

}  // namespace contrec::cpu
