"""SASRec with a softmax over the whole catalog: the sequential baseline to beat.

The architecture is that of Kang and McAuley (arXiv 1808.09781); with cross-entropy over the
catalog instead of one sampled negative it is as good as any published variant (Klenitskiy and
Vasilev, "Turning Dross Into Gold Loss", arXiv 2309.07602).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrec_fast.data import Dataset
from contrec_fast.evaluation.trained import TrainedBaseline
from contrec_fast.ops import catalog_cross_entropy


class SASRecNetwork(nn.Module):
    """A causal transformer over item embeddings, which are also the output's weights.

    Pre-norm blocks of attention and a GELU feed-forward of 4 * width; positions are learned and
    count from the oldest item shown.

    Args:
        items: N. width: of the embeddings, divisible by `heads`. length: the longest input.
    """

    def __init__(
        self, items: int, width: int, layers: int, heads: int, length: int, dropout: float
    ):
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, histories: Tensor) -> Tensor:
        """States [B, L, width] of item indices int64 [B, L], oldest first.

        A state depends on nothing to its right, so shorter histories may be filled up there with
        any item.
        """
        x = self.items(histories) * math.sqrt(self.items.embedding_dim)
        x = self.dropout(x + self.positions.weight[: histories.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # [B, L, 3, heads, d]
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(self.feed_forward(x), self.dropout, self.training)


class SASRec(TrainedBaseline):
    """The network above, trained at every position of every history.

    The defaults were chosen by validation NDCG@10 on Amazon software and LastFM.

    Args:
        length: items of the history shown; longer histories are trained on in windows.
        batch: windows a step.
    """

    title = "SASRec"

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        length: int = 50,
        dropout: float = 0.3,
        batch: int = 64,
        weight_decay: float = 0.0,
        epochs: int = 100,
        patience: int = 10,
        every: int = 1,
        learning_rate: float = 2e-3,
        filter_seen: bool = True,
        seed: int = 0,
    ):
        super().__init__(epochs, patience, every, learning_rate, filter_seen, seed)
        self.width, self.layers, self.heads, self.length = width, layers, heads, length
        self.dropout, self.batch, self.weight_decay = dropout, batch, weight_decay

    def train(self, dataset: Dataset) -> Iterator[float]:
        """Raises ValueError when no user has two items."""
        if not any(len(history) > 1 for history in dataset.histories):
            raise ValueError("histories: expected a user with at least two items, found none")
        self.histories = dataset.histories
        self.network = SASRecNetwork(
            len(dataset.items), self.width, self.layers, self.heads, self.length, self.dropout
        ).to(self.device)
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        rng = np.random.default_rng(self.seed)
        while True:
            self.network.train()
            total = positions = 0
            for windows in _batches(self.histories, self.length + 1, self.batch, rng):
                rows, lengths = _padded(windows)
                rows = rows.to(self.device)
                real = torch.arange(rows.shape[1] - 1) < (lengths - 1)[:, None]
                real = real.to(self.device)
                states, targets = self.network(rows[:, :-1])[real], rows[:, 1:][real]
                loss = catalog_cross_entropy(
                    states, self.network.items.weight, targets, 1.0, similarity="dot"
                ).mean()
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"SASRec: expected a finite loss, got {loss.item()}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(targets)
                positions += len(targets)
            self.network.eval()
            yield total / positions

    @torch.no_grad()
    def scores(self, rows: np.ndarray) -> Tensor:
        inputs, lengths = _padded([self.histories[row][-self.length :] for row in rows])
        states = self.network(inputs.to(self.device))
        last = states[torch.arange(len(rows)), lengths - 1]
        return (last @ self.network.items.weight.T).cpu()


def _padded(windows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Item indices [B, L], filled up on the right with item 0, and the lengths [B]."""
    lengths = np.array([len(window) for window in windows])
    rows = np.zeros((len(windows), lengths.max()), dtype=np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.concatenate(windows)
    return torch.from_numpy(rows), torch.from_numpy(lengths)


def _batches(
    histories: list[np.ndarray], size: int, batch: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """One epoch: each history cut into windows of at most `size` items, in batches.

    Neighbouring windows share an item, so that every item but a history's first is a target once.
    Where a long history is first cut is random. Batches hold windows of similar length.
    """
    windows = []
    for history in histories:
        start, steps = 0, size - 1
        end = size if len(history) <= size else int(rng.integers(2, size + 1))
        while start < len(history) - 1:
            windows.append(history[start:end])
            start, end = end - 1, end + steps
    order = rng.permutation(len(windows))
    batches = []
    for chunk in np.split(order, np.arange(16 * batch, len(order), 16 * batch)):
        near = sorted(chunk, key=lambda i: len(windows[i]))
        for first in range(0, len(near), batch):
            batches.append([windows[i] for i in near[first : first + batch]])
    return [batches[i] for i in rng.permutation(len(batches))]
