"""The sigma-VAE tokenizer: an item's vector to K continuous tokens and back.

ContRec (arXiv 2504.12007), after the sigma-VAE of LatentLM (arXiv 2412.08635). Three devices
keep it from collapsing: a masked input, K codes whose mean is decoded, and a variance that is
drawn instead of learned.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from contrec_fast.ops.gather import FactoredTable


def _perceptron(sizes: list[int], dropout: float) -> nn.Sequential:
    layers = []
    for width_in, width_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out)]
        layers += [nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


class SigmaVAE(nn.Module):
    """`mu_k = Enc_k(mask(x) + p_k)`, `z_k = mu_k + sigma noise`, `x_hat = Dec(mean_k z_k)`.

    Args:
        dim: item-space width D. hidden: token width H. tokens: K.
        sigma: scale C of the drawn deviation, `sigma = |s|, s ~ N(0, C)` per sample.
        mask_ratio: share of masked input elements in training. dropout: in every layer.
    """

    def __init__(
        self, dim: int, hidden: int, tokens: int, sigma: float, mask_ratio: float, dropout: float
    ):
        super().__init__()
        self.sigma, self.mask_ratio = sigma, mask_ratio
        self.fill = nn.Parameter(torch.zeros(dim))
        self.position = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.encoders = nn.ModuleList(
            _perceptron([dim, 128, 256, hidden], dropout) for _ in range(tokens)
        )
        self.decoder = _perceptron([hidden, 256, 128, dim], dropout)

    def encode(self, x: Tensor) -> Tensor:
        """Vectors [N, D] to the means of their tokens [N, K, H]."""
        codes = [encoder(x + p) for encoder, p in zip(self.encoders, self.position)]
        return torch.stack(codes, dim=1)

    def factored(self, x: Tensor, scale: Tensor | float = 1.0) -> FactoredTable:
        """`scale * encode(x)` of vectors [N, D] as a table of N K rows, row `item * K + k`."""
        hidden = [encoder[:-1](x + p) for encoder, p in zip(self.encoders, self.position)]
        last = [encoder[-1] for encoder in self.encoders]
        return FactoredTable(
            torch.stack(hidden, dim=1).flatten(0, 1),
            torch.stack([layer.weight for layer in last]) * scale,
            torch.stack([layer.bias for layer in last]) * scale,
        )

    def decode(self, z: Tensor) -> Tensor:
        """Tokens [N, K, H] to vectors [N, D]."""
        return self.decoder(z.mean(1))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Training losses of a batch [N, D], N at least 2.

        `reconstruction`: mean squared error. `mean`: what is left of the KL term when sigma is
        fixed. `redundancy`: Barlow Twins (arXiv 2103.03230) between each two of the K codes,
        off-diagonal weight 0.005, per dimension.
        """
        masked = torch.where(torch.rand_like(x) < self.mask_ratio, self.fill, x)
        mu = self.encode(masked)
        sigma = (self.sigma * torch.randn(len(x), 1, 1, device=x.device, dtype=x.dtype)).abs()
        z = mu + sigma * torch.randn_like(mu)
        return {
            "reconstruction": F.mse_loss(self.decode(z), x),
            "mean": mu.square().mean(),
            "redundancy": _redundancy(mu),
        }


def fold_batch_norms(tokenizer: SigmaVAE) -> SigmaVAE:
    """A copy for inference: each BatchNorm becomes a part of the linear layer before it.

    `encode` and `decode` are, up to rounding, what they are in eval mode; there is no dropout left.
    """
    folded = copy.deepcopy(tokenizer).eval()
    folded.encoders = nn.ModuleList(map(_folded, folded.encoders))
    folded.decoder = _folded(folded.decoder)
    return folded


def _folded(layers: nn.Sequential) -> nn.Sequential:
    kept = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            kept[-1] = fuse_linear_bn_eval(kept[-1], layer)
        elif not isinstance(layer, nn.Dropout):
            kept.append(layer)
    return nn.Sequential(*kept)


def _redundancy(codes: Tensor) -> Tensor:
    """Barlow Twins loss averaged over the pairs of codes [N, K, H]; 0 for a single code."""
    count, tokens, hidden = codes.shape
    unit = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-6)
    total = codes.new_zeros(())
    for i in range(tokens):
        for j in range(i):
            correlation = unit[:, i].T @ unit[:, j] / count
            diagonal = correlation.diagonal()
            off = correlation.square().sum() - diagonal.square().sum()
            total = total + ((diagonal - 1).square().sum() + 0.005 * off) / hidden
    return total / max(tokens * (tokens - 1) // 2, 1)


@torch.no_grad()
def collapse_report(tokens: Tensor, vectors: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """Whether the tokens of N different items still tell them apart, in five figures.

    Args:
        tokens: [N, K, H]. vectors: [N, D], what they were made of. reconstruction: [N, D], what
        can be made of them.

    Returns:
        `explained`: 1 - mean squared error / variance of the vectors; 0 where these are equal.
        `rank`, `rank_of_vectors`: effective rank (`effective_rank`) of tokens and of vectors.
        `redundancy`: mean absolute correlation of the same dimension of two codes; 1 where no
        dimension varies, 0 for a single code. The Barlow Twins term drives it towards 1.
        `active`: share of the tokens' K H dimensions with a standard deviation above 1 % of the
        mean one.
    """
    error = (reconstruction.double() - vectors.double()).square().mean()
    variance = vectors.double().var(0, correction=0).mean()
    flat = _centred(tokens.flatten(1))
    deviation = flat.square().mean(0).sqrt()
    return {
        "explained": float(1 - error / variance) if variance > 0 else 0.0,
        "rank": effective_rank(tokens.flatten(1)),
        "rank_of_vectors": effective_rank(vectors),
        "redundancy": _mean_correlation(flat.unflatten(1, tokens.shape[1:]), deviation),
        "active": float((deviation > 0.01 * deviation.mean()).double().mean()),
    }


def effective_rank(x: Tensor) -> float:
    """Effective rank of centred rows [N, dim], between 1 and min(N - 1, dim); 0 if all are equal.

    The exponential of the entropy of the squared singular values' shares (after Roy & Vetterli,
    EUSIPCO 2007, who take the singular values themselves): here, shares of variance.
    """
    x = _centred(x)
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    if not values.any():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _centred(x: Tensor) -> Tensor:
    """Rows [N, dim] less their mean, in float64; exactly 0 where they differ by rounding only."""
    x = x.double()
    centred = x - x.mean(0)
    varies = centred.square().mean(0) > 1e-12 * x.square().mean(0)
    return torch.where(varies, centred, 0.0)


def _mean_correlation(codes: Tensor, deviation: Tensor) -> float:
    """Mean absolute correlation of centred codes [N, K, H] of deviations [K H], pair by pair."""
    tokens, hidden = codes.shape[1:]
    if tokens < 2:
        return 0.0
    unit = torch.where(deviation > 0, codes.flatten(1) / deviation, 0.0).unflatten(
        1, codes.shape[1:]
    )
    varies = (deviation > 0).view(tokens, hidden)
    first, second = torch.triu_indices(tokens, tokens, offset=1, device=codes.device)
    both = varies[first] & varies[second]
    if not both.any():
        return 1.0
    return float((unit[:, first] * unit[:, second]).mean(0).abs()[both].mean())
