"""Schedules and solvers written a second time, from the papers, step by step in plain numbers."""

import math

import torch


def naive_alpha_bars(schedule, timesteps):
    """The product of 1 - beta over a list of betas."""
    count = range(timesteps)
    if schedule == "exp":  # the released code
        grid = [1 + 2 * timesteps * n / max(timesteps - 1, 1) for n in count]
        betas = [1 - math.exp(-0.1 / timesteps - x * 9.9 / (2 * timesteps**2)) for x in grid]
    elif schedule == "linear":  # arXiv 2006.11239, section 4
        ends, last = (1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps), max(timesteps - 1, 1)
        betas = [min(ends[0] + (ends[1] - ends[0]) * n / last, 0.999) for n in count]
    else:
        continuous = {
            "cosine": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
            "sqrt": lambda t: 1 - math.sqrt(t + 0.0001),
        }[schedule]
        pairs = [(continuous(n / timesteps), continuous((n + 1) / timesteps)) for n in count]
        betas = [min(1 - after / before, 0.999) for before, after in pairs]
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    return bars[1:]


def solve(network, noise, bars, indices, method, prediction):
    """The reverse chain over the visited steps, in the dtype of `noise`.

    Args:
        network: (x, step) to the network's output. noise: entry 0 is x_T, entry i + 1 is added
        after step i. bars: alpha_bar of all T steps.
    """
    x, before = noise[0], None
    for i, n in enumerate(indices):
        alpha, sigma = math.sqrt(bars[n]), math.sqrt(1 - bars[n])
        f = network(x, i)
        if prediction == "x0":
            x0, eps = f, (x - alpha * f) / sigma
        elif prediction == "eps":
            x0, eps = (x - sigma * f) / alpha, f
        else:  # a turn by the angle between signal and noise (arXiv 2202.00512, appendix D)
            angle = math.atan2(sigma, alpha)
            x0 = math.cos(angle) * x - math.sin(angle) * f
            eps = math.sin(angle) * x + math.cos(angle) * f
        if i + 1 == len(indices):
            return x0
        after = bars[indices[i + 1]]
        if method == "ddpm":
            kept = bars[n] / after
            beta = 1 - kept
            if prediction != "eps":  # arXiv 2006.11239, equation 7
                weights = math.sqrt(after) * beta, math.sqrt(kept) * (1 - after)
                mean = (weights[0] * x0 + weights[1] * x) / (1 - bars[n])
            else:  # equation 11
                mean = (x - beta / sigma * eps) / math.sqrt(kept)
            x = mean + math.sqrt(beta * (1 - after) / (1 - bars[n])) * noise[i + 1]
        elif method == "ddim":  # arXiv 2010.02502, equation 12, eta = 0
            x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
        else:  # arXiv 2211.01095, algorithm 2, with r of at least 1
            to_alpha, to_sigma = math.sqrt(after), math.sqrt(1 - after)
            level = math.log(alpha / sigma)
            h = math.log(to_alpha / to_sigma) - level
            estimate = x0
            if before is not None:
                r = max((level - before[0]) / h, 1)
                estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[1]
            x = to_sigma / sigma * x - to_alpha * math.expm1(-h) * estimate
            before = level, x0


def guided_network(denoiser, condition, indices, guidance):
    """(x, step) to the denoiser's guided output."""
    null = denoiser.null_condition.expand_as(condition)

    @torch.no_grad()
    def network(x, step):
        t = torch.full((len(condition),), indices[step])
        return (1 + guidance) * denoiser(x, condition, t) - guidance * denoiser(x, null, t)

    return network
