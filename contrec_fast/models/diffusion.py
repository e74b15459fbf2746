"""The diffusion head: a denoiser, its noise schedule and its training losses."""

import torch
from torch import Tensor, nn

from contrec_fast import ops
from contrec_fast.config import HeadConfig, TrainingConfig
from contrec_fast.models.denoisers import DENOISERS
from contrec_fast.models.losses import contrastive_denoising_loss, dispersive_loss
from contrec_fast.models.schedules import (
    alpha_bars,
    count_noises,
    is_multistep,
    respaced_indices,
    run_sampler,
    sampler_coefficients,
    to_x0,
    training_target,
)

DISPERSIVE_ROWS = 256  # the loss compares all pairs of rows


class DiffusionHead(nn.Module):
    """A denoiser with its noise schedule.

    Args:
        dim: width D of what is diffused.
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
        coefficients = sampler_coefficients(alpha_bar, indices, config.method, config.prediction)
        self.noises, self.multistep = count_noises(coefficients), is_multistep(coefficients)
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("coefficients", coefficients, persistent=False)

    def losses(
        self, condition: Tensor, x0: Tensor, negatives: Tensor, training: TrainingConfig
    ) -> dict[str, Tensor]:
        """Losses of predicting x0 from conditions at random steps; those of weight 0 are left out.

        `diffusion`: mean squared error of what the denoiser predicts (x0, noise or v).
        `dispersive`: spreads the predicted x0. `contrastive`: with the same condition, step and
        noise, x0 is denoised better than another vector.

        Args:
            condition, x0, negatives: [P, D]; gradients reach the condition only.
        """
        weights = (
            training.diffusion_weight, training.dispersive_weight, training.contrastive_weight,
        )  # fmt: skip
        if not any(weights):
            return {}
        x0, negatives = x0.detach(), negatives.detach()
        t = torch.randint(self.config.timesteps, (len(x0),), device=x0.device)
        signal = self.alpha_bar[t].to(x0.dtype)[:, None]
        noise = torch.randn_like(x0)
        drop = torch.rand(len(x0), device=x0.device) < self.config.condition_dropout

        def errors(clean: Tensor) -> tuple[Tensor, Tensor]:
            """Squared error [P] and the predicted x0 [P, D] for some clean vectors."""
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            output = ops.denoise(self.denoiser, noisy, condition, t, 0.0, drop)
            target = training_target(self.config.prediction, clean, noise, signal)
            error = (output - target).square().mean(-1)
            return error, to_x0(self.config.prediction, output, noisy, signal)

        error, predicted = errors(x0)
        losses = {}
        if training.diffusion_weight:
            losses["diffusion"] = error.mean()
        if training.dispersive_weight:
            losses["dispersive"] = dispersive_loss(
                predicted[:DISPERSIVE_ROWS], training.dispersive_tau
            )
        if training.contrastive_weight:
            losses["contrastive"] = contrastive_denoising_loss(error, errors(negatives)[0])
        return losses

    def unroll(self, condition: Tensor) -> Tensor:
        """Sample as at inference, with gradients and torch's random noise: [P, D] to [P, D].

        Without diffusion (`head.diffusion`), the condition itself.
        """
        if not self.config.diffusion:
            return condition

        def network(x: Tensor, step: int) -> Tensor:
            t = self.indices[step : step + 1]
            return ops.denoise(self.denoiser, x, condition, t, self.config.guidance)

        def noise_of(step: int) -> Tensor:
            return torch.randn_like(condition)

        return run_sampler(network, self.coefficients, self.noises, noise_of, self.multistep)
