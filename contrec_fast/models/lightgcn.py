"""LightGCN: collaborative vectors of users and items (He et al., arXiv 2002.02126)."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LightGCN(nn.Module):
    """Embeddings smoothed over the user-item graph: the mean of `layers` propagations.

    Args:
        pairs: [E, 2] int64 distinct (user, item) pairs.
        users, items: how many of each. dim: width D. layers: propagation steps.
    """

    def __init__(self, pairs: np.ndarray, users: int, items: int, dim: int, layers: int):
        super().__init__()
        self.users, self.layers = users, layers
        self.embedding = nn.Parameter(torch.randn(users + items, dim) * 0.1)
        user, item = torch.from_numpy(pairs).T
        ends = torch.stack([torch.cat([user, item + users]), torch.cat([item + users, user])])
        degree = torch.bincount(ends[0], minlength=users + items).clamp(min=1).float()
        weight = degree[ends[0]].rsqrt() * degree[ends[1]].rsqrt()
        size = (users + items, users + items)
        graph = torch.sparse_coo_tensor(ends, weight, size, check_invariants=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            graph = graph.coalesce().to_sparse_csr()  # its product takes half the time
        self.register_buffer("graph", graph, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Propagated vectors of users [U, D] and items [N, D]."""
        layer, total = self.embedding, self.embedding
        for _ in range(self.layers):
            layer = _Smooth.apply(self.graph, layer)
            total = total + layer
        vectors = total / (self.layers + 1)
        return vectors[: self.users], vectors[self.users :]

    def bpr_loss(self, user: Tensor, item: Tensor, negative: Tensor, decay: float) -> Tensor:
        """Bayesian personalised ranking plus L2 on the raw embeddings of a batch of triples."""
        users, items = self()
        # F.embedding: the gradient of plain indexing depends on how threads interleave.
        pick = F.embedding
        margin = (pick(user, users) * (pick(item, items) - pick(negative, items))).sum(-1)
        raw = pick(torch.cat([user, item + self.users, negative + self.users]), self.embedding)
        return -F.logsigmoid(margin).mean() + decay * raw.square().sum() / (2 * len(user))


class _Smooth(torch.autograd.Function):
    """`graph @ x` for a symmetric graph, which is its own transpose in the gradient."""

    @staticmethod
    def forward(ctx, graph: Tensor, x: Tensor) -> Tensor:
        ctx.graph = graph
        return graph @ x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.graph @ gradient


def whiten(vectors: Tensor) -> Tensor:
    """Centre vectors [N, D] and give them the identity as covariance (ZCA).

    Directions without variance (fewer items than dimensions) stay near zero.
    """
    centred = (vectors - vectors.mean(0)).double()
    values, directions = torch.linalg.eigh(centred.T @ centred / max(len(vectors) - 1, 1))
    floor = values.max() * 1e-6 + 1e-12
    scale = torch.where(values > floor, values.clamp(min=floor).rsqrt(), 0.0)
    return (centred @ (directions * scale) @ directions.T).to(vectors.dtype)
