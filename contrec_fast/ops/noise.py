"""Counter-based normal noise: the same numbers whatever the batch, device or backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by
the 64-bit seed, on the counter `(element // 4, step + 65536 * draw, user id low, user id high)`.
The four 32-bit integers of a counter give the normals of four neighbouring elements.
"""

import math

import torch
from torch import Tensor

from contrec_fast.names import MAX_STEPS

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10):
    """Philox4x32.

    Args:
        counter: four int64 tensors with values in 0..2^32-1, broadcastable to each other.
        key: two such tensors.

    Returns:
        Four int64 tensors with values in 0..2^32-1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        # A 32 x 32 bit product wraps around int64, but its bits are the right ones.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (second >> 32) & _LOW ^ c1 ^ k0
        c2 = (first >> 32) & _LOW ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def normals_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller on two 32-bit integers: float32 normals, rounded from float64.

    The upper 24 bits make the uniforms, so that these are exact in float32 and every backend
    starts from the same numbers: `u = (first + 1) / 2^24` in (0, 1], the angle is
    `2 pi second / 2^24`. The largest magnitude is sqrt(48 ln 2) = 5.77.
    """
    uniform = ((first >> 8) + 1).double() * 2.0**-24
    radius = (-2.0 * uniform.log()).sqrt()
    # Quarter turns apart, so that multiples of a quarter turn give exact zeros.
    quarter, rest = second >> 30, ((second >> 8) & 0x3FFFFF).double() * (math.pi * 2.0**-23)
    cosine, sine, odd = rest.cos(), rest.sin(), (quarter & 1).bool()
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    radius = torch.where(quarter >= 2, -radius, radius)
    return (radius * cosine).float(), (radius * sine).float()


def philox_normal(seed: Tensor, user_ids: Tensor, dim: int, step: int, draw: int = 0) -> Tensor:
    """Standard normal noise of one sampler step.

    Args:
        seed: int64 scalar tensor. user_ids: [B] int64 stable ids. dim: width D.
        step: 0 for x_T, i + 1 for the noise added after the i-th executed step; below 65,536.
        draw: which of several draws for a user; below 65,536.

    Returns:
        [B, D] float32 on the device of `user_ids`.
    """
    device = user_ids.device
    seed, users = seed.to(device), user_ids[:, None]
    block = torch.arange((dim + 3) // 4, device=device)[None, :]
    column = torch.full((), step + MAX_STEPS * draw, device=device)  # filled there, not copied
    counter = (block, column, users & _LOW, (users >> 32) & _LOW)
    words = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    normals = torch.stack([*normals_of(*words[:2]), *normals_of(*words[2:])], dim=-1)
    return normals.flatten(1)[:, :dim]
