"""From a baseline's scores to lists."""

import numpy as np
import torch

from contrec_fast.data import Dataset


def recommend(
    baseline, dataset: Dataset, k: int, batch: int = 256, filter_seen: bool = True
) -> np.ndarray:
    """The k best items of every user, [U, k] int64, best first.

    Ties go to the lower index; -1 where fewer than k items are left.

    Args:
        baseline: a fitted one (see `evaluation.baselines`). batch: users scored at a time.
        filter_seen: leave out the items of the user's own history.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    users, items = len(dataset.histories), len(dataset.items)
    ids = np.full((users, k), -1, dtype=np.int64)
    for start in range(0, users, batch):
        rows = np.arange(start, min(start + batch, users))
        scores = baseline.scores(rows)
        if filter_seen:
            scores = scores.clone()
            for position, row in enumerate(rows):
                scores[position, torch.from_numpy(dataset.histories[row])] = -torch.inf
        best = _top_ids(scores, min(k, items))
        ids[rows, : best.shape[1]] = best.numpy()
    return ids


def _top_ids(scores: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [B, k] of float32 [B, N]: by score, then by lower index; -1 for a score of -inf."""
    # One integer per entry that orders like (score, -index): torch.topk promises nothing on ties.
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) + torch.arange(scores.shape[1] - 1, -1, -1)
    ids = scores.shape[1] - 1 - (keys.topk(k).values & 0xFFFFFFFF)
    return torch.where(scores.gather(1, ids) == -torch.inf, -1, ids)
