"""`catalog_cross_entropy`: softmax cross-entropy of queries over the whole catalog."""

import torch
import torch.nn.functional as F
from torch import Tensor

import contrec_fast.ops.cross_entropy_cpp  # noqa: F401, registers itself
import contrec_fast.ops.triton_cross_entropy  # noqa: F401, likewise
from contrec_fast.ops.catalog import SeenLists, seen_arguments
from contrec_fast.ops.checks import FLOATS, check
from contrec_fast.ops.dispatch import implements, resolve

NO_INDEX = torch.iinfo(torch.int64).min


@torch.library.custom_op("contrec::left_out", mutates_args=())
def left_out(
    targets: Tensor, seen_offsets: Tensor, seen_ids: Tensor, seen_rows: Tensor, count: int
) -> Tensor:
    """[B, count] bool: items of a query's seen list, but not its own target."""
    rows = seen_rows.long()
    start = seen_offsets[rows.clamp(min=0)]
    length = seen_offsets[(rows + 1).clamp(min=0)] - start  # 0 where the row is -1
    query = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length)
    within = torch.arange(len(query), device=rows.device)
    first = torch.repeat_interleave(start - (length.cumsum(0) - length), length)
    found = torch.zeros((len(rows), count), dtype=torch.bool, device=rows.device)
    found[query, seen_ids[first + within]] = True
    found[torch.arange(len(rows), device=rows.device), targets] = False
    return found


@left_out.register_fake
def _(targets, seen_offsets, seen_ids, seen_rows, count):
    return targets.new_empty((len(targets), count), dtype=torch.bool)


@implements("catalog_cross_entropy")
def _catalog_cross_entropy(
    queries: Tensor,
    vectors: Tensor,
    targets: Tensor,
    temperature: float,
    similarity: str,
    label_smoothing: float,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
    seen_rows: Tensor | None,
) -> Tensor:
    if similarity == "cosine":
        queries, vectors = F.normalize(queries, dim=-1), F.normalize(vectors, dim=-1)
    logits = queries @ vectors.T / temperature
    # The default ignored index, -100, would pass as a target of no loss.
    options = {"ignore_index": NO_INDEX, "reduction": "none"}
    if seen_rows is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, **options)
    out = left_out(targets, seen_offsets, seen_ids, seen_rows, len(vectors))
    log_p = F.log_softmax(logits.masked_fill(out, -torch.inf), dim=1)
    loss = F.nll_loss(log_p, targets, **options)
    mean = log_p.masked_fill(out, 0).sum(1) / (~out).sum(1)
    return (1 - label_smoothing) * loss - label_smoothing * mean


def _registered(*arguments):
    *arguments, backend = arguments
    return resolve("catalog_cross_entropy", backend, *arguments)(*arguments)


_library = torch.library.Library("contrec", "FRAGMENT")
_library.define(
    "catalog_cross_entropy(Tensor queries, Tensor vectors, Tensor targets, float temperature,"
    " str similarity, float label_smoothing, Tensor? seen_offsets, Tensor? seen_ids,"
    " Tensor? seen_rows, str backend) -> Tensor"
)
_library.impl("catalog_cross_entropy", _registered, "CompositeImplicitAutograd")


def catalog_cross_entropy(
    queries: Tensor,
    vectors: Tensor,
    targets: Tensor,
    temperature: float,
    similarity: str = "cosine",
    label_smoothing: float = 0.0,
    seen: SeenLists | None = None,
    seen_rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of `p = softmax(similarity(query, item) / temperature)` at the target.

    With label smoothing e: `-(1 - e) log p[target] - e / M * sum(log p[i])`, the sum over the M
    items that take part in the query's softmax: all but those of its seen list, where the target
    takes part in any case. (Szegedy et al., "Rethinking the Inception Architecture", 2016,
    section 7, as torch.nn.functional.cross_entropy has it.)

    Differentiable in queries and vectors, once. Fused backends recompute tiles of logits instead
    of writing the [B, N] matrix. The same call gives the same bits; by the C++ extension, a query's
    loss and gradient do in any batch.

    Args:
        queries: [B, D]. vectors: [N, D] in the same dtype, N and D at least 1.
        targets: [B] int64 rows of `vectors`.
        temperature: positive. similarity: "cosine" (where rows shorter than 1e-12 are divided by
            that, as in torch.nn.functional.normalize) or "dot".
        label_smoothing: e, from 0 to below 1.
        seen: lists of items to leave out. seen_rows: [B] int64 row of `seen` for each query,
            -1 for none. Given together. A row beyond the lists raises IndexError on the CPU
            and is not checked on a GPU.

    Returns:
        [B] loss in the dtype of the queries.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, value or backend, in one line. A
        target outside the catalog raises IndexError on the CPU and is not checked on a GPU.
    """
    check("queries", queries, ("B", "D"), FLOATS)
    check("vectors", vectors, ("N", queries.shape[1]), (queries.dtype,), like=queries)
    check("targets", targets, (len(queries),), (torch.int64,), like=queries)
    if vectors.numel() == 0:
        raise ValueError(f"vectors: expected at least one item, got {list(vectors.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity: expected 'cosine' or 'dot', got {similarity!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected 0 to below 1, got {label_smoothing}")
    arguments = (
        queries, vectors, targets, float(temperature), similarity, float(label_smoothing),
        *seen_arguments(seen, seen_rows, queries, len(vectors)),
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return torch.ops.contrec.catalog_cross_entropy(*arguments, backend)
    return resolve("catalog_cross_entropy", backend, *arguments)(*arguments)
