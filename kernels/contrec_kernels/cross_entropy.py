"""Softmax cross-entropy over a catalog, forward and backward, without the matrix of logits.

Shapes: B queries, N items, D dimensions, S ranges of items. Each program keeps a tile of rows and
goes over tiles of the other side, making logits as it goes:

- `losses`: a tile of queries, a range of items: running maximum and sum (online softmax: Milakov
  and Gimelshein, arXiv 1805.02867). Ranges are put together in order.
- `query_gradients`: likewise, logits made anew; ranges are added up in order.
- `vector_gradients`: a tile of items, all queries.

No sum is left to atomic additions: the same call gives the same bits. Products are in the inputs'
dtype (float32: in three TF32 products each) with float32 sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST = 1e-12  # what shorter rows are divided by, as in torch.nn.functional.normalize
LARGEST_SCALE = (1 - 1e-6) / SHORTEST  # of rows that were divided by their norm
PROGRAMS = 2  # per multiprocessor, in all ranges together
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_ITEM = tl.constexpr(2**31 - 1)


class Tiles(NamedTuple):
    """How the work of a kernel is cut: queries x items x depth, and columns of a gradient."""

    queries: int
    items: int
    depth: int
    columns: int
    warps: int
    stages: int


def tiles_for(kernel: str, batch: int, dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of one of the three kernels for B queries of D dimensions."""
    width = max(16, triton.next_power_of_2(dim))
    queries = max(16, min(64, triton.next_power_of_2(max(batch, 1))))
    # Of float32, three products in place of one and twice the bytes: fewer fit the registers.
    inner, columns = (32, 64) if dtype == torch.float32 else (64, 128)
    if kernel == "vector_gradients":
        return Tiles(min(queries, inner), 64, min(width, inner), min(width, columns), 8, 2)
    columns = 0 if kernel == "losses" else min(width, columns)
    return Tiles(queries, inner, min(width, inner), columns, 8, 2 if columns else 3)


@triton.jit
def load_rows(table, rows, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of a table [any, D] from column `start`."""
    columns = start + tl.arange(0, WIDTH)[None, :]
    return tl.load(table + rows.to(tl.int64)[:, None] * D + columns, mask=columns < D, other=0.0)


@triton.jit
def products(
    held, first, rows, second, others,
    D: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[rows, others] float32; `held` is the first table's tile where DEPTH covers D."""
    sums = tl.zeros((rows.shape[0], others.shape[0]), tl.float32)
    if DEPTH >= D:
        right = load_rows(second, others, 0, D, DEPTH)
        sums = tl.dot(held, right.T, sums, input_precision=PRECISION)
    else:
        for start in range(0, D, DEPTH):
            left = load_rows(first, rows, start, D, DEPTH)
            right = load_rows(second, others, start, D, DEPTH)
            sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
    return sums


@triton.jit
def first_from(seen_ids, start, end, item):
    """For each list `seen_ids[start:end]`, the first place of an id that is not below `item`."""
    while tl.max(end - start, axis=0) > 0:
        middle = start + (end - start) // 2
        inside = start < end
        below = tl.load(seen_ids + middle, mask=inside, other=NO_ITEM).to(tl.int32) < item
        start = tl.where(inside & below, middle + 1, start)
        end = tl.where(inside & (below == 0), middle, end)
    return start


@triton.jit
def listed_in(seen_ids, place, end, items, stop):
    """[lists, items] bool: items below `stop` that are listed; and the next places."""
    listed = tl.zeros((place.shape[0], items.shape[0]), tl.int1)
    item = tl.load(seen_ids + place, mask=place < end, other=NO_ITEM).to(tl.int32)
    while tl.min(item, axis=0) < stop:
        listed = listed | (item[:, None] == items[None, :])
        place += (item < stop).to(tl.int64)
        item = tl.load(seen_ids + place, mask=place < end, other=NO_ITEM).to(tl.int32)
    return listed, place


@triton.jit
def losses(
    queries, vectors, query_scales, vector_scales, targets, starts, ends, seen_ids,
    peaks, totals, sums, counts, hits, B, N, span,
    D: tl.constexpr, SEEN: tl.constexpr, SMOOTH: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of the items in range `program_id(1)`, [S, B] float32: the largest logit, the sum of
    exp(logit - largest), with SMOOTH the sum of the logits and their number, and the target's
    logit or 0."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = tl.minimum(row, B - 1)
    held = load_rows(queries, real, 0, D, DEPTH) if DEPTH >= D else 0
    scale = tl.load(query_scales + real)
    target = tl.load(targets + real).to(tl.int32)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, N)
    if SEEN:
        end = tl.load(ends + real)
        place = first_from(seen_ids, tl.load(starts + real), end, begin)
    top = tl.zeros((QUERIES,), tl.float32) + LOWEST
    total, sum_, count, hit = top * 0, top * 0, top * 0, top * 0
    for start in range(begin, stop, ITEMS):
        item = start + tl.arange(0, ITEMS)
        some = tl.minimum(item, N - 1)
        logits = products(held, queries, real, vectors, some, D, DEPTH, PRECISION)
        logits = logits * scale[:, None] * tl.load(vector_scales + some)[None, :]
        is_target = item[None, :] == target[:, None]
        part = (item < stop)[None, :] | tl.zeros((QUERIES, ITEMS), tl.int1)
        if SEEN:
            listed, place = listed_in(seen_ids, place, end, item, start + ITEMS)
            part = part & ((listed == 0) | is_target)
        hit += tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        if SMOOTH:
            sum_ += tl.sum(tl.where(part, logits, 0.0), axis=1)
            count += tl.sum(part.to(tl.float32), axis=1)
        logits = tl.where(part, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        top = higher
    to = tl.program_id(1).to(tl.int64) * B + row
    tl.store(peaks + to, top, mask=row < B)
    tl.store(totals + to, total, mask=row < B)
    tl.store(hits + to, hit, mask=row < B)
    if SMOOTH:
        tl.store(sums + to, sum_, mask=row < B)
        tl.store(counts + to, count, mask=row < B)


@triton.jit
def query_gradients(
    queries, vectors, query_scales, vector_scales, targets, starts, ends, seen_ids,
    peaks, inverses, evens, hit, gradients, alongs, B, N, span,
    D: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the items in range `program_id(1)`, for columns `program_id(2)`: sums of
    weight * vector_scale * vector to gradients [S, B, D], and of weight * logit to alongs [S, B],
    float32. A logit's weight is `exp(logit - peak) * inverse - even`, less `hit` at the target."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = tl.minimum(row, B - 1)
    held = load_rows(queries, real, 0, D, DEPTH) if DEPTH >= D else 0
    scale = tl.load(query_scales + real)
    target = tl.load(targets + real).to(tl.int32)
    peak, inverse = tl.load(peaks + real), tl.load(inverses + real)
    even = tl.load(evens + real)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, N)
    if SEEN:
        end = tl.load(ends + real)
        place = first_from(seen_ids, tl.load(starts + real), end, begin)
    first = tl.program_id(2) * COLUMNS
    gradient = tl.zeros((QUERIES, COLUMNS), tl.float32)
    along = tl.zeros((QUERIES,), tl.float32)
    for start in range(begin, stop, ITEMS):
        item = start + tl.arange(0, ITEMS)
        some = tl.minimum(item, N - 1)
        other_scale = tl.load(vector_scales + some)
        logits = products(held, queries, real, vectors, some, D, DEPTH, PRECISION)
        logits = logits * scale[:, None] * other_scale[None, :]
        is_target = item[None, :] == target[:, None]
        part = (item < stop)[None, :] | tl.zeros((QUERIES, ITEMS), tl.int1)
        if SEEN:
            listed, place = listed_in(seen_ids, place, end, item, start + ITEMS)
            part = part & ((listed == 0) | is_target)
        weight = tl.exp(logits - peak[:, None]) * inverse[:, None] - even[:, None]
        weight = tl.where(part, weight, 0.0) - tl.where(is_target, hit, 0.0)
        along += tl.sum(weight * logits, axis=1)
        weight = weight * other_scale[None, :]
        right = load_rows(vectors, some, first, D, COLUMNS).to(LAST)
        gradient = tl.dot(weight.to(LAST), right, gradient, input_precision=PRECISION)
    to = tl.program_id(1).to(tl.int64) * B + row
    column = first + tl.arange(0, COLUMNS)
    inside = (row < B)[:, None] & (column < D)[None, :]
    tl.store(gradients + to[:, None] * D + column[None, :], gradient, mask=inside)
    tl.store(alongs + to, along, mask=(row < B) & (first == 0))


@triton.jit
def vector_gradients(
    queries, vectors, query_scales, vector_scales, targets, starts, ends, seen_ids,
    peaks, inverses, evens, hit, losses_gradient, gradients, B, N, largest,
    D: tl.constexpr, SEEN: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients [N, D] of a tile of items, for columns `program_id(1)`. Vectors with a scale of
    `largest` or more were too short to be divided by their norm."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    some = tl.minimum(item, N - 1)
    held = load_rows(vectors, some, 0, D, DEPTH) if DEPTH >= D else 0
    scale = tl.load(vector_scales + some)
    first = tl.program_id(1) * COLUMNS
    gradient = tl.zeros((ITEMS, COLUMNS), tl.float32)
    along = tl.zeros((ITEMS,), tl.float32)
    for start in range(0, B, QUERIES):
        row = start + tl.arange(0, QUERIES)
        real = tl.minimum(row, B - 1)
        other_scale = tl.load(query_scales + real)
        target = tl.load(targets + real).to(tl.int32)
        peak, inverse = tl.load(peaks + real), tl.load(inverses + real)
        even = tl.load(evens + real)
        out = tl.load(losses_gradient + real, mask=row < B, other=0.0)
        logits = products(held, vectors, some, queries, real, D, DEPTH, PRECISION)
        # In the other kernels' order: rounded as the logits that the peaks were made of.
        logits = logits * other_scale[None, :] * scale[:, None]
        is_target = item[:, None] == target[None, :]
        weight = tl.exp(logits - peak[None, :]) * inverse[None, :] - even[None, :]
        if SEEN:
            end = tl.load(ends + real)
            begin = tl.program_id(0) * ITEMS
            place = first_from(seen_ids, tl.load(starts + real), end, begin)
            listed, place = listed_in(seen_ids, place, end, item, begin + ITEMS)
            weight = tl.where((listed.to(tl.int32).T == 0) | is_target, weight, 0.0)
        weight = (weight - tl.where(is_target, hit, 0.0)) * out[None, :]
        weight = tl.where((row < B)[None, :], weight, 0.0)
        along += tl.sum(weight * logits, axis=1)
        weight = weight * other_scale[None, :]
        right = load_rows(queries, real, first, D, COLUMNS).to(LAST)
        gradient = tl.dot(weight.to(LAST), right, gradient, input_precision=PRECISION)
    if COSINE:
        own = load_rows(vectors, some, first, D, COLUMNS).to(tl.float32) * scale[:, None]
        along = tl.where(scale < largest, along, 0.0)
        gradient = (gradient - along[:, None] * own) * scale[:, None]
    column = first + tl.arange(0, COLUMNS)
    inside = (item < N)[:, None] & (column < D)[None, :]
    to = gradients + item.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(to, gradient.to(gradients.dtype.element_ty), mask=inside)


def scales_of(rows: Tensor, similarity: str) -> Tensor:
    """[rows] float32: 1 over the norms, or over SHORTEST if that is more; 1 for "dot"."""
    if similarity == "dot":
        return torch.ones(len(rows), dtype=torch.float32, device=rows.device)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms.clamp(min=SHORTEST).reciprocal()


class _Launch:
    """What both passes need of a call's arguments, in the order of the kernels' parameters."""

    def __init__(
        self, queries, vectors, targets, temperature, similarity, smoothing,
        seen_offsets, seen_ids, seen_rows,
    ):  # fmt: skip
        self.queries, self.vectors = queries.contiguous(), vectors.contiguous()
        (self.batch, self.dim), self.count = queries.shape, len(vectors)
        self.scales = scales_of(self.queries, similarity)
        self.vector_scales = scales_of(self.vectors, similarity)
        starts = ends = ids = targets  # stand-ins of kernels that do not read them
        if seen_rows is not None:
            users = seen_rows.long()
            starts = seen_offsets[users.clamp(min=0)]
            ends = seen_offsets[(users + 1).clamp(min=0)]  # starts where the row is -1
            ids = seen_ids.contiguous()
        scales = self.scales / temperature
        self.tensors = (
            self.queries, self.vectors, scales, self.vector_scales, targets.contiguous(),
            starts, ends, ids,
        )  # fmt: skip
        # A TF32 number has the precision of float16 and the range that small weights need.
        exact = queries.dtype == torch.float32
        self.options = {"D": self.dim, "SEEN": seen_rows is not None}
        self.options["PRECISION"] = "tf32x3" if exact else "tf32"
        self.last = tl.bfloat16 if queries.dtype == torch.bfloat16 else tl.float32

    def cut(self, kernel: str) -> tuple[Tiles, dict]:
        tiles = tiles_for(kernel, self.batch, self.dim, self.queries.dtype)
        cut = {"QUERIES": tiles.queries, "ITEMS": tiles.items, "DEPTH": tiles.depth}
        cut |= {"COLUMNS": tiles.columns} if tiles.columns else {}
        cut |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
        return tiles, self.options | cut

    def ranges(self, tiles: Tiles) -> tuple[int, int]:
        """Items of a range, whole tiles, and the number of ranges: enough to fill the device."""
        programs = 4
        if self.queries.is_cuda:
            properties = torch.cuda.get_device_properties(self.queries.device)
            programs = PROGRAMS * properties.multi_processor_count
        item_tiles = triton.cdiv(self.count, tiles.items)
        wanted = max(1, programs // triton.cdiv(self.batch, tiles.queries))
        span = triton.cdiv(item_tiles, min(wanted, item_tiles)) * tiles.items
        return span, triton.cdiv(self.count, span)


def _float32(like: Tensor) -> dict:
    return {"dtype": torch.float32, "device": like.device}


def forward(*arguments) -> tuple[Tensor, ...]:
    """Losses [B] in the queries' dtype; and for `backward`, [B] float32, the largest logits, the
    sums of exp(logit - largest) and the part of each item in the smoothed target.

    Args:
        arguments: queries [B, D] and vectors [N, D] in float32, bfloat16 or float16, squares of
        which float32 holds; targets [B] int64, temperature, similarity ("cosine" or "dot"), label
        smoothing; seen_offsets, seen_ids, seen_rows (ids ascending within a row) or None.
    """
    queries, *_, smoothing, _, _, _ = arguments
    if len(queries) == 0:
        return queries.new_empty(0), *torch.empty((3, 0), **_float32(queries))
    with torch.cuda.device_of(queries):
        call = _Launch(*arguments)
        tiles, options = call.cut("losses")
        span, ranges = call.ranges(tiles)
        found = torch.empty((5, ranges, call.batch), **_float32(queries))
        losses[(triton.cdiv(call.batch, tiles.queries), ranges)](
            *call.tensors, *found, call.batch, call.count, span, SMOOTH=smoothing > 0, **options
        )
        tops, parts, sums, counts, hits = found
        peaks = tops.amax(0)
        totals = (parts * (tops - peaks).exp()).sum(0)
        loss = totals.log() + (1 - smoothing) * (peaks - hits.sum(0))
        evens = torch.zeros_like(peaks)
        if smoothing > 0:
            evens = smoothing / counts.sum(0)
            loss += smoothing * peaks - evens * sums.sum(0)
    return loss.to(queries.dtype), peaks, totals, evens


def backward(*arguments) -> list[Tensor | None]:
    """Gradients in the queries and the vectors, in their dtype; None where they are not wanted.

    Args:
        arguments: as of `forward`, then what it kept, the losses' gradient [B], and two
        flags, which gradients are wanted.
    """
    *arguments, peaks, totals, evens, gradient, wanted = arguments
    queries, vectors, _, temperature, similarity, smoothing, *_ = arguments
    if len(queries) == 0:
        return [torch.zeros_like(rows) if asked else None for rows, asked in zip(arguments, wanted)]
    found: list[Tensor | None] = [None, None]
    with torch.cuda.device_of(queries):
        call = _Launch(*arguments)
        softmax = (peaks, totals.reciprocal(), evens, 1 - smoothing)
        gradient = gradient.float().contiguous()
        if wanted[0]:
            tiles, options = call.cut("query_gradients")
            span, ranges = call.ranges(tiles)
            parts = torch.empty((ranges, *queries.shape), **_float32(queries))
            alongs = torch.empty((ranges, call.batch), **_float32(queries))
            columns = triton.cdiv(call.dim, tiles.columns)
            query_gradients[(triton.cdiv(call.batch, tiles.queries), ranges, columns)](
                *call.tensors, *softmax, parts, alongs, call.batch, call.count, span,
                LAST=call.last, **options,
            )  # fmt: skip
            sums = parts.sum(0) / temperature
            if similarity == "cosine":
                along = alongs.sum(0).where(call.scales < LARGEST_SCALE, 0.0) * call.scales
                sums -= along[:, None] * queries.float()
            found[0] = (sums * (gradient * call.scales)[:, None]).to(queries.dtype)
        if wanted[1]:
            tiles, options = call.cut("vector_gradients")
            found[1] = torch.empty_like(call.vectors)
            columns = triton.cdiv(call.dim, tiles.columns)
            vector_gradients[(triton.cdiv(call.count, tiles.items), columns)](
                *call.tensors, *softmax, gradient, found[1], call.batch, call.count,
                LARGEST_SCALE, COSINE=similarity == "cosine", LAST=call.last, **options,
            )  # fmt: skip
    return found
