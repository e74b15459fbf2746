"""`cosine_topk`: exact top-K by cosine similarity with a bonus, seen items excluded.

The specification of a score, in float64: products summed in a fixed order, divided by the two
norms, times `1 + pi` where the item's group matches; rounded once to float32. Lists are ordered
by (score descending, item id ascending). Candidates come from a low-precision scan that bounds
every score from above; a list is taken only when its last score exceeds the bound of every item
that is not a candidate. So the result is the same bits whatever the batch, the scan or its chunks.
"""

import torch
from torch import Tensor

from contrec_fast import native
from contrec_fast.ops.catalog import (
    Catalog,
    SeenLists,
    fixed_order_sum,
    norms_of,
    scan_of,
    seen_arguments,
)
from contrec_fast.ops.checks import FLOATS, check
from contrec_fast.ops.dispatch import CPP, implements, resolve

LARGEST_BONUS = 1e30  # so that scores and their bounds fit float32
SCAN_ELEMENTS = 1 << 26  # scores held at once
CONVERT_ELEMENTS = 1 << 24  # elements of the scan copy held as float32 at once
RESCORE_ELEMENTS = 1 << 22  # float64 products held at once


def bonus_of(matched: Tensor | None, pi: float) -> Tensor | None:
    """Factors [B, G + 1] float64 by group of an item; the last column serves group -1."""
    if matched is None or pi == 0:
        return None
    return 1.0 + pi * torch.nn.functional.pad(matched, (0, 1)).double()


def seen_pairs(offsets: Tensor, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the queries with these rows of the seen lists leave out: [M] queries, [M] items.

    Ascending, queries first.
    """
    start = offsets[rows.clamp(min=0)]
    length = offsets[(rows + 1).clamp(min=0)] - start  # 0 where the row is -1
    local = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length)
    within = torch.arange(len(local), device=rows.device)
    first = torch.repeat_interleave(start - (length.cumsum(0) - length), length)
    return local, ids[first + within]


def exact_scores(
    queries: Tensor,
    query_norms: Tensor,
    vectors: Tensor,
    norms: Tensor,
    groups: Tensor,
    found: Tensor,
    bonus: Tensor | None,
) -> Tensor:
    """The specified scores [B, M] float32 of the items `found` [B, M] of each query.

    Args:
        queries: [B, D]. query_norms: [B] float64. vectors, norms, groups: the catalog's.
        bonus: of `bonus_of`.
    """
    exact_queries = queries.double()[:, None]
    width = max(1, RESCORE_ELEMENTS // max(1, queries.numel()))
    parts = found.split(width, dim=1)
    dots = [fixed_order_sum(exact_queries * vectors[part].double()) for part in parts]
    # A zero query has no direction: all of its scores are 0, not 0 / 0.
    scale = query_norms[:, None] * norms[found]
    exact = torch.cat(dots, dim=1) / scale.masked_fill(scale == 0, 1.0)
    if bonus is not None:
        exact = exact * bonus.gather(1, groups[found].long() % bonus.shape[1])
    return exact.float()


@implements("cosine_topk")
def _cosine_topk(
    queries: Tensor,
    vectors: Tensor,
    norms: Tensor,
    scan: Tensor,
    errors: Tensor,
    groups: Tensor,
    eligible: Tensor,
    k: int,
    matched: Tensor | None,
    pi: float,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
    seen_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    count, dim = vectors.shape
    scores = queries.new_empty((len(queries), k), dtype=torch.float32)
    ids = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    query_norms = norms_of(queries)
    query_scan, query_errors = scan_of(queries, query_norms)
    # Rows are close to unit vectors. Beside their errors: float32 sums in any order (products of
    # bfloat16 numbers are exact), then additions, the product and its rounding, all of at most
    # about 1.
    query_errors += (dim + 64) * 2.0**-23
    bonus = bonus_of(matched, pi)

    def search(rows: Tensor, candidates: int):
        """Fill in the lists of some queries from this many candidates each."""
        bounds = torch.empty((len(rows), count), dtype=torch.float32, device=queries.device)
        width = max(1, CONVERT_ELEMENTS // dim)
        asked = query_scan[rows].float()
        with torch.autocast(queries.device.type, enabled=False):
            for part, into in zip(scan.split(width), bounds.split(width, dim=1)):
                into.copy_(asked @ part.float().T)
        # |scan row| is at most 1 + 2^-8.
        bounds += errors + (1 + 2.0**-8) * query_errors[rows, None]
        if bonus is not None:
            bounds *= bonus.float()[rows][:, groups.long()]
        bounds.masked_fill_(~eligible, -torch.inf)
        bounds.masked_fill_(~query_norms[rows, None].isfinite(), -torch.inf)
        if seen_rows is not None:
            bounds[seen_pairs(seen_offsets, seen_ids, seen_rows[rows])] = -torch.inf
        best, found = bounds.topk(candidates, dim=1)
        usable = best > -torch.inf
        found = found.masked_fill(~usable, count).sort(dim=1).values
        usable, found = found < count, found.clamp(max=count - 1)
        exact = exact_scores(
            queries[rows], query_norms[rows], vectors, norms, groups, found,
            None if bonus is None else bonus[rows],
        )  # fmt: skip
        exact = exact.masked_fill(~usable, -torch.inf)
        order = exact.sort(dim=1, descending=True, stable=True).indices[:, :k]
        scores[rows] = exact.gather(1, order)
        ids[rows] = found.gather(1, order).masked_fill(~usable.gather(1, order), -1)
        # The certificate: whatever was left out scores at most best[:, -1].
        certain = (best[:, -1] < scores[rows, -1]) | ~usable[:, -1]
        if candidates < count and not certain.all():
            in_chunks(rows[~certain], min(count, 8 * candidates))

    def in_chunks(rows: Tensor, candidates: int):
        chunk = min(SCAN_ELEMENTS // count, RESCORE_ELEMENTS // dim)
        for part in rows.split(max(1, chunk)):
            search(part, candidates)

    # Beyond k, so that a certificate seldom fails.
    candidates = min(count, k + k // 2 + 32)
    in_chunks(torch.arange(len(queries), device=queries.device), candidates)
    return scores, ids


def _no_extension(queries: Tensor, *rest) -> str | None:
    if native.serves(queries):
        return None
    return native.why_missing() or "tensors on the CPU"


implements("cosine_topk", CPP, obstacle=_no_extension)(native.cosine_topk)


@torch.library.custom_op("contrec::cosine_topk", mutates_args=())
def _registered(
    queries: Tensor,
    vectors: Tensor,
    norms: Tensor,
    scan: Tensor,
    errors: Tensor,
    groups: Tensor,
    eligible: Tensor,
    k: int,
    matched: Tensor | None,
    pi: float,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
    seen_rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (
        queries, vectors, norms, scan, errors, groups, eligible, k, matched, pi,
        seen_offsets, seen_ids, seen_rows,
    )  # fmt: skip
    return resolve("cosine_topk", backend, *arguments)(*arguments)


@_registered.register_fake
def _(queries, vectors, norms, scan, errors, groups, eligible, k, *rest):
    scores = queries.new_empty((len(queries), k), dtype=torch.float32)
    return scores, queries.new_empty((len(queries), k), dtype=torch.int64)


def search_arguments(queries, catalog, k, matched, pi, seen, seen_rows) -> tuple:
    """What every implementation takes, from checked arguments of `cosine_topk`.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or value, in one line. That the queries
        are on the catalog's device is for the caller to see to.
    """
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected an ops.Catalog, got {type(catalog).__name__}")
    check("queries", queries, ("B", catalog.vectors.shape[1]), FLOATS)
    if not isinstance(k, int) or not 1 <= k <= len(catalog):
        raise ValueError(f"k: expected 1 to the catalog's {len(catalog)} items, got {k}")
    if not isinstance(pi, int | float) or not 0 <= pi <= LARGEST_BONUS:
        raise ValueError(f"pi: expected 0 to {LARGEST_BONUS:g}, got {pi}")
    if matched is not None:
        check("matched", matched, (len(queries), "G"), (torch.bool,), like=queries)
        if matched.shape[1] < catalog.num_groups:
            raise ValueError(
                f"matched: expected at least {catalog.num_groups} groups, got {matched.shape[1]}"
            )
    lists = seen_arguments(seen, seen_rows, queries, len(catalog))
    return (
        queries.detach(), catalog.vectors, catalog.norms, catalog.scan, catalog.errors,
        catalog.groups, catalog.eligible, k, matched, float(pi), *lists,
    )  # fmt: skip


def cosine_topk(
    queries: Tensor,
    catalog: Catalog,
    k: int,
    matched: Tensor | None = None,
    pi: float = 0.0,
    seen: SeenLists | None = None,
    seen_rows: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k best items of each query by `cos(query, item) * (1 + pi * [item matches])`.

    Exact, and bitwise independent of the batch. Ties go to the lower item id.

    Args:
        queries: [B, D]; a zero query scores 0 with every item, and one whose norm is not finite
            has an empty list.
        catalog: the N items. k: 1 to N, the ids given out.
        matched: [B, G] bool, whether the query's text names group g; G is at least the
            catalog's `num_groups`.
        pi: weight of the bonus, 0 to 1e30.
        seen: lists of items to leave out. seen_rows: [B] int64 row of `seen` for each query,
            -1 for none. Given together. A row beyond the lists raises IndexError on the CPU
            and is not checked on a GPU.

    Returns:
        scores [B, k] float32 descending, ids [B, k] int64. Where fewer than k items are
        eligible and unseen, the rest is (-inf, -1).

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, value or backend, in one line.
    """
    arguments = search_arguments(queries, catalog, k, matched, pi, seen, seen_rows)
    check("queries", queries, tuple(queries.shape), FLOATS, like=catalog.vectors)
    if torch.compiler.is_compiling():
        return torch.ops.contrec.cosine_topk(*arguments, backend)
    return resolve("cosine_topk", backend, *arguments)(*arguments)
