"""Baselines, printed beside every model's result because they beat several published ones.

A baseline has `fit(dataset)`, which reads the histories only (never a target) and returns the
baseline, and `scores(rows)`: user rows int64 [B] of that dataset -> float32 [B, N]. Those that
count are here; those that are trained (`evaluation.trained`, `evaluation.sasrec`) show their
progress: `fit(dataset, progress)`.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from contrec_fast.data import Dataset
from contrec_fast.evaluation.metrics import rank_metrics
from contrec_fast.evaluation.ranking import recommend
from contrec_fast.evaluation.sasrec import SASRec
from contrec_fast.evaluation.trained import LightGCNBaseline, TrainedBaseline
from contrec_fast.progress import Silent


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
        users = _binary(self.histories, self.items)
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
        chosen = _binary([self.histories[row] for row in rows], self.items)
        return _product(chosen, self.similarity).to_dense().float()


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


class CatalogTooLarge(ValueError):
    """A baseline that needs a matrix of items by items cannot have one."""


class EASE:
    """The closed-form linear autoencoder (Steck, arXiv 1905.03375).

    With the binary matrix X [U, N] and P = (X^T X + l2 I)^-1, the weights are B = I - P / diag(P)
    (each column divided by its own entry of the diagonal), whose diagonal is zero, and the scores
    are X B. Both N x N matrices are held in float32: 1.6 GB each at the largest catalog.

    Args:
        l2: the paper's lambda. By validation NDCG@10 on Amazon software and LastFM 100 is best of
            100, 200, 300 and 500 in sum; they differ little.

    Raises:
        CatalogTooLarge: by `fit`, for more than 20,000 items.
    """

    LARGEST = 20_000

    def __init__(self, l2: float = 100.0):
        self.l2 = l2

    def fit(self, dataset: Dataset) -> "EASE":
        self.items = len(dataset.items)
        if self.items > self.LARGEST:
            raise CatalogTooLarge(
                f"items: expected at most {self.LARGEST} for EASE, which inverts a matrix of "
                f"items by items, got {self.items}"
            )
        self.histories = [np.unique(history) for history in dataset.histories]
        users = _binary(self.histories, self.items)
        gram = _product(users.t(), users).to_dense().float()
        gram.diagonal().add_(self.l2)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.weights = inverse.div_(-inverse.diagonal().clone())
        self.weights.fill_diagonal_(0)
        return self

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        chosen = _binary([self.histories[row] for row in rows], self.items)
        return _product(chosen.float(), self.weights)


QUICK = ("popularity", "itemknn", "markov")
BASELINES = {
    "popularity": Popularity,
    "itemknn": ItemKNN,
    "markov": Markov,
    "ease": EASE,
    "lightgcn": LightGCNBaseline,
    "sasrec": SASRec,
}


def fit_baselines(
    dataset: Dataset, names: Sequence[str], progress=None, filter_seen: bool = True
) -> Iterator[tuple[str, object]]:
    """Pairs of a name and that baseline, fitted, one after the other.

    Args:
        names: of `BASELINES`. progress: shows the long ones (`progress.ProgressBars`), and says
        which one is left out because the catalog is too large for it.
        filter_seen: what lists will be made of it, for the choice of epochs.

    Raises:
        ValueError: an unknown name, before anything is fitted.
    """
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"baselines: expected some of {', '.join(BASELINES)}, got {name!r}")
    return _fitted(dataset, names, progress or Silent(), filter_seen)


def _fitted(dataset, names, progress, filter_seen):
    for name in names:
        kind = BASELINES[name]
        trained = issubclass(kind, TrainedBaseline)
        try:
            baseline = kind(filter_seen=filter_seen) if trained else kind()
            baseline = baseline.fit(dataset, progress) if trained else baseline.fit(dataset)
        except CatalogTooLarge as error:
            progress.say(f"{name} is left out: {error}")
            continue
        yield name, baseline


def evaluate_baselines(
    dataset: Dataset, names: Sequence[str] = QUICK, progress=None, filter_seen: bool = True
) -> dict[str, dict[str, float]]:
    """{name: `rank_metrics` at its usual cutoffs}; see `fit_baselines`."""
    return {
        name: rank_metrics(
            recommend(baseline, dataset, 20, filter_seen=filter_seen), dataset.targets
        )
        for name, baseline in fit_baselines(dataset, names, progress, filter_seen)
    }


def _binary(histories: list[np.ndarray], items: int) -> torch.Tensor:
    """[B, N] sparse, 1 where the user has the item; histories without repeats."""
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    chosen = np.concatenate(histories)
    return _sparse(users, chosen, torch.ones(len(chosen)), (len(histories), items))


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
