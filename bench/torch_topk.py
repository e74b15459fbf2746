"""Cosine-plus-bonus top-K with plain PyTorch: product, bonus, seen mask, topk.

    python bench/torch_topk.py

The baseline a fused top-K has to beat: it writes the [B, N] scores, a chunk of users at a time.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_timing import arguments, measure, relative_error, report


def torch_topk(
    queries: Tensor,
    items: Tensor,
    groups: Tensor,
    matched: Tensor,
    seen_rows: Tensor,
    seen_ids: Tensor,
    pi: float,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Top k of cos(query, item) * (1 + pi * [the item's group is matched]), seen items left out.

    Args:
        queries: [B, D]. items: [N, D], rows of length 1, in the dtype of the product.
        groups: [N] int64. matched: [B, G] bool. seen_rows, seen_ids: [E] int64, the pairs
            (row of the batch, item) to leave out. k: at most N.

    Returns:
        scores [B, k] in the dtype of items, descending, and ids [B, k] int64.
    """
    scores = F.normalize(queries, dim=1).to(items.dtype) @ items.T
    scores.addcmul_(scores, matched.to(items.dtype)[:, groups], value=pi)
    scores[seen_rows, seen_ids] = -torch.inf
    return scores.topk(k)


def main() -> bool:
    asked = arguments(
        __doc__.splitlines()[0],
        batches=[1, 64, 1024, 4096],
        items=1_000_000,
        dim=512,
        k=20,
        groups=64,
        seen=50,
        chunk=512,
    )
    device, pi, right = asked.device, 0.1, True
    items = F.normalize(torch.randn(asked.items, asked.dim, device=device), dim=1)
    items = items.to(torch.bfloat16)
    groups = torch.randint(asked.groups, (asked.items,), device=device)
    for batch in asked.batches:
        queries = torch.randn(batch, asked.dim, device=device)
        matched = torch.rand(batch, asked.groups, device=device) < 2 / asked.groups
        seen = torch.randint(asked.items, (batch, asked.seen), device=device)
        chunks = []
        for at in range(0, batch, asked.chunk):
            part = slice(at, min(at + asked.chunk, batch))
            ids = seen[part]
            rows = torch.arange(len(ids), device=device).repeat_interleave(asked.seen)
            chunks.append((queries[part], items, groups, matched[part], rows, ids.flatten()))

        def call(chunks=chunks):
            return [torch_topk(*chunk, pi, asked.k) for chunk in chunks]

        # One user in float64: its list's scores in bf16 must be the best ones to bf16 rounding.
        best, ids = call()[0]
        exact = F.normalize(queries[:1].double(), dim=1) @ items.double().T
        exact *= 1 + pi * matched[:1].double()[:, groups]
        exact[0, seen[0]] = -torch.inf
        error = relative_error(best[:1], exact.topk(asked.k).values)
        unseen = not torch.isin(ids[0], seen[0]).any().item()
        right &= error < 1e-2 and unseen
        del exact, best, ids
        timing = measure(call, device)
        report(
            "torch_topk",
            batch=batch,
            items=asked.items,
            dim=asked.dim,
            k=asked.k,
            chunk=asked.chunk,
            **timing,
            us_per_user=timing["median"] / batch,
            tflop_s=2e-6 * batch * asked.items * asked.dim / timing["median"],
            relative_error=error,
            verified=error < 1e-2 and unseen,
        )
    return right


if __name__ == "__main__":
    sys.exit(not main())
