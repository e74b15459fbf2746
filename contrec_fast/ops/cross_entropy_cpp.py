"""`catalog_cross_entropy` by the C++ extension, forward and backward."""

from functools import partial

import torch
from torch import Tensor

from contrec_fast import native
from contrec_fast.ops.cross_entropy_autograd import Recomputed
from contrec_fast.ops.dispatch import CPP, implements

DTYPES = (torch.float32, torch.bfloat16)


def _obstacle(queries: Tensor, *rest) -> str | None:
    if queries.device.type != "cpu":
        return f"a CPU tensor, got {queries.device}"
    if queries.dtype not in DTYPES:
        return f"float32 or bfloat16, got {str(queries.dtype).removeprefix('torch.')}"
    return None if native.serves(queries) else f"the extension: {native.why_missing()}"


def _job(
    queries, vectors, targets, temperature, similarity, label_smoothing,
    seen_offsets, seen_ids, seen_rows,
):  # fmt: skip
    """What both passes take of the operation's arguments."""

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    return {
        "queries": flat(queries),
        "vectors": flat(vectors),
        "low": queries.dtype == torch.bfloat16,
        "batch": len(queries),
        "items": len(vectors),
        "dim": queries.shape[1],
        "cosine": similarity == "cosine",
        "targets": flat(targets),
        "temperature": temperature,
        "smoothing": label_smoothing,
        "seen_offsets": flat(seen_offsets),
        "seen_users": 0 if seen_offsets is None else len(seen_offsets) - 1,
        "seen_ids": flat(seen_ids),
        "seen_rows": None if seen_rows is None else flat(seen_rows.long()),
    }


def _forward(*arguments, isa: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    queries = arguments[0]
    losses, peaks, totals = (native.empty(len(queries)) for _ in range(3))
    native.cross_entropy(
        isa, **_job(*arguments), peaks=peaks, totals=totals, losses=losses,
        gradient=None, query_gradient=None, vector_gradient=None,
    )  # fmt: skip
    return losses.to(queries.dtype), peaks, totals


def _backward(*arguments, isa: str | None = None) -> list[Tensor | None]:
    *arguments, peaks, totals, gradient, wanted = arguments
    # In float32 also for bfloat16: one block of queries after another adds to it.
    found = [
        torch.zeros_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
        if asked
        else None
        for tensor, asked in zip(arguments, wanted)
    ]
    native.cross_entropy(
        isa, **_job(*arguments), peaks=peaks, totals=totals, losses=None,
        gradient=gradient.float().contiguous(), query_gradient=found[0], vector_gradient=found[1],
    )  # fmt: skip
    return [None if part is None else part.to(gradient.dtype) for part in found]


@implements("catalog_cross_entropy", CPP, obstacle=_obstacle)
def catalog_cross_entropy(*arguments, isa: str | None = None) -> Tensor:
    """`ops.cross_entropy`'s reference, with arguments alike, in C++.

    Products and sums are in float32, also of bfloat16 inputs.

    Args:
        isa: of `native.cross_entropy_instruction_sets()`; the best if not given.
    """
    return Recomputed.apply(partial(_forward, isa=isa), partial(_backward, isa=isa), *arguments)
