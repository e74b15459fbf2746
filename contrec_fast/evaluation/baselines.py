"""Cheap baselines, printed beside every model's result because they beat several published ones.

A baseline has `fit(dataset)`, which reads the histories only (never a target) and returns the
baseline, and `scores(rows)`: user rows int64 [B] of that dataset -> float32 [B, N].
"""

import warnings

import numpy as np
import torch

from contrec_fast.data import Dataset
from contrec_fast.evaluation.metrics import rank_metrics


class Popularity:
    """The number of interactions of each item, the same for every user."""

    def fit(self, dataset: Dataset) -> "Popularity":
        counts = np.bincount(np.concatenate(dataset.histories), minlength=len(dataset.items))
        self.counts = torch.from_numpy(counts).float()
        return self

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        return self.counts.expand(len(rows), -1)


class ItemKNN:
    """Cosine similarity between items as binary user vectors, summed over the user's items.

    All neighbours count and none is shrunk. Memory grows with the number of item pairs that share
    a user, not with N squared.
    """

    def fit(self, dataset: Dataset) -> "ItemKNN":
        self.histories = [np.unique(history) for history in dataset.histories]
        self.items = len(dataset.items)
        users = self._binary(np.arange(len(self.histories)))
        item_norms = torch.sparse.sum(users, dim=0).to_dense().sqrt().clamp(min=1)
        user, item = users.indices()
        unit = _sparse(user, item, users.values() / item_norms[item], users.shape)
        similarity = _product(unit.t(), unit).coalesce()
        left, right = similarity.indices()
        other = left != right
        self.similarity = _sparse(
            left[other], right[other], similarity.values()[other], similarity.shape
        )
        return self

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        return _product(self._binary(rows), self.similarity).to_dense().float()

    def _binary(self, rows: np.ndarray) -> torch.Tensor:
        """[B, N] sparse, 1 where the user has the item."""
        chosen = [self.histories[row] for row in rows]
        users = np.repeat(np.arange(len(rows)), [len(history) for history in chosen])
        items = np.concatenate(chosen)
        return _sparse(users, items, torch.ones(len(items)), (len(rows), self.items))


class Markov:
    """First-order: how often each item directly followed the user's last one.

    Most of these counts are equal, so 0.001 times the ItemKNN score decides between them.
    """

    def fit(self, dataset: Dataset) -> "Markov":
        self.neighbours = ItemKNN().fit(dataset)
        self.last = np.array([history[-1] for history in dataset.histories])
        before = np.concatenate([history[:-1] for history in dataset.histories])
        after = np.concatenate([history[1:] for history in dataset.histories])
        items = len(dataset.items)
        self.transitions = _sparse(before, after, torch.ones(len(before)), (items, items))
        return self

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        shape = (len(rows), self.transitions.shape[0])
        last = _sparse(np.arange(len(rows)), self.last[rows], torch.ones(len(rows)), shape)
        counts = _product(last, self.transitions).to_dense().float()
        return counts + 0.001 * self.neighbours.scores(rows)


def recommend(baseline, dataset: Dataset, k: int, batch: int = 256) -> np.ndarray:
    """The k best items of every user, [U, k] int64, best first, without the user's history.

    Ties go to the lower index; -1 where fewer than k items are left. baseline is a fitted one
    (see the module); batch is the number of users scored at a time.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    users, items = len(dataset.histories), len(dataset.items)
    ids = np.full((users, k), -1, dtype=np.int64)
    for start in range(0, users, batch):
        rows = np.arange(start, min(start + batch, users))
        scores = baseline.scores(rows).clone()
        for position, row in enumerate(rows):
            scores[position, torch.from_numpy(dataset.histories[row])] = -torch.inf
        best = _top_ids(scores, min(k, items))
        ids[rows, : best.shape[1]] = best.numpy()
    return ids


def evaluate_baselines(dataset: Dataset) -> dict[str, dict[str, float]]:
    """{"popularity": metrics, "markov": metrics} with `rank_metrics` at its usual cutoffs."""
    baselines = {"popularity": Popularity(), "markov": Markov()}
    return {
        name: rank_metrics(recommend(baseline.fit(dataset), dataset, 20), dataset.targets)
        for name, baseline in baselines.items()
    }


def _top_ids(scores: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [B, k] of float32 [B, N]: by score, then by lower index; -1 for a score of -inf."""
    # One integer per entry that orders like (score, -index): torch.topk promises nothing on ties.
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) + torch.arange(scores.shape[1] - 1, -1, -1)
    ids = scores.shape[1] - 1 - (keys.topk(k).values & 0xFFFFFFFF)
    return torch.where(scores.gather(1, ids) == -torch.inf, -1, ids)


def _sparse(rows, columns, values: torch.Tensor, shape) -> torch.Tensor:
    """A coalesced float64 sparse matrix; values at the same place add up.

    Doubles, so that sums which are equal but added in another order stay ties as floats.
    """
    indices = torch.stack([torch.as_tensor(rows), torch.as_tensor(columns)])
    return torch.sparse_coo_tensor(
        indices, values.double(), shape, check_invariants=False
    ).coalesce()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        # Where MKL does the product, torch calls its compressed format "beta"; nothing to act on.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse.mm(left, right)
