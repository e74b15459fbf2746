"""Hit rate and NDCG over the whole catalog with one held-out item per user (leave-one-out), and
what lists are like beyond them: coverage and diversity."""

import numpy as np

from contrec_fast.data import Dataset


def user_metrics(ids, targets, cutoffs: tuple[int, ...] = (10, 20)) -> dict[str, np.ndarray]:
    """{"hr@k", "ndcg@k"} for each cutoff k: float64 [users with a target], in their order.

    ids: [U, at least max(cutoffs)] recommended item indices, best first, -1 where a list is over.
    targets: [U] held-out item indices, -1 where a user has none.
    HR@k of a user is 1 if the target is among the first k and otherwise 0; with one relevant item
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

    hits = (ids == targets[:, None]).astype(float)
    gains = hits / np.log2(np.arange(ids.shape[1]) + 2)
    values = {}
    for cutoff in cutoffs:
        values[f"hr@{cutoff}"] = hits[:, :cutoff].sum(axis=1)
        values[f"ndcg@{cutoff}"] = gains[:, :cutoff].sum(axis=1)
    return values


def rank_metrics(ids, targets, cutoffs: tuple[int, ...] = (10, 20)) -> dict[str, float]:
    """The means of `user_metrics` over the users that have a target."""
    values = user_metrics(ids, targets, cutoffs)
    return {name: float(per_user.mean()) for name, per_user in values.items()}


def catalog_coverage(ids, items: int, k: int = 10) -> float:
    """The share of the catalog that is in anybody's list: |union of the first k of all| / items.

    ids: [U, at least k] item indices, -1 where a list is over.
    """
    ids = np.asarray(ids)[:, :k]
    return len(np.unique(ids[ids >= 0])) / items


def list_diversity(ids, vectors, k: int = 10) -> float:
    """Intra-list diversity: how far apart the items of a list are, as the mean over lists.

    Of a list of m items, 1 / (m (m - 1)) * the sum of 1 - cos(v_i, v_j) over i != j; a vector of
    zeros has the cosine 0 with every other. Lists of fewer than two items do not count; 0 when
    there is no other.

    ids: [U, at least k] item indices, -1 where a list is over. vectors: [N, D], any vectors in
    which likeness is a cosine; `evaluate` takes the propagated ones of its LightGCN baseline.
    """
    ids, vectors = np.asarray(ids)[:, :k], np.asarray(vectors, dtype=np.float64)
    ids = ids[(ids >= 0).sum(axis=1) > 1]
    if not len(ids):
        return 0.0
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    total, own = np.zeros((len(ids), vectors.shape[1])), np.zeros(len(ids))
    for column in ids.T:
        rows = unit[column] * (column >= 0)[:, None]
        total += rows
        own += np.square(rows).sum(axis=1)
    pairs = (ids >= 0).sum(axis=1) * ((ids >= 0).sum(axis=1) - 1)
    # The cosines of all pairs add up to |sum of unit vectors|^2 less each with itself.
    return float((1 - (np.square(total).sum(axis=1) - own) / pairs).mean())


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
