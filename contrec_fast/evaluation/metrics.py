"""Hit rate and NDCG over the whole catalog with one held-out item per user (leave-one-out)."""

import numpy as np

from contrec_fast.data import Dataset


def rank_metrics(ids, targets, cutoffs: tuple[int, ...] = (10, 20)) -> dict[str, float]:
    """{"hr@k", "ndcg@k"} for each cutoff k, means over the users that have a target.

    ids: [U, at least max(cutoffs)] recommended item indices, best first, -1 where a list is over.
    targets: [U] held-out item indices, -1 where a user has none.
    HR@k is the share of users whose target is among the first k; with one relevant item
    NDCG@k is 1 / log2(rank + 1) for a target at rank <= k (from 1), otherwise 0.
    Raises ValueError for other shapes, an item twice in a list, or no user with a target.
    """
    ids, targets = np.asarray(ids), np.asarray(targets)
    if targets.ndim != 1:
        raise ValueError(f"targets: expected shape [U], got {list(targets.shape)}")
    if ids.ndim != 2 or len(ids) != len(targets) or ids.shape[1] < max(cutoffs):
        raise ValueError(
            f"ids: expected shape [{len(targets)}, at least {max(cutoffs)}], got {list(ids.shape)}"
        )
    ids, targets = ids[targets >= 0, : max(cutoffs)], targets[targets >= 0]
    if not len(targets):
        raise ValueError("targets: expected at least one user with a target, got none")
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        item = ordered[:, 1:][twice][0]
        raise ValueError(f"ids: expected different items in each list, got item {item} twice")

    hits = ids == targets[:, None]
    gains = hits / np.log2(np.arange(ids.shape[1]) + 2)
    means = {}
    for cutoff in cutoffs:
        means[f"hr@{cutoff}"] = float(hits[:, :cutoff].any(axis=1).mean())
        means[f"ndcg@{cutoff}"] = float(gains[:, :cutoff].sum(axis=1).mean())
    return means


def target_counts(dataset: Dataset) -> dict[str, int]:
    """How many held-out items there are, and how many of them are hard or impossible to find.

    total: users with a target. in_history: the target is in the user's own history, so it is
    unreachable when history is excluded. unseen: the target is in nobody's history, so there is
    nothing to learn it from but its text.
    """
    with_target = np.flatnonzero(dataset.targets >= 0)
    targets = dataset.targets[with_target]
    seen = np.zeros(len(dataset.items), dtype=bool)
    for history in dataset.histories:
        seen[history] = True
    own = [dataset.targets[row] in dataset.histories[row] for row in with_target]
    return {
        "total": len(targets),
        "in_history": sum(own),
        "unseen": int((~seen[targets]).sum()),
    }
