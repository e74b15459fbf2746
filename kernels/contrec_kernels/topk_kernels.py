"""Kernels of the certified top-K: `contrec_kernels.topk` says how they work together.

Shapes: B queries, N items, D dimensions, G groups, C slots for candidates of a query. Flags of one
byte are uint8. Offsets that can exceed 2^31 elements are formed in int64.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every bound but minus infinity
SMALL, LARGE = tl.constexpr(2.0**-400), tl.constexpr(2.0**400)  # norms that float64 can square
NO_KEY = tl.constexpr(-(2**63))  # the key of a candidate not to return
SIGN = tl.constexpr(-(2**31))


@triton.jit
def halving_sum(terms, LEVELS: tl.constexpr):
    """[R, 2^LEVELS] to [R]: the upper half is added to the lower half until one term is left.

    A sum of two terms has one possible rounding, so this order is kept whatever the layout.
    """
    for _ in tl.static_range(LEVELS):
        halves = tl.reshape(terms, (terms.shape[0], 2, terms.shape[1] // 2))
        terms = tl.sum(halves, axis=1)
    return tl.reshape(terms, (terms.shape[0],))


@triton.jit
def prepare_queries(
    queries, unit, norms, errors, counts, slack, D: tl.constexpr, LEVELS: tl.constexpr
):
    """Norms, unit vectors in bfloat16 and their errors; one program a query.

    Writes unit [B, D], norms [B] float64, errors [B] float32 (|query / norm - unit row| and
    everything else by which a float32 product of unit rows can be off, `slack`) and zeros to
    counts [B]. Where the norm is neither 0 nor between SMALL and LARGE, the unit row is zero and
    the error 2, more than any cosine.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, 1 << LEVELS)[None, :]
    inside = columns < D
    query = tl.load(queries + row * D + columns, mask=inside, other=0.0).to(tl.float64)
    norm = tl.sqrt(halving_sum(query * query, LEVELS))
    usable = (norm > SMALL) & (norm < LARGE)
    scaled = query / tl.where(usable, norm, 1.0)[:, None]
    rounded = tl.where(usable[:, None], scaled, 0.0).to(tl.float32).to(tl.bfloat16)
    off = scaled - rounded.to(tl.float64)
    error = tl.sqrt(halving_sum(off * off, LEVELS)).to(tl.float32)
    # 2^-8: products meet scan rows that may be this much longer than 1. 2^-20: this line itself.
    error = error * (1 + 0.00390625 + 0.00000095367431640625) + slack
    only = row + tl.arange(0, 1)
    tl.store(unit + row * D + columns, rounded, mask=inside)
    tl.store(norms + only, norm)
    tl.store(errors + only, tl.where(usable | (norm == 0), error, 2.0))
    tl.store(counts + only, tl.zeros((1,), tl.int32))


@triton.jit
def load_rows(table, rows, start, D: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """[rows, DEPTH] of a table [any, D] of unit vectors, from dimension `start`."""
    depth = start + tl.arange(0, DEPTH)[None, :]
    pointers = table + rows.to(tl.int64)[:, None] * D + depth
    values = tl.load(pointers) if D % DEPTH == 0 else tl.load(pointers, mask=depth < D, other=0.0)
    return values.to(tl.float32) if WIDEN else values


@triton.jit
def products(
    unit, held, scan, rows, items, D: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr
):
    """[rows, items] float32 inner products; `held` is the queries' tile where DEPTH covers D."""
    sums = tl.zeros((rows.shape[0], items.shape[0]), tl.float32)
    if DEPTH >= D:
        sums = tl.dot(held, load_rows(scan, items, 0, D, DEPTH, WIDEN).T, sums)
    else:
        for start in range(0, D, DEPTH):
            asked = load_rows(unit, rows, start, D, DEPTH, WIDEN)
            sums = tl.dot(asked, load_rows(scan, items, start, D, DEPTH, WIDEN).T, sums)
    return sums


@triton.jit
def item_errors(errors, eligible, items, N):
    """[items] float32: what to add for an upper bound; minus infinity for items not to return."""
    inside = items < N
    usable = tl.load(eligible + items, mask=inside, other=0) != 0
    return tl.where(usable, tl.load(errors + items, mask=inside, other=0.0), -float("inf"))


@triton.jit
def sample_maxima(
    unit, scan, groups, eligible, matched, bonus, maxima,
    B, N, samples, blocks, G, row_tiles,
    D: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, BONUS: tl.constexpr,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The largest score, about, in each block of BLOCK sampled items.

    The sample is every STRIDE-th item. Writes maxima [B, blocks] float32. A program keeps one tile
    of queries and strides over the tiles of items.
    """
    row_tile = tl.program_id(0) % row_tiles
    first, step = tl.program_id(0) // row_tiles, tl.num_programs(0) // row_tiles
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(rows, B - 1)
    held = load_rows(unit, real, 0, D, DEPTH, WIDEN) if DEPTH >= D else 0
    for tile in range(first, tl.cdiv(samples, ITEMS), step):
        items = (tile * ITEMS + tl.arange(0, ITEMS)) * STRIDE
        some = tl.minimum(items, N - 1)
        scores = products(unit, held, scan, real, some, D, DEPTH, WIDEN)
        if BONUS:
            group = tl.load(groups + some)[None, :]
            places = real.to(tl.int64)[:, None] * G + group
            agrees = tl.load(matched + places, mask=group >= 0, other=0) != 0
            scores = tl.where(agrees, scores * bonus, scores)
        usable = tl.load(eligible + items, mask=items < N, other=0) != 0
        scores = tl.where(usable[None, :], scores, -float("inf"))
        best = tl.max(tl.reshape(scores, (ROWS, ITEMS // BLOCK, BLOCK)), axis=2)
        block = tile * (ITEMS // BLOCK) + tl.arange(0, ITEMS // BLOCK)
        inside = (rows < B)[:, None] & (block < blocks)[None, :]
        tl.store(maxima + rows.to(tl.int64)[:, None] * blocks + block[None, :], best, mask=inside)


@triton.jit
def drop_seen(
    maxima, starts, lengths, seen_ids, base, N, blocks, SPAN: tl.constexpr, STRIDE: tl.constexpr
):
    """Sampled blocks that hold a seen item count for nothing; one program a query.

    SPAN: items that a block stands for, STRIDE of them for each one sampled.
    """
    row = tl.program_id(0).to(tl.int64)
    start, length = tl.load(starts + row), tl.load(lengths + row)
    for at in range(0, length, 256):
        place = at + tl.arange(0, 256)
        item = tl.load(seen_ids + start + place, mask=place < length, other=-1).to(tl.int64) - base
        sampled = (place < length) & (item >= 0) & (item < N) & (item % STRIDE == 0)
        tl.store(maxima + row * blocks + item // SPAN, -float("inf"), mask=sampled)


@triton.jit
def mark_candidates(
    unit, query_errors, thresholds, scan, errors, eligible, bonus, marks, matching_marks,
    B, begin, end, words, row_tiles,
    D: tl.constexpr, BONUS: tl.constexpr,
    ROWS: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A bit for each of the items from `begin` to `end`: does its upper bound reach the threshold?

    Writes marks [B, words] int32, 32 items a word, and matching_marks for the case that the
    query matches the item's group, which `collect` looks up where it matters.
    """
    row_tile = tl.program_id(0) % row_tiles
    first, step = tl.program_id(0) // row_tiles, tl.num_programs(0) // row_tiles
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(rows, B - 1)
    held = load_rows(unit, real, 0, D, DEPTH, WIDEN) if DEPTH >= D else 0
    query_error = tl.load(query_errors + real)
    threshold = tl.load(thresholds + real)
    least = tl.maximum(threshold - query_error, LOWEST)[:, None]
    least_matching = tl.maximum(threshold / bonus - query_error, LOWEST)[:, None]
    for tile in range(first, tl.cdiv(end - begin, ITEMS), step):
        items = begin + tile * ITEMS + tl.arange(0, ITEMS)
        bounds = products(unit, held, scan, real, tl.minimum(items, end - 1), D, DEPTH, WIDEN)
        bounds += item_errors(errors, eligible, items, end)[None, :]
        word = tile * (ITEMS // 32) + tl.arange(0, ITEMS // 32)
        places = rows.to(tl.int64)[:, None] * words + word[None, :]
        inside = (rows < B)[:, None] & (word < words)[None, :]
        tl.store(marks + places, packed(bounds >= least), mask=inside)
        if BONUS:
            tl.store(matching_marks + places, packed(bounds >= least_matching), mask=inside)


@triton.jit
def packed(flags):
    """[rows, items] bool to [rows, items / 32] int32."""
    bits = tl.reshape(flags.to(tl.int32), (flags.shape[0], flags.shape[1] // 32, 32))
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def collect(
    marks, matching_marks, matched, groups, counts, found,
    begin, words, capacity, G, BONUS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Marked items, in any order; programs (query, SEGMENT words).

    counts [B] int32 counts them all; found [B, C] int32 takes as many as fit.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    plain = tl.load(marks + row * words + place, mask=place < words, other=0)
    matching = plain
    if BONUS:
        matching = tl.load(matching_marks + row * words + place, mask=place < words, other=0)
    left = plain | matching
    counters = counts + row + place * 0
    while tl.max((left != 0).to(tl.int32), axis=0) != 0:
        lowest = left & -left
        # The bit's number is the exponent of its value.
        power = lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        item = begin + place * 32 + ((power >> 23) - 127)
        keep = left != 0
        if BONUS:
            group = tl.load(groups + item, mask=keep, other=-1)
            agrees = tl.load(matched + row * G + group, mask=group >= 0, other=0) != 0
            keep &= (tl.where(agrees, matching, plain) & lowest) != 0
        slot = tl.atomic_add(counters, 1, mask=keep, sem="relaxed")
        tl.store(found + row * capacity + slot, item, mask=keep & (slot < capacity))
        left ^= lowest


@triton.jit
def rescore(
    queries, query_norms, vectors, norms, groups, eligible, matched, bonus, found, places, counts,
    starts, lengths, seen_ids, keys, base, capacity, row_stride, G,
    D: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
    BONUS: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """Exact scores of candidates as sortable keys; PARTS programs a query.

    found holds item ids, places the rows of `vectors` and `norms` that belong to them, both
    [B or 1, C] with row_stride elements from query to query. bonus: float64 scalar in memory.
    Writes keys [B, C] int64, larger for higher scores and, among equals, for lower ids: the
    score's bits in an order-preserving form, 31 bits of the complement of the id, and whether a
    zero was negative.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, 1 << LEVELS)[None, :]
    inside = columns < D
    query = tl.load(queries + row * D + columns, mask=inside, other=0.0).to(tl.float64)
    query_norm = tl.load(query_norms + row)
    count = tl.minimum(tl.load(counts + row), capacity)
    for at in range(tl.program_id(1) * CHUNK, count, PARTS * CHUNK):
        slot = at + tl.arange(0, CHUNK)
        real = slot < count
        item = tl.load(found + row * row_stride + slot, mask=real, other=0)
        place = tl.load(places + row * row_stride + slot, mask=real, other=0)
        pointers = vectors + place.to(tl.int64)[:, None] * D + columns
        terms = tl.load(pointers, mask=real[:, None] & inside, other=0.0).to(tl.float64)
        dot = halving_sum(terms * query, LEVELS)
        scale = query_norm * tl.load(norms + place)
        score = dot / tl.where(scale == 0, 1.0, scale)
        if BONUS:
            group = tl.load(groups + item)
            agrees = tl.load(matched + row * G + group, mask=group >= 0, other=0) != 0
            score = tl.where(agrees, score * tl.load(bonus), score)
        finite = tl.broadcast_to(query_norm, (CHUNK,)) < float("inf")
        usable = real & finite & (tl.load(eligible + item) != 0)
        if SEEN:
            start, size = tl.load(starts + row), tl.load(lengths + row)
            wanted = item.to(tl.int64) + base
            below = tl.zeros((CHUNK,), tl.int64)  # ids known to be smaller
            length = size
            while size > 0:
                half = size // 2
                middle = tl.load(seen_ids + start + below + half).to(tl.int64)
                below = tl.where(middle < wanted, below + size - half, below)
                size = half
            there = below < length
            usable &= ~(there & (tl.load(seen_ids + start + below, mask=there, other=-1) == wanted))
        rounded = score.to(tl.float32)
        bits = rounded.to(tl.int32, bitcast=True)
        negative_zero = bits == SIGN
        ordered = tl.where(negative_zero, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        last = ((0x7FFFFFFF - item).to(tl.int64) << 1) | negative_zero.to(tl.int64)
        key = (ordered << 32) | last
        tl.store(keys + row * capacity + slot, tl.where(usable, key, NO_KEY), mask=real)


@triton.jit
def finish(
    best, counts, query_norms, thresholds, floors, scores, ids, certified,
    base, k, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorted keys [B, k] to scores, ids and the certificate; programs (query, block of k).

    A list is certified when all candidates fitted and its last score reaches the threshold below
    which nothing was emitted, or that threshold was no higher than the floor below which the
    caller wants nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(best + row * k + place, mask=place < k, other=NO_KEY)
    none = key == NO_KEY
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    bits = tl.where((key & 1) != 0, SIGN, bits)
    score = tl.where(none, -float("inf"), bits.to(tl.float32, bitcast=True))
    item = tl.where(none, -1, 0x7FFFFFFF - ((key >> 1) & 0x7FFFFFFF) + base)
    tl.store(scores + row * k + place, score, mask=place < k)
    tl.store(ids + row * k + place, item, mask=place < k)
    rows = row + tl.zeros((BLOCK,), tl.int64)
    threshold = tl.load(thresholds + rows)
    enough = (score >= threshold) | (threshold <= tl.load(floors + rows))
    certain = enough & (tl.load(counts + rows) <= capacity)
    certain |= ~(tl.load(query_norms + rows) < float("inf"))  # its list is empty
    tl.store(certified + rows, certain.to(tl.uint8), mask=place == k - 1)
