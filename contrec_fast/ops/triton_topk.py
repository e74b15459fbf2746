"""`cosine_topk` by the Triton kernels of `contrec_kernels`, which are imported at the first call.

A CUDA graph cannot hold `cosine_topk`, which looks at its certificates: capture
`contrec_kernels.topk.search`, which returns them.
"""

import torch
from torch import Tensor

from contrec_fast.ops.catalog import Catalog, SeenLists
from contrec_fast.ops.checks import FLOATS
from contrec_fast.ops.dispatch import implements
from contrec_fast.ops.topk import search_arguments
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

    arguments = search_arguments(queries, catalog, k, matched, pi, seen, seen_rows)
    if catalog.vectors.device.type != "cpu":
        raise ValueError(f"catalog: expected one on the CPU, got {catalog.vectors.device}")
    if not isinstance(chunk, int) or not 1 <= chunk <= 2**30:
        raise ValueError(f"chunk: expected 1 to {2**30}, got {chunk}")
    if reason := _obstacle(queries, catalog.vectors):
        raise ValueError(f"queries: Triton kernels cannot serve them: {reason}")
    return topk.stream_topk(*arguments, chunk=chunk)
