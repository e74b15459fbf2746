// The kernels of one instruction set; included once for each, after its vector type `Isa`:
//   Vec                     kLanes float32
//   QueryPair, ItemPair     two elements of kLanes queries, two elements of one item
//   kTileItems, kTileGroups items and groups of queries whose sums are in registers together

// Rare: some sums reached their thresholds.
__attribute__((noinline)) void offer_tile(const std::uint16_t* kept, const float* found, int groups,
                                          int first_group, std::int64_t first_item, void* sink,
                                          Offer offer) {
  for (int slot = 0; slot < Isa::kTileItems * groups; ++slot) {
    for (unsigned bits = kept[slot]; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      const int query = (first_group + slot % groups) * kLanes + lane;
      offer(sink, query, first_item + slot / groups, found[slot * kLanes + lane]);
    }
  }
}

template <int kGroups>
inline __attribute__((always_inline)) void scan_tile(const ScanQueries& queries,
                                                     const std::uint16_t* const* rows,
                                                     const float* bias,
                                                     const std::int64_t* named_row, int group,
                                                     std::int64_t first, void* sink, Offer offer) {
  constexpr int kItems = Isa::kTileItems;
  const std::int64_t steps = (queries.dim + 1) / 2, full = queries.dim / 2;
  typename Isa::Vec sums[kItems][kGroups];
#pragma GCC unroll 16
  for (int i = 0; i < kItems; ++i) {
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) sums[i][g] = Isa::fill(bias[i]);
  }
  for (std::int64_t step = 0; step < full; ++step) {
    typename Isa::QueryPair asked[kGroups];
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) {
      asked[g] = Isa::queries(queries.panels, (group + g) * steps + step);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kItems; ++i) {
      std::uint32_t pair;
      __builtin_memcpy(&pair, rows[i] + 2 * step, sizeof pair);
      const typename Isa::ItemPair item = Isa::item(pair);
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) sums[i][g] = Isa::add(sums[i][g], asked[g], item);
    }
  }
  if (full < steps) {
#pragma GCC unroll 16
    for (int i = 0; i < kItems; ++i) {
      const typename Isa::ItemPair item = Isa::item(rows[i][queries.dim - 1]);
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        sums[i][g] =
            Isa::add(sums[i][g], Isa::queries(queries.panels, (group + g) * steps + full), item);
      }
    }
  }
  std::uint16_t kept[kItems * kGroups];
  unsigned any = 0;
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    const typename Isa::Vec other = Isa::load(queries.other + (group + g) * kLanes);
    const typename Isa::Vec matching = Isa::load(queries.matching + (group + g) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kItems; ++i) {
      const unsigned named = queries.named[named_row[i] * queries.groups + group + g];
      const unsigned reached = Isa::reaches(sums[i][g], other, matching, named);
      kept[i * kGroups + g] = std::uint16_t(reached);
      any |= reached;
    }
  }
  if (__builtin_expect(any != 0, 0)) {
    alignas(64) float found[kItems * kGroups * kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kItems; ++i) {
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        Isa::store(found + (i * kGroups + g) * kLanes, sums[i][g]);
      }
    }
    offer_tile(kept, found, kGroups, group, first, sink, offer);
  }
}

template <int kGroups>
__attribute__((noinline)) void scan_groups(const ScanQueries& queries, const ScanItems& items,
                                           int group, void* sink, Offer offer) {
  constexpr int kItems = Isa::kTileItems;
  for (int start = 0; start < items.count; start += kItems) {
    const std::uint16_t* rows[kItems];
    float bias[kItems];
    std::int64_t named_row[kItems];
    for (int i = 0; i < kItems; ++i) {
      // Beyond the last item: the last again, which is never kept.
      const int item = start + i < items.count ? start + i : items.count - 1;
      rows[i] = items.rows + item * queries.dim;
      bias[i] = start + i < items.count ? items.bias[item] : -__builtin_inff();
      named_row[i] = items.named_row[item];
    }
    scan_tile<kGroups>(queries, rows, bias, named_row, group, items.first + start, sink, offer);
  }
}

void scan_panels(const ScanQueries& queries, const ScanItems& items, void* sink, Offer offer) {
  int group = 0;
  for (; group + Isa::kTileGroups <= queries.groups; group += Isa::kTileGroups) {
    scan_groups<Isa::kTileGroups>(queries, items, group, sink, offer);
  }
  for (; group < queries.groups; ++group) scan_groups<1>(queries, items, group, sink, offer);
}

void scan_rows(const ScanQueries& queries, const ScanItems& items, void* sink, Offer offer) {
  const std::int64_t dim = queries.dim, full = dim / kRowAlign * kRowAlign;
  const std::int64_t width = (dim + kRowAlign - 1) / kRowAlign * kRowAlign;
  for (int query = 0; query < queries.count; ++query) {
    const float other = queries.other[query], matching = queries.matching[query];
    const typename Isa::Vec least = Isa::fill(other < matching ? other : matching);
    for (int start = 0; start < items.count; start += kLanes) {
      typename Isa::Vec sums[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        // Beyond the last item: the last again, whose bias below is that of an item to leave out.
        const int item = start + i < items.count ? start + i : items.count - 1;
        const std::uint16_t* row = items.rows + item * dim;
        typename Isa::Vec sum = Isa::fill(0.0f), sum2 = sum;
        for (std::int64_t k = 0; k < full; k += kRowAlign) {
          Isa::add_row(sum, sum2, queries.rows, query * width + k, row + k);
        }
        if (full < dim) {
          std::uint16_t rest[kRowAlign] = {};
          __builtin_memcpy(rest, row + full, std::size_t(dim - full) * sizeof *rest);
          Isa::add_row(sum, sum2, queries.rows, query * width + full, rest);
        }
        sums[i] = Isa::plus(sum, sum2);
      }
      const typename Isa::Vec found = Isa::plus(Isa::totals(sums), Isa::load(items.bias + start));
      const unsigned reached = Isa::reaches(found, least, least, 0);
      if (__builtin_expect(reached != 0, 0)) {
        alignas(64) float values[kLanes];
        Isa::store(values, found);
        for (unsigned bits = reached; bits != 0; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          offer(sink, query, items.first + start + lane, values[lane]);
        }
      }
    }
  }
}
