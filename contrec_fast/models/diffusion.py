"""The diffusion head: a denoiser, its noise schedule and its training losses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrec_fast import ops
from contrec_fast.config import HeadConfig, TrainingConfig
from contrec_fast.models.denoisers import DENOISERS
from contrec_fast.models.losses import dispersive_loss
from contrec_fast.models.schedules import (
    alpha_bars,
    count_noises,
    respaced_indices,
    run_sampler,
    sampler_coefficients,
)

DISPERSIVE_ROWS = 256  # the loss compares all pairs of rows


class DiffusionHead(nn.Module):
    """A denoiser with its noise schedule.

    Args:
        dim: item-space width D.
    """

    def __init__(self, dim: int, config: HeadConfig):
        super().__init__()
        self.config = config
        sizes = {"width": config.width, "depth": config.depth, "separable": config.separable}
        if config.denoiser not in DENOISERS:
            known = ", ".join(DENOISERS)
            raise ValueError(f"head.denoiser: expected one of {known}, got {config.denoiser!r}")
        self.denoiser = DENOISERS[config.denoiser](
            dim, **(sizes if config.denoiser == "adaln" else {})
        )
        alpha_bar = alpha_bars(config.schedule, config.timesteps)
        indices = respaced_indices(config.timesteps, config.steps)
        coefficients = sampler_coefficients(alpha_bar, indices, config.method)
        self.noises = count_noises(coefficients)
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("coefficients", coefficients, persistent=False)

    def losses(
        self, condition: Tensor, items: Tensor, vectors: Tensor, training: TrainingConfig
    ) -> dict[str, Tensor]:
        """Losses of predicting `vectors[items]` from conditions.

        `diffusion`: mean squared error of x0_hat at a random step (targets detached).
        `dispersive`: spreads the predictions. `ranking`: softmax cross-entropy over the whole
        catalog on the output of the inference sampler, unrolled.

        Args:
            condition: [P, D]. items: [P] int64. vectors: [N, D].
        """
        x0 = vectors[items].detach()
        t = torch.randint(self.config.timesteps, (len(x0),), device=x0.device)
        signal = self.alpha_bar[t].to(x0.dtype)[:, None]
        noisy = signal.sqrt() * x0 + (1 - signal).sqrt() * torch.randn_like(x0)
        dropped = torch.rand(len(x0), 1, device=x0.device) < self.config.condition_dropout
        null = self.denoiser.null_condition
        conditioned = torch.where(dropped, null, condition)
        prediction = ops.denoise(self.denoiser, noisy, conditioned, t, guidance=0.0)
        ranking = ops.catalog_cross_entropy(
            self.unroll(condition), vectors, items, training.ranking_temperature
        )
        return {
            "diffusion": F.mse_loss(prediction, x0),
            "dispersive": dispersive_loss(prediction[:DISPERSIVE_ROWS], training.dispersive_tau),
            "ranking": ranking.mean(),
        }

    def unroll(self, condition: Tensor) -> Tensor:
        """Sample as at inference, with gradients and torch's random noise: [P, D] to [P, D]."""

        def predict_x0(x: Tensor, step: int) -> Tensor:
            t = self.indices[step].expand(len(x))
            return ops.denoise(self.denoiser, x, condition, t, self.config.guidance)

        def noise_of(step: int) -> Tensor:
            return torch.randn_like(condition)

        return run_sampler(predict_x0, self.coefficients, self.noises, noise_of)
