"""Losses of the diffusion head that are more than one library call."""

import math

import torch
from torch import Tensor


def dispersive_loss(z: Tensor, tau: float) -> Tensor:
    """`log E_{i != j} exp(-||z_i - z_j||^2 / (dim tau))` over the rows of z [B, dim].

    Minimising it spreads the rows ("Diffuse and Disperse", arXiv 2506.09027; the released
    ContRec code has the opposite sign). Fewer than two rows give 0.
    """
    if len(z) < 2:
        return z.new_zeros(())
    row, column = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    # index_select: the gradient of plain indexing depends on how threads interleave.
    distance = (z.index_select(0, row) - z.index_select(0, column)).square().mean(-1)
    return torch.logsumexp(-distance / tau, dim=0) - math.log(len(distance))
