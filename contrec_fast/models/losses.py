"""Losses of the diffusion head that are more than one library call."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dispersive_loss(z: Tensor, tau: float) -> Tensor:
    """`log E_{i != j} exp(-||z_i - z_j||^2 / (dim tau))` over the rows of z [B, dim].

    Minimising it spreads the rows ("Diffuse and Disperse", arXiv 2506.09027; the released
    ContRec code has the opposite sign). Fewer than two rows give 0.

    Holds matrices of B^2 numbers. For the head's 256 rows that is 0.5 MiB and 65,536 exponentials:
    nothing that a kernel of its own would make noticeably cheaper.
    """
    count, dim = z.shape
    if count < 2:
        return z.new_zeros(())
    # ||a||^2 + ||b||^2 - 2 a.b cancels where rows are near each other and far from their mean: in
    # float32 nothing may be left, in float64 enough is.
    x = z.double()
    x = x - x.mean(0)
    square = x.square().sum(1)
    distance = (square[:, None] + square - 2 * (x @ x.T)).clamp(min=0)
    itself = torch.eye(count, dtype=torch.bool, device=z.device)
    exponents = (distance / (-dim * tau)).masked_fill(itself, -math.inf)
    return (exponents.flatten().logsumexp(0) - math.log(count * (count - 1))).to(z.dtype)


def contrastive_denoising_loss(error_positive: Tensor, error_negative: Tensor) -> Tensor:
    """Mean of `-log sigmoid(error_negative - error_positive)` (DeftRec, arXiv 2504.12007v1).

    Args:
        error_positive, error_negative: [P] mean squared errors of denoising towards the target
        and towards an item that is not. No rows give 0.
    """
    return _preferred(error_negative - error_positive)


def bpr_loss(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean of `-log sigmoid((cos(q, p) - cos(q, n)) / temperature)` (BPR, arXiv 1205.2618).

    Args:
        queries, positives, negatives: [P, D]. No rows give 0.
    """
    better = F.cosine_similarity(queries, positives)
    worse = F.cosine_similarity(queries, negatives)
    return _preferred((better - worse) / temperature)


def _preferred(margin: Tensor) -> Tensor:
    return -F.logsigmoid(margin).sum() / max(len(margin), 1)
