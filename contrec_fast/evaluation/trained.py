"""Baselines trained by gradient descent, for as many epochs as a held-out item says is best."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch

from contrec_fast.data import Dataset
from contrec_fast.environment import default_device
from contrec_fast.evaluation.metrics import rank_metrics
from contrec_fast.evaluation.ranking import recommend
from contrec_fast.models.lightgcn import LightGCN
from contrec_fast.progress import Silent


class TrainedBaseline(ABC):
    """What LightGCN and SASRec share: the choice of the number of epochs.

    The last item of every history is held out, and the epoch with the best NDCG@10 on these items
    is looked for until it has not improved for `patience` epochs. Then training starts anew on
    the whole histories, for as many epochs. The targets of the dataset play no part. The same
    seed gives the same scores on the same machine with the same number of threads; torch's global
    random state is left as it was.

    Args:
        epochs: at most so many; all of them when no history has three items. every: epochs from
        one look at the held-out items to the next. filter_seen: whether lists leave out the
        history, there as in the evaluation.
    """

    title: str

    def __init__(
        self,
        epochs: int,
        patience: int,
        every: int,
        learning_rate: float,
        filter_seen: bool,
        seed: int,
    ):
        self.epochs, self.patience, self.every = epochs, patience, every
        self.learning_rate, self.filter_seen, self.seed = learning_rate, filter_seen, seed
        self.device = default_device()

    @abstractmethod
    def train(self, dataset: Dataset) -> Iterator[float]:
        """Start anew and yield the loss after each epoch, when `scores` works; endless."""

    @abstractmethod
    def scores(self, rows: np.ndarray) -> torch.Tensor:
        """See `evaluation.baselines`."""

    def fit(self, dataset: Dataset, progress=None):
        progress = progress or Silent()
        epochs = self._best_epochs(dataset, progress)
        advance = progress.stage(self.title, epochs, "epochs")
        with _seeded(self.seed, self.device):
            for loss in islice(self.train(dataset), epochs):
                advance(loss=loss)
        self.chosen_epochs = epochs
        return self

    def _best_epochs(self, dataset: Dataset, progress) -> int:
        if not any(len(history) > 2 for history in dataset.histories):
            return self.epochs
        part = dataset.for_validation()
        advance = progress.stage(f"{self.title}, held out", self.epochs, "epochs")
        best, best_epoch = -1.0, 0
        with _seeded(self.seed, self.device):
            for epoch, loss in enumerate(islice(self.train(part), self.epochs), 1):
                if epoch % self.every == 0 or epoch == self.epochs:
                    ids = recommend(self, part, 10, filter_seen=self.filter_seen)
                    value = rank_metrics(ids, part.targets, (10,))["ndcg@10"]
                    if value > best:
                        best, best_epoch = value, epoch
                advance(loss=loss, best=best)
                if best_epoch and epoch - best_epoch >= self.patience:
                    break
        return best_epoch


class LightGCNBaseline(TrainedBaseline):
    """LightGCN with BPR (He et al., arXiv 2002.02126): products of propagated vectors.

    Batches are of 2,048 pairs, but at least 4 and, as each needs a propagation over the whole
    graph, at most 25 to an epoch. Negatives are uniform.

    After `fit`, `item_vectors` are the propagated vectors, float32 [N, D] on the CPU.
    """

    title = "LightGCN baseline"

    def __init__(
        self,
        dim: int = 64,
        layers: int = 3,
        decay: float = 1e-4,
        epochs: int = 300,
        patience: int = 40,
        every: int = 5,
        learning_rate: float = 5e-3,
        filter_seen: bool = True,
        seed: int = 0,
    ):
        super().__init__(epochs, patience, every, learning_rate, filter_seen, seed)
        self.dim, self.layers, self.decay = dim, layers, decay

    def train(self, dataset: Dataset) -> Iterator[float]:
        lengths = [len(history) for history in dataset.histories]
        user = np.repeat(np.arange(len(lengths)), lengths)
        pairs = np.unique(np.stack([user, np.concatenate(dataset.histories)], axis=1), axis=0)
        items = len(dataset.items)
        model = LightGCN(pairs, len(lengths), items, self.dim, self.layers).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), self.learning_rate)
        pairs = torch.from_numpy(pairs).to(self.device)
        batch = max(min(2048, math.ceil(len(pairs) / 4)), math.ceil(len(pairs) / 25))
        while True:
            total = 0.0
            for part in torch.randperm(len(pairs), device=self.device).split(batch):
                user, item = pairs[part].T
                negative = torch.randint(items, item.shape, device=self.device)
                loss = model.bpr_loss(user, item, negative, self.decay)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(part)
            with torch.no_grad():
                self.user_vectors, self.item_vectors = (part.cpu() for part in model())
            yield total / len(pairs)

    def scores(self, rows: np.ndarray) -> torch.Tensor:
        return self.user_vectors[rows] @ self.item_vectors.T


@contextmanager
def _seeded(seed: int, device: torch.device):
    """Torch's random numbers from a seed, and afterwards as if nothing had been drawn."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
