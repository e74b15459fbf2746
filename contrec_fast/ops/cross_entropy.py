"""`catalog_cross_entropy`: softmax cross-entropy of queries over the whole catalog."""

import torch
import torch.nn.functional as F
from torch import Tensor

from contrec_fast.ops.checks import FLOATS, check
from contrec_fast.ops.dispatch import implements, resolve

NO_INDEX = torch.iinfo(torch.int64).min


@implements("catalog_cross_entropy")
def _catalog_cross_entropy(
    queries: Tensor, vectors: Tensor, targets: Tensor, temperature: float, similarity: str
) -> Tensor:
    if similarity == "cosine":
        queries, vectors = F.normalize(queries, dim=-1), F.normalize(vectors, dim=-1)
    logits = queries @ vectors.T / temperature
    # The default ignored index, -100, would pass as a target of no loss.
    return F.cross_entropy(logits, targets, ignore_index=NO_INDEX, reduction="none")


def _registered(queries, vectors, targets, temperature, similarity, backend):
    arguments = (queries, vectors, targets, temperature, similarity)
    return resolve("catalog_cross_entropy", backend, *arguments)(*arguments)


_library = torch.library.Library("contrec", "FRAGMENT")
_library.define(
    "catalog_cross_entropy(Tensor queries, Tensor vectors, Tensor targets, float temperature,"
    " str similarity, str backend) -> Tensor"
)
_library.impl("catalog_cross_entropy", _registered, "CompositeImplicitAutograd")


def catalog_cross_entropy(
    queries: Tensor,
    vectors: Tensor,
    targets: Tensor,
    temperature: float,
    similarity: str = "cosine",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of `softmax(similarity(query, item) / temperature)` at the target.

    Differentiable in queries and vectors.

    Args:
        queries: [B, D]. vectors: [N, D] in the same dtype, N at least 1.
        targets: [B] int64 rows of `vectors`.
        temperature: positive. similarity: "cosine" or "dot".

    Returns:
        [B] loss in the dtype of the queries.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, value or backend, in one line. A
        target outside the catalog raises IndexError on the CPU and is not checked on a GPU.
    """
    check("queries", queries, ("B", "D"), FLOATS)
    check("vectors", vectors, ("N", queries.shape[1]), (queries.dtype,), like=queries)
    check("targets", targets, (len(queries),), (torch.int64,), like=queries)
    if len(vectors) == 0:
        raise ValueError("vectors: expected at least one item, got an empty catalog")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity: expected 'cosine' or 'dot', got {similarity!r}")
    arguments = (queries, vectors, targets, float(temperature), similarity)
    if torch.compiler.is_compiling():
        return torch.ops.contrec.catalog_cross_entropy(*arguments, backend)
    return resolve("catalog_cross_entropy", backend, *arguments)(*arguments)
