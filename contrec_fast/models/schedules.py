"""Noise schedules, the coefficients of diffusion samplers (float64) and the sampler loop.

Step indices run from 0 (least noise) to T-1 (most noise); `alpha_bar[n]` is the share of the
signal's variance left at step n: `x_n = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCHEDULES = ("exp",)
PREDICTIONS = ("x0",)
METHODS = ("ddpm", "ddim")


def alpha_bars(schedule: str, timesteps: int) -> Tensor:
    """Cumulative signal share of each step.

    `exp` is the schedule of the released ContRec code:
    `beta_n = 1 - exp(-b0/T - x_n (b1 - b0) / (2 T^2))`, `x_n = linspace(1, 2T + 1, T)`,
    `b0 = 0.1`, `b1 = 10`.

    Returns:
        [T] float64, decreasing.

    Raises:
        ValueError: unknown schedule, or fewer than one step.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if timesteps < 1:
        raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
    b0, b1 = 0.1, 10.0
    x = torch.linspace(1, 2 * timesteps + 1, timesteps, dtype=torch.float64)
    log_alpha = -b0 / timesteps - x * (b1 - b0) / (2 * timesteps**2)
    return log_alpha.cumsum(0).exp()


def respaced_indices(timesteps: int, steps: int | None) -> Tensor:
    """Which of the T steps a sampler visits, most noise first.

    Evenly spaced from T-1 down to 0; a single step is T-1 alone.

    Returns:
        [steps] int64, strictly decreasing.
    """
    steps = timesteps if steps is None else steps
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps: expected 1 to timesteps ({timesteps}), got {steps}")
    if steps == 1:
        return torch.tensor([timesteps - 1])
    return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64).round().long()


def sampler_coefficients(alpha_bar: Tensor, indices: Tensor, method: str) -> Tensor:
    """Coefficients of `x <- c_x0 * x0_hat + c_x * x + sigma * noise` for each visited step.

    `ddpm` is the ancestral posterior (Ho et al., arXiv 2006.11239, equation 7) between visited
    steps; `ddim` is deterministic (Song et al., arXiv 2010.02502, equation 12 with eta = 0).
    The last row is (1, 0, 0): the sampler ends on its own prediction.

    Args:
        alpha_bar: [T] float64. indices: [steps] int64, decreasing. method: "ddpm" or "ddim".

    Returns:
        [steps, 3] float64 in the order of `indices`.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    here = alpha_bar[indices]
    after = torch.cat([here[1:], here.new_ones(1)])  # signal share once the step is done
    if method == "ddim":
        c_x = ((1 - after) / (1 - here)).sqrt()
        return torch.stack([after.sqrt() - c_x * here.sqrt(), c_x, torch.zeros_like(c_x)], dim=1)
    alpha = here / after
    c_x0 = after.sqrt() * (1 - alpha) / (1 - here)
    c_x = alpha.sqrt() * (1 - after) / (1 - here)
    variance = (1 - alpha) * (1 - after) / (1 - here)
    return torch.stack([c_x0, c_x, variance.sqrt()], dim=1)


def count_noises(coefficients: Tensor) -> int:
    """How many noises a sampler takes: x_T, and one for each ancestral step but the last."""
    return 1 + int((coefficients[:, 2] > 0).sum())


def run_sampler(
    predict_x0: Callable[[Tensor, int], Tensor],
    coefficients: Tensor,
    noises: int,
    noise_of: Callable[[int], Tensor],
) -> Tensor:
    """Reverse diffusion: `x <- c_x0 * x0_hat + c_x * x + sigma * noise`, step by step.

    Args:
        predict_x0: (x, step) to x0_hat. coefficients: [steps, 3] float64 of
        `sampler_coefficients`. noises: `count_noises(coefficients)`, counted beforehand so
        that nothing here waits for a GPU (a CUDA graph can capture it). noise_of: 0 to x_T,
        i + 1 below `noises` to the noise that is added after step i.
    """
    x = noise_of(0)
    table = coefficients.to(x.dtype)
    for step, (c_x0, c_x, sigma) in enumerate(table.unbind()):
        x = c_x0 * predict_x0(x, step) + c_x * x
        if step + 1 < noises:
            x = x + sigma * noise_of(step + 1)
    return x
