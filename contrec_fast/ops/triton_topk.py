"""`cosine_topk` by the Triton kernels of `contrec_kernels`, which are imported at the first call.

A CUDA graph cannot hold `cosine_topk`, which looks at its certificates: capture
`contrec_kernels.topk.search`, which returns them.
"""

import torch
from torch import Tensor

from contrec_fast.ops.catalog import Catalog, SeenLists
from contrec_fast.ops.checks import FLOATS, INTEGERS, check
from contrec_fast.ops.dispatch import implements
from contrec_fast.ops.topk import LARGEST_BONUS
from contrec_fast.ops.triton_sampling import obstacle

LARGEST_DIM = 4096
MOST_QUERIES = (16, 64, 256, 1024)  # bounds of the classes of calls that are measured
MOST_ITEMS = (1 << 16, 1 << 20, 1 << 24)
MOST_K = (32, 128, 1024)
SOURCES = (
    "contrec_kernels.topk",
    "contrec_kernels.topk_kernels",
    "contrec_fast.ops.triton_topk",
)


def _obstacle(queries: Tensor, vectors: Tensor, *arguments) -> str | None:
    count, dim = vectors.shape
    if dim > LARGEST_DIM:
        return f"expected at most {LARGEST_DIM} dimensions, got {dim}"
    if count >= 2**31 - 2**16:  # ids are 32 bits, with room for a last tile
        return f"expected fewer than {2**31 - 2**16} items, got {count}"
    if queries.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a certificate is looked at: capture contrec_kernels.topk.search instead"
    return obstacle(queries, FLOATS)


def _bucket(
    queries, vectors, norms, scan, errors, groups, eligible, k, matched, pi,
    seen_offsets, seen_ids, seen_rows,
):  # fmt: skip
    """Dimensions, dtype and whether there is a bonus; the classes of queries, items and k."""

    def bounded(name: str, size: int, bounds: tuple[int, ...]) -> str:
        most = next((bound for bound in bounds if size <= bound), None)
        return f"{name}>{bounds[-1]}" if most is None else f"{name}<={most}"

    dtype = str(vectors.dtype).removeprefix("torch.")
    bonus = " bonus" if matched is not None and pi > 0 else ""
    sizes = (("queries", len(queries), MOST_QUERIES), ("items", len(vectors), MOST_ITEMS))
    return " ".join(
        [f"D={vectors.shape[1]} {dtype}{bonus}", *(bounded(*size) for size in sizes)]
        + [bounded("k", k, MOST_K)]
    )


@implements("cosine_topk", "triton", _obstacle, _bucket, SOURCES)
def _cosine_topk(queries: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    from contrec_kernels import topk

    return topk.cosine_topk(queries, *arguments)


def stream_topk(
    queries: Tensor,
    catalog: Catalog,
    k: int,
    matched: Tensor | None = None,
    pi: float = 0.0,
    seen: SeenLists | None = None,
    seen_rows: Tensor | None = None,
    chunk: int = 1 << 20,
) -> tuple[Tensor, Tensor]:
    """`cosine_topk` from a catalog in host memory, which may be larger than the device's.

    The same lists, bit for bit. The catalog's tensors may be pinned or memory-mapped; chunks of
    the scan copy pass through the device while others are searched, and of the exact vectors only
    the candidates' rows.

    Args:
        queries: [B, D] on the device that searches, as are matched, seen and seen_rows: see
            `cosine_topk`. catalog: on the CPU. chunk: items on the device at once, twice: each
            time 2 D + 9 bytes an item.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or value, in one line.
    """
    from contrec_kernels import topk

    if not isinstance(catalog, Catalog) or catalog.vectors.device.type != "cpu":
        raise TypeError("catalog: expected an ops.Catalog on the CPU")
    check("queries", queries, ("B", catalog.vectors.shape[1]), FLOATS)
    for name, value, most in (("k", k, len(catalog)), ("chunk", chunk, 2**30)):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name}: expected 1 to {most}, got {value}")
    if not 0 <= pi <= LARGEST_BONUS:
        raise ValueError(f"pi: expected 0 to {LARGEST_BONUS:g}, got {pi}")
    if matched is not None:
        check("matched", matched, (len(queries), "G"), (torch.bool,), like=queries)
        if matched.shape[1] < catalog.num_groups:
            wanted = f"at least {catalog.num_groups} groups"
            raise ValueError(f"matched: expected {wanted}, got {matched.shape[1]}")
    if (seen is None) != (seen_rows is None):
        raise ValueError("seen, seen_rows: expected both or neither, got one")
    if seen is not None:
        if not isinstance(seen, SeenLists):
            raise TypeError(f"seen: expected an ops.SeenLists, got {type(seen).__name__}")
        check("seen", seen.ids, ("M",), INTEGERS, like=queries)
        check("seen_rows", seen_rows, (len(queries),), INTEGERS, like=queries)
        if seen.bound > len(catalog):
            raise ValueError(f"seen: expected ids below {len(catalog)}, got {seen.bound - 1}")
    if reason := _obstacle(queries, catalog.vectors):
        raise ValueError(f"queries: Triton kernels cannot serve them: {reason}")
    lists = (None, None) if seen is None else (seen.offsets, seen.ids)
    return topk.stream_topk(
        queries.detach(), catalog.vectors, catalog.norms, catalog.scan, catalog.errors,
        catalog.groups, catalog.eligible, k, matched, float(pi), *lists, seen_rows, chunk=chunk,
    )  # fmt: skip
