"""Noise schedules, what a network predicts, solvers' coefficients (float64), the sampler loop.

Step indices run from 0 (least noise) to T-1 (most noise); `alpha_bar[n]` is the share of the
signal's variance left at step n: `x_n = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from contrec_fast.names import METHODS, PREDICTIONS, SCHEDULES

MAX_BETA = 0.999


def alpha_bars(schedule: str, timesteps: int) -> Tensor:
    """Cumulative signal share of each step: the product of `1 - beta`.

    - `exp`, of the released ContRec code: `beta_n = 1 - exp(-b0/T - x_n (b1 - b0) / (2 T^2))`,
      `x_n = linspace(1, 2T + 1, T)`, `b0 = 0.1`, `b1 = 10`.
    - `linear` (Ho et al., arXiv 2006.11239): `beta = linspace(1e-4, 0.02, T) * 1000 / T`, scaled
      for other T than their 1000 as in arXiv 2102.09672.
    - `cosine` (Nichol and Dhariwal, arXiv 2102.09672, equation 17): from the continuous share
      `cos((t + s) / (1 + s) * pi/2)^2`, `s = 0.008`, between t = n/T and (n+1)/T.
    - `sqrt` (Diffusion-LM, arXiv 2205.14217): likewise from `1 - sqrt(t + 1e-4)`.

    All but `exp` have betas of at most 0.999.

    Returns:
        [T] float64 in (0, 1), strictly decreasing.

    Raises:
        ValueError: unknown schedule, or fewer than one step.
    """
    known("schedule", schedule, SCHEDULES)
    if timesteps < 1:
        raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
    if schedule == "exp":
        b0, b1 = 0.1, 10.0
        x = torch.linspace(1, 2 * timesteps + 1, timesteps, dtype=torch.float64)
        log_alpha = -b0 / timesteps - x * (b1 - b0) / (2 * timesteps**2)
        return log_alpha.cumsum(0).exp()
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
        alpha = 1 - beta
    else:
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        share = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        if schedule == "sqrt":  # reaches zero at t = 0.9999
            share = (1 - (t + 1e-4).sqrt()).clamp(min=0)
        alpha = (share[1:] / share[:-1]).nan_to_num(0)
    return alpha.clamp(min=1 - MAX_BETA).cumprod(0)


def known(name: str, value: str, values: tuple[str, ...]) -> None:
    """Raise ValueError, naming the argument, unless `value` is one of `values`."""
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}")


def x0_weights(prediction: str, signal: Tensor) -> tuple[Tensor, Tensor]:
    """`(p_x, p_f)` of `x0_hat = p_x x + p_f f`, f being what the network predicts.

    `x0` itself; the noise `eps` (arXiv 2006.11239); or the velocity
    `v = sqrt(signal) eps - sqrt(1 - signal) x0` (arXiv 2202.00512).

    Args:
        signal: alpha_bar, of any shape, which the results have too.
    """
    known("prediction", prediction, PREDICTIONS)
    if prediction == "x0":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "eps":
        return signal.rsqrt(), -((1 - signal) / signal).sqrt()
    return signal.sqrt(), -(1 - signal).sqrt()


def to_x0(prediction: str, f: Tensor, x: Tensor, signal: Tensor) -> Tensor:
    """x0_hat of the network's output at any step; differentiable.

    Args:
        f, x: [P, D] output and noisy input. signal: [P, 1] alpha_bar of the steps; in float64
        it keeps its digits near 1.

    Returns:
        [P, D] in the dtype of x.
    """
    p_x, p_f = x0_weights(prediction, signal)
    return f if prediction == "x0" else p_x.to(x.dtype) * x + p_f.to(x.dtype) * f


def training_target(prediction: str, x0: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """What the network's output should be for `x = sqrt(signal) x0 + sqrt(1 - signal) noise`.

    Args:
        x0, noise: [P, D]. signal: [P, 1] alpha_bar of the steps.

    Returns:
        [P, D] in the dtype of x0; differentiable.
    """
    known("prediction", prediction, PREDICTIONS)
    if prediction == "v":
        return signal.sqrt().to(x0.dtype) * noise - (1 - signal).sqrt().to(x0.dtype) * x0
    return x0 if prediction == "x0" else noise


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


def sampler_coefficients(
    alpha_bar: Tensor, indices: Tensor, method: str, prediction: str = "x0"
) -> Tensor:
    """Coefficients of each visited step of a solver, for a network's output f:

    `x0_hat = p_x * x + p_f * f`, then
    `x <- c_x0 * x0_hat + c_x * x + sigma * noise + c_previous * (x0_hat of the step before)`.

    - `ddpm`: the ancestral posterior (Ho et al., arXiv 2006.11239, equation 7) between visited
      steps.
    - `ddim`: deterministic (Song et al., arXiv 2010.02502, equation 12 with eta = 0).
    - `dpm++`: DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), which extrapolates
      x0_hat linearly in `lambda = log(alpha / sigma)`; its first and last steps are of order 1.
      The extrapolation is at most that of steps of equal width (r >= 1), which keeps order 2.

    The last row is (1, 0, 0, 0, p_x, p_f): the sampler ends on its own prediction.

    Args:
        alpha_bar: [T] float64. indices: [steps] int64, decreasing. method: of `METHODS`.
        prediction: what the network predicts, of `PREDICTIONS`.

    Returns:
        [steps, 6] float64 in the order of `indices`: c_x0, c_x, sigma, c_previous, p_x, p_f.

    Raises:
        ValueError: unknown method or prediction.
    """
    known("method", method, METHODS)
    here = alpha_bar[indices]
    after = torch.cat([here[1:], here.new_ones(1)])  # signal share once the step is done
    sigma = c_previous = torch.zeros_like(here)
    if method == "ddpm":
        alpha = here / after
        c_x0 = after.sqrt() * (1 - alpha) / (1 - here)
        c_x = alpha.sqrt() * (1 - after) / (1 - here)
        sigma = ((1 - alpha) * (1 - after) / (1 - here)).sqrt()
    else:
        c_x = ((1 - after) / (1 - here)).sqrt()
        c_x0 = after.sqrt() - c_x * here.sqrt()
    if method == "dpm++" and len(here) > 2:
        widths = (here.logit() / 2).diff()  # of the steps in lambda
        share = torch.zeros_like(here)
        # Few steps evenly spaced in t are by far the widest in lambda at the end; extrapolating
        # in proportion would overshoot there and be less exact than ddim.
        share[1:-1] = (widths[1:] / widths[:-1]).clamp(max=1) / 2
        c_x0, c_previous = c_x0 * (1 + share), -c_x0 * share
    return torch.stack([c_x0, c_x, sigma, c_previous, *x0_weights(prediction, here)], dim=1)


def count_noises(coefficients: Tensor) -> int:
    """How many noises a sampler takes: x_T, and one for each ancestral step but the last."""
    return 1 + int((coefficients[:, 2] > 0).sum())


def is_multistep(coefficients: Tensor) -> bool:
    """Whether any step uses the prediction of the step before."""
    return bool(coefficients[:, 3].any())


def run_sampler(
    network: Callable[[Tensor, int], Tensor],
    coefficients: Tensor,
    noises: int,
    noise_of: Callable[[int], Tensor],
    multistep: bool = True,
) -> Tensor:
    """Reverse diffusion step by step, as `sampler_coefficients` says.

    The network sees and returns the dtype of the noise, which the result has, too; in between,
    a state of 16 bits is kept in float32 (a rounding at every step would pile up).

    Args:
        network: (x, step) to its (guided) output f. coefficients: [steps, 6] float64. noises:
        `count_noises(coefficients)`, counted beforehand so that nothing here waits for a GPU (a
        CUDA graph can capture it). noise_of: 0 to x_T, i + 1 below `noises` to the noise that
        is added after step i. multistep: `is_multistep(coefficients)`, likewise; True is always
        right, False leaves work out.
    """
    x = noise_of(0)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, x0 = x.to(wide), None
    c_x0, c_x, sigma, c_previous, p_x, p_f = coefficients.unbind(1)
    # A step in terms of f and x: no more work for one prediction than for another.
    rows = torch.stack([c_x0 * p_f, c_x0 * p_x + c_x, sigma, c_previous, p_x, p_f], dim=1)
    for step, (c_f, c_x, sigma, c_previous, p_x, p_f) in enumerate(rows.to(wide).unbind()):
        f = network(x.to(dtype), step).to(wide)
        after = c_f * f + c_x * x
        if multistep:
            if step > 0:
                after = after + c_previous * x0
            x0 = p_x * x + p_f * f
        if step + 1 < noises:
            after = after + sigma * noise_of(step + 1).to(wide)
        x = after
    return x.to(dtype)
