"""`catalog_cross_entropy` by the Triton kernels, which are imported at the first call."""

import torch
from torch import Tensor

from contrec_fast.ops.cross_entropy_autograd import Recomputed
from contrec_fast.ops.dispatch import implements
from contrec_fast.ops.triton_sampling import obstacle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_QUERIES = (64, 256, 1024, 8192)  # bounds of the classes of calls that are measured
MOST_ITEMS = (1 << 14, 1 << 17, 1 << 20)
SOURCES = (
    "contrec_kernels.cross_entropy",
    "contrec_fast.ops.cross_entropy_autograd",
    "contrec_fast.ops.triton_cross_entropy",
)


def _obstacle(queries: Tensor, vectors: Tensor, *rest) -> str | None:
    if len(vectors) >= 2**31 - 2**16:  # items are counted in 32 bits, with room for a last tile
        return f"expected fewer than {2**31 - 2**16} items, got {len(vectors)}"
    if torch.compiler.is_compiling():
        return "expected an eager call, got one that is being compiled"
    return obstacle(queries, DTYPES)


def _bucket(
    queries, vectors, targets, temperature, similarity, label_smoothing,
    seen_offsets, seen_ids, seen_rows,
):  # fmt: skip
    """Dimensions, dtype, whether there are lists or smoothing; the classes of both sizes."""

    def bounded(name: str, size: int, bounds: tuple[int, ...]) -> str:
        most = next((bound for bound in bounds if size <= bound), None)
        return f"{name}>{bounds[-1]}" if most is None else f"{name}<={most}"

    words = [f"D={queries.shape[1]}", str(queries.dtype).removeprefix("torch.")]
    words += ["seen"] if seen_rows is not None else []
    words += ["smoothed"] if label_smoothing > 0 else []
    words.append(bounded("queries", len(queries), MOST_QUERIES))
    return " ".join([*words, bounded("items", len(vectors), MOST_ITEMS)])


@implements("catalog_cross_entropy", "triton", _obstacle, _bucket, SOURCES)
def _catalog_cross_entropy(*arguments) -> Tensor:
    from contrec_kernels import cross_entropy

    return Recomputed.apply(cross_entropy.forward, cross_entropy.backward, *arguments)
