"""Certified top-K by cosine similarity with a bonus: which kernels run, and when lists are done.

One pass of low precision over the catalog finds candidates, which are then scored exactly:

1. `prepare_queries`: norms, unit vectors in bfloat16, and how far off these are.
2. `sample_maxima`, `drop_seen`: every 16th item gives, per query, a threshold that a little more
   than k items should reach. It may be wrong; step 6 finds out.
3. `mark_candidates`, `collect`: the whole catalog; items whose upper bound reaches the threshold
   get a bit, and marked items a slot each.
4. `rescore`: exact float64 scores of the candidates, as sortable keys, seen items left out.
5. `torch.topk` of the keys, which are all different: one order, whatever ran first.
6. `finish`: the lists, and for each whether it is certified: all candidates fitted, and its last
   score is not below the threshold. Whatever was not marked has an upper bound below that.

Why not one maximum per block of items for the whole catalog: with N = 1M, D = 512, k = 20 and
blocks of 16 that writes and reads again 250 KB a query and rescores (20 + spare) * 16 float32
vectors, 1.2 MB a query; at k = 1,000 it would be 41 MB. Here it is 16 KB of sampled maxima and
about 200 vectors, 0.4 MB (k = 1,000: 1,900, 4 MB), for 6 % more products. With one query a pass
costs the same either way.

Tensors of the catalog (N rows, spare and removed ones included): vectors [N, D] float64, float32,
bfloat16 or float16; norms [N] float64; scan [N, D] bfloat16, close to the unit vectors; errors [N]
float32, upper bounds of the distance to them; groups [N] int32; eligible [N] bool.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from contrec_kernels import topk_kernels as kernels

INTERPRETED = triton.knobs.runtime.interpret  # as the kernels were imported
STRIDE = 16  # one of so many items is sampled
SAMPLED_BLOCKS = 4096  # about so many maxima of sampled items per query
MARKS = 1 << 25  # words of 32 items marked at once, all queries together
SLOTS = 1 << 26  # candidates held at once, all queries together
WIDENING = 8  # how much more a query gets that was not certified


class Tiles(NamedTuple):
    """How the work is cut: tiles of rows x items x depth, and candidates rescored at a time."""

    rows: int
    items: int
    depth: int
    warps: int
    stages: int
    resident: int  # programs per multiprocessor
    chunk: int


def tiles_for(batch: int, dim: int, shared: int = 227 << 10) -> Tiles:
    """Tiles for B queries of D dimensions on a chip with so many bytes of shared memory a block.

    Up to 64 queries the catalog's bytes decide: a program keeps its queries and streams whole items
    in stages of 32 KiB. Beyond that products decide, and how often a tile is read for them; with
    few dimensions a second program hides the comparisons.
    """
    width = max(16, triton.next_power_of_2(dim))
    rows = 128 if batch > 64 else max(16, triton.next_power_of_2(batch))
    chunk = max(1, min(16, 2048 // width))
    if rows < 128 and width <= 512:
        items = min(256 if rows < 64 else 128, (16 << 10) // width)
        left = shared - 2 * rows * width - (8 << 10)
        stages = max(2, min(4, left // (2 * items * width)))
        return Tiles(rows, items, width, 4, stages, 1, chunk)
    if rows == 128 and width > 128 and shared >= 200 << 10:
        return Tiles(128, 256, 64, 8, 3, 1, chunk)
    return Tiles(rows, 128, min(64, width), 8 if rows == 128 else 4, 3, 2, chunk)


class HostRows:
    """Exact vectors [N, D] and norms [N] that stay in host memory; candidates' rows are fetched."""

    def __init__(self, vectors: Tensor, norms: Tensor):
        self.vectors, self.norms = vectors, norms

    def take(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors and norms of all ids in `found`, each once, and where `found`'s are in them."""
        wanted = found.unique()
        rows = wanted.to("cpu", torch.int64)
        vectors, norms = (tensor[rows].to(found.device) for tensor in (self.vectors, self.norms))
        return vectors, norms, torch.searchsorted(wanted, found, out_int32=True)


def search(
    queries: Tensor,
    vectors: Tensor | HostRows,
    norms: Tensor | None,
    scan: Tensor,
    errors: Tensor,
    groups: Tensor,
    eligible: Tensor,
    k: int,
    matched: Tensor | None = None,
    pi: float = 0.0,
    seen_offsets: Tensor | None = None,
    seen_ids: Tensor | None = None,
    seen_rows: Tensor | None = None,
    *,
    base: int = 0,
    floors: Tensor | None = None,
    widening: int = 0,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One attempt at certified lists, without synchronising: a CUDA graph can hold it.

    Call it once before the capture, which compiles the kernels; after a replay check `certified`,
    and pass queries that are not on to `cosine_topk`.

    Args:
        queries: [B, D], B at least 1. The catalog's tensors: see above; norms None with HostRows
            (which synchronise). k: 1 to N. matched: [B, G] bool. pi: see the score's contract.
        seen_offsets, seen_ids, seen_rows: lists of items to leave out, ids ascending.
        base: added to the rows of the catalog, in the results and for comparison with seen_ids.
        floors: [B] float32; items that score below are not wanted.
        widening: how often to multiply thresholds' ranks and room for candidates by 8.
        tiles: how to cut the work; no influence on the result.

    Returns:
        scores [B, k] float32, ids [B, k] int64, certified [B] bool.
    """
    batch, dim = queries.shape
    count, device = len(scan), queries.device
    queries = queries.contiguous()
    tiles = tiles or _tiles(queries)
    levels = max(dim - 1, 0).bit_length()
    with torch.cuda.device_of(queries):
        unit = torch.empty((batch, dim), dtype=torch.bfloat16, device=device)
        query_norms = torch.empty(batch, dtype=torch.float64, device=device)
        query_errors = torch.empty(batch, dtype=torch.float32, device=device)
        counts = torch.empty(batch, dtype=torch.int32, device=device)
        # Sums of D products on a tensor core, which cuts where it should round; then the additions
        # and the product that make a bound of it, and the division by 1 + pi of its threshold.
        slack = (dim + 64) * 2.0**-22
        kernels.prepare_queries[(batch,)](
            queries, unit, query_norms, query_errors, counts, slack, dim, levels,
            enable_fp_fusion=False,
        )  # fmt: skip

        bonus = matched is not None and pi > 0 and matched.shape[1] > 0
        width = matched.shape[1] if bonus else 0
        matched = matched.contiguous().view(torch.uint8) if bonus else eligible
        usable = eligible.view(torch.uint8)
        starts = lengths = seen = counts  # stand-ins of kernels that do not read them
        if seen_rows is not None:
            user = seen_rows.long()
            starts = seen_offsets[user.clamp(min=0)]
            lengths = seen_offsets[(user + 1).clamp(min=0)] - starts  # 0 where user is -1
            seen = seen_ids

        if floors is None:
            floors = torch.full((batch,), -torch.inf, dtype=torch.float32, device=device)
        rank, capacity, block = _room(count, k, widening)
        if capacity == count:
            thresholds = torch.full_like(floors, -torch.inf)
            found = torch.arange(count, dtype=torch.int32, device=device)[None]
            counts.fill_(count)
        else:
            row_tiles = triton.cdiv(batch, tiles.rows)
            cut = {"ROWS": tiles.rows, "ITEMS": tiles.items, "DEPTH": tiles.depth}
            cut |= {"D": dim, "BONUS": bonus, "WIDEN": INTERPRETED}
            cut |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
            samples = triton.cdiv(count, STRIDE)
            blocks = triton.cdiv(samples, block)
            maxima = torch.empty((batch, blocks), dtype=torch.float32, device=device)
            sampled = cut | {"ITEMS": min(64, tiles.items)}  # groups are looked up for every score
            grid = _programs(queries, tiles, row_tiles, triton.cdiv(samples, sampled["ITEMS"]))
            kernels.sample_maxima[grid](
                unit, scan, groups, usable, matched, 1.0 + pi, maxima,
                batch, count, samples, blocks, width, row_tiles,
                STRIDE=STRIDE, BLOCK=block, **sampled,
            )  # fmt: skip
            if seen_rows is not None:
                kernels.drop_seen[(batch,)](
                    maxima, starts, lengths, seen, base, count, blocks, STRIDE * block, STRIDE
                )
            thresholds = torch.maximum(maxima.topk(rank).values[:, -1], floors)
            found = torch.zeros((batch, capacity), dtype=torch.int32, device=device)
            span = min(32 * max(32, MARKS // batch), count)
            marks = torch.empty(
                (1 + bonus, batch, triton.cdiv(span, 32)), dtype=torch.int32, device=device
            )
            for begin in range(0, count, span):
                end = min(begin + span, count)
                words = triton.cdiv(end - begin, 32)
                grid = _programs(queries, tiles, row_tiles, triton.cdiv(end - begin, tiles.items))
                kernels.mark_candidates[grid](
                    unit, query_errors, thresholds, scan, errors, usable, 1.0 + pi,
                    marks[0], marks[-1], batch, begin, end, words, row_tiles, **cut,
                )  # fmt: skip
                kernels.collect[(batch, triton.cdiv(words, 1024))](
                    marks[0], marks[-1], matched, groups, counts, found,
                    begin, words, capacity, width, BONUS=bonus, SEGMENT=1024,
                )  # fmt: skip

        places = found
        if isinstance(vectors, HostRows):
            vectors, norms, places = vectors.take(found)
        keys = torch.full((batch, capacity), kernels.NO_KEY.value, device=device)
        parts = max(1, min(triton.cdiv(capacity, tiles.chunk), 16384 // batch))
        parts = 1 if INTERPRETED else parts
        kernels.rescore[(batch, parts)](
            queries, query_norms, vectors, norms, groups, usable, matched,
            torch.full((1,), 1.0 + pi, dtype=torch.float64, device=device),
            found, places, counts, starts, lengths, seen, keys,
            base, capacity, 0 if len(found) == 1 else capacity, width, dim, levels,
            CHUNK=tiles.chunk, PARTS=parts,
            BONUS=bonus, SEEN=seen_rows is not None,
            # One warp adds without barriers, as long as its registers hold a vector.
            num_warps=1 if dim <= 2048 else 4, enable_fp_fusion=False,
        )  # fmt: skip
        scores = torch.empty((batch, k), dtype=torch.float32, device=device)
        ids = torch.empty((batch, k), dtype=torch.int64, device=device)
        certified = torch.empty(batch, dtype=torch.uint8, device=device)
        kernels.finish[(batch, triton.cdiv(k, 1024))](
            keys.topk(k).values, counts, query_norms, thresholds, floors, scores, ids, certified,
            base, k, capacity, BLOCK=min(1024, triton.next_power_of_2(k)),
        )  # fmt: skip
    return scores, ids, certified.bool()


def cosine_topk(
    queries: Tensor,
    vectors: Tensor | HostRows,
    norms: Tensor | None,
    scan: Tensor,
    errors: Tensor,
    groups: Tensor,
    eligible: Tensor,
    k: int,
    matched: Tensor | None = None,
    pi: float = 0.0,
    seen_offsets: Tensor | None = None,
    seen_ids: Tensor | None = None,
    seen_rows: Tensor | None = None,
    *,
    base: int = 0,
    floors: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Certified lists: `search`, again and with more room for queries that were not certified.

    The second attempt starts from the k-th score found so far, which a list that had too many
    candidates is certain to certify; the last one scores every item exactly.

    Args, returns: as of `search`. Queries may be none. Synchronises once if all goes well.
    """
    catalog = (vectors, norms, scan, errors, groups, eligible, k)
    scores = torch.empty((len(queries), k), dtype=torch.float32, device=queries.device)
    ids = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    if floors is None:
        floors = torch.full((len(queries),), -torch.inf, dtype=torch.float32, device=queries.device)

    def fill(rows: Tensor, widening: int):
        for part in rows.split(max(1, SLOTS // _room(len(scan), k, widening)[1])):
            some = None if matched is None else matched[part]
            seen = None if seen_rows is None else seen_rows[part]
            found = search(
                queries[part], *catalog, some, pi, seen_offsets, seen_ids, seen,
                base=base, floors=floors[part], widening=widening, tiles=tiles,
            )  # fmt: skip
            scores[part], ids[part], certified = found
            again = part[~certified]
            if len(again):
                known = torch.maximum(floors[again], scores[again, -1])
                floors.index_copy_(0, again, known)
                fill(again, widening + 1)

    floors = floors.clone()
    if len(queries):
        fill(torch.arange(len(queries), device=queries.device), 0)
    return scores, ids


def merge_lists(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """The k best of two lists by (score descending, id ascending).

    Args:
        first, second: scores [B, any] and ids [B, any] in that order; all ids of `first` are below
            those of `second`. Empty places are (-inf, -1).

    Returns:
        scores and ids [B, at most k].
    """
    scores, ids = (torch.cat(pair, dim=1) for pair in zip(first, second))
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def stream_topk(
    queries: Tensor,
    vectors: Tensor,
    norms: Tensor,
    scan: Tensor,
    errors: Tensor,
    groups: Tensor,
    eligible: Tensor,
    k: int,
    matched: Tensor | None = None,
    pi: float = 0.0,
    seen_offsets: Tensor | None = None,
    seen_ids: Tensor | None = None,
    seen_rows: Tensor | None = None,
    *,
    chunk: int = 1 << 20,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Certified lists from a catalog in host memory (pinned, pageable or memory-mapped).

    The scan copy passes through the device, `chunk` items at a time, a thread and a stream of its
    own moving the next chunk while one is searched; of the exact vectors only candidates' rows
    move. A list's k-th score so far is the floor of the next chunk.

    Args, returns: as of `cosine_topk`, with the catalog's tensors on the CPU, the others on one
        device. It holds two to three chunks of 2 D + 9 bytes an item.
    """
    device, count = queries.device, len(scan)
    scores = torch.empty((len(queries), 0), dtype=torch.float32, device=device)
    best = scores, torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    stream = torch.cuda.Stream(device) if queries.is_cuda else None

    def upload(start: int):
        parts = [tensor[start : start + chunk] for tensor in (scan, errors, groups, eligible)]
        if stream is None:
            return parts, None
        with torch.cuda.stream(stream):
            pinned = [part if part.is_pinned() else part.pin_memory() for part in parts]
            return [part.to(device, non_blocking=True) for part in pinned], stream.record_event()

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(upload, 0)
        for start in range(0, count, chunk):
            parts, moved = coming.result()
            if start + chunk < count:
                coming = thread.submit(upload, start + chunk)
            if moved is not None:
                torch.cuda.current_stream(device).wait_event(moved)
                for part in parts:
                    part.record_stream(torch.cuda.current_stream(device))
            here = slice(start, start + chunk)
            found = cosine_topk(
                queries, HostRows(vectors[here], norms[here]), None, *parts, min(k, len(parts[0])),
                matched, pi, seen_offsets, seen_ids, seen_rows,
                base=start, floors=best[0][:, -1] if best[0].shape[1] == k else None, tiles=tiles,
            )  # fmt: skip
            best = merge_lists(best, found, k)
    return best


def _room(count: int, k: int, widening: int) -> tuple[int, int, int]:
    """Rank of the threshold among sampled maxima, slots for candidates, sampled items a maximum.

    k items have k / STRIDE sampled ones among them, give or take its square root. Four times the
    candidates expected have room, because an item's upper bound exceeds its score, and items
    may be crowded. All items are candidates, and slots their number, where the sample is too
    small or there is nothing to save.
    """
    expected = k / STRIDE
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 5) * WIDENING**widening
    capacity = triton.next_power_of_2(max(2048 * WIDENING**widening, 4 * STRIDE * rank))
    samples = triton.cdiv(count, STRIDE)
    wanted = max(SAMPLED_BLOCKS, 8 * rank)
    block = min(32, triton.next_power_of_2(triton.cdiv(samples, wanted)))
    if capacity >= count or 4 * rank > triton.cdiv(samples, block):
        return 0, count, 1
    return rank, capacity, block


def _tiles(queries: Tensor) -> Tiles:
    if not queries.is_cuda:
        return tiles_for(*queries.shape)._replace(chunk=256)  # an operation costs a Python call
    properties = torch.cuda.get_device_properties(queries.device)
    return tiles_for(*queries.shape, properties.shared_memory_per_block_optin)


def _programs(queries: Tensor, tiles: Tiles, row_tiles: int, item_tiles: int) -> tuple[int]:
    """Number of programs: each keeps one tile of rows and takes every so many tiles of items."""
    resident = tiles.resident
    if queries.is_cuda:
        resident *= torch.cuda.get_device_properties(queries.device).multi_processor_count
    return (row_tiles * max(1, min(item_tiles, resident // row_tiles)),)
