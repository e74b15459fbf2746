"""The discrete tokenizer, for comparison: an item's vector to K codes, residual by residual.

Residual quantisation as in RQ-VAE (arXiv 2203.01941) and TIGER (arXiv 2305.05065), fitted by
k-means on the vectors themselves, one level after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 8192  # rows compared with all centroids at once


class ResidualQuantizer(nn.Module):
    """Level k's code is the centroid nearest to what the levels before it left of the vector.

    `embedding` [K, codes, H] is what the language model sees of a code: rows like those of its
    vocabulary, learned with the model. `centroids` [K, codes, D] are fitted by `fit`.

    Args:
        dim: item-space width D. hidden: token width H. tokens: levels K. codes: per level.
    """

    def __init__(self, dim: int, hidden: int, tokens: int, codes: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(tokens, codes, dim))
        self.embedding = nn.Parameter(torch.randn(tokens, codes, hidden) * 0.02)

    @torch.no_grad()
    def fit(self, vectors: Tensor, iterations: int, advance) -> None:
        """k-means on vectors [N, D], N at least 1, by torch's random numbers.

        Args:
            iterations: rounds of Lloyd's algorithm, dealt out to the levels.
            advance: called as `advance(loss=float)` after each round with the mean squared error
            that the levels so far leave.
        """
        residual, levels = vectors, len(self.centroids)
        for level, centroids in enumerate(self.centroids):
            centroids.copy_(_spread_rows(residual, len(centroids)))
            for _ in range(level, iterations, levels):
                nearest, distance = _nearest(residual, centroids)
                advance(loss=float(distance.square().sum() / max(vectors.numel(), 1)))
                _move(centroids, residual, nearest, distance)
            residual = residual - centroids[_nearest(residual, centroids)[0]]

    @torch.no_grad()
    def codes_of(self, x: Tensor) -> Tensor:
        """Vectors [N, D] to codes [N, K] int64; among equally near centroids, the first."""
        codes = x.new_empty(len(x), len(self.centroids), dtype=torch.int64)
        for level, centroids in enumerate(self.centroids):
            codes[:, level] = _nearest(x, centroids)[0]
            x = x - centroids[codes[:, level]]
        return codes

    def encode(self, x: Tensor) -> Tensor:
        """Vectors [N, D] to their codes' embeddings [N, K, H]; no gradient reaches x."""
        return F.embedding(self._rows(x), self.embedding.flatten(0, 1))

    def quantise(self, x: Tensor) -> Tensor:
        """Vectors [N, D] to the sums of their centroids [N, D]."""
        return F.embedding(self._rows(x), self.centroids.flatten(0, 1)).sum(1)

    def _rows(self, x: Tensor) -> Tensor:
        levels, codes, _ = self.centroids.shape
        return self.codes_of(x) + torch.arange(levels, device=x.device) * codes


def _nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of x [N, D], the nearest centroid [N] int64 and the distance to it [N].

    Differences, not products: the same for a row whatever the rows beside it.
    """
    found = [
        torch.cdist(part, centroids, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for part in x.split(CHUNK)
    ]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def _spread_rows(x: Tensor, count: int) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): rows drawn by their squared distance to the others.

    Where all rows of x [N, D] are taken, some are drawn again: [count, D].
    """
    chosen = torch.randint(len(x), (1,), device=x.device)
    rows, distance = [x[chosen]], None
    for _ in range(count - 1):
        to_last = (x - rows[-1]).square().sum(1)
        distance = to_last if distance is None else torch.minimum(distance, to_last)
        weight = distance if distance.any() else torch.ones_like(distance)
        rows.append(x[torch.multinomial(weight, 1)])
    return torch.cat(rows)


def _move(centroids: Tensor, x: Tensor, nearest: Tensor, distance: Tensor) -> None:
    """Centroids to the means of their rows; those without rows, to the rows worst served."""
    count, total = centroids.new_zeros(len(centroids)), torch.zeros_like(centroids)
    for part, code in zip(x.split(CHUNK), nearest.split(CHUNK)):
        # A product, not index_add: on a GPU that one adds in any order.
        member = F.one_hot(code, len(centroids)).to(x.dtype)
        count += member.sum(0)
        total += member.T @ part
    used = count > 0
    centroids[used] = total[used] / count[used, None]
    far = distance.topk(min(int((~used).sum()), len(x)))
    free = (~used).nonzero()[: len(far.indices), 0]
    centroids[free] = x[far.indices]
