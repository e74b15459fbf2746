"""Denoisers: the small networks `f(x, condition, t) -> x0_hat` of the diffusion head.

Each holds the learned null vector that stands for "no condition" in classifier-free guidance
(Ho and Salimans, arXiv 2207.12598), so that a denoiser is complete by itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sinusoid of the diffusion step index followed by a two-layer perceptron.

    Frequencies are `exp(-i ln(10000) / (dim/2 - 1))`, sines then cosines, as the released
    ContRec code has them; an odd `dim` gets one zero at the end.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.expand = nn.Linear(dim, 2 * dim)
        self.contract = nn.Linear(2 * dim, dim)

    def sinusoid(self, t: Tensor) -> Tensor:
        """t [B] int64 step indices -> [B, dim] in the parameters' dtype (computed in float64)."""
        half = self.dim // 2
        index = torch.arange(half, dtype=torch.float64, device=t.device)
        angle = t[:, None] * torch.exp(index * (-math.log(10000.0) / max(half - 1, 1)))
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.expand.weight.dtype)
        return F.pad(waves, (0, self.dim - 2 * half))

    def forward(self, t: Tensor) -> Tensor:
        """t [B] int64 step indices -> [B, dim]."""
        return self.contract(F.gelu(self.expand(self.sinusoid(t))))


class Denoiser(nn.Module):
    """What the denoisers share: item-space width, null condition and time embedding.

    Args:
        dim: item-space width D.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: expected a positive width, got {dim}")
        self.dim = dim
        self.null_condition = nn.Parameter(torch.randn(dim) * 0.02)
        self.time_embedding = TimeEmbedding(dim)

    def arguments(self) -> dict:
        """Constructor arguments that rebuild this architecture."""
        return {"dim": self.dim}

    def forward(self, x: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        """Predict the clean vector.

        Args:
            x: [B, D] noisy vectors. condition: [B, D]. t: [B] int64 step indices in 0..T-1.

        Returns:
            x0_hat [B, D].
        """
        return self.predict(x, condition, self.time_embedding(t))

    def predict(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """`forward` with the time embedding [B, D] (or broadcastable) already computed."""
        raise TypeError("Denoiser is a base class: use LinearDenoiser, MLPDenoiser, AdaLNDenoiser")


class LinearDenoiser(Denoiser):
    """One `Linear(3D -> D)` on `[x, condition, time]` (the released default, "mlp1")."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.output = nn.Linear(3 * dim, dim)

    def predict(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        return self.output(torch.cat([x, condition, time.expand_as(x)], dim=-1))


class MLPDenoiser(Denoiser):
    """`Linear(3D -> 2D)`, GELU, `Linear(2D -> D)` on `[x, condition, time]` ("mlp2")."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.hidden = nn.Linear(3 * dim, 2 * dim)
        self.output = nn.Linear(2 * dim, dim)

    def predict(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        joined = torch.cat([x, condition, time.expand_as(x)], dim=-1)
        return self.output(F.gelu(self.hidden(joined)))


class Modulation(nn.Module):
    """Shift, scale and gate vectors of adaptive layer norm, from time and condition.

    Joint (MAR's DiffLoss, arXiv 2406.11838): `Linear(SiLU(t + c))`. Separable:
    `Linear_t(SiLU(t)) + Linear_c(SiLU(c))`, which a sampler computes once per step and once per
    user instead of once per step and user. Starts at zero, so that blocks start as identities.
    """

    def __init__(self, width: int, parts: int, separable: bool):
        super().__init__()
        self.parts = parts
        self.condition = nn.Linear(width, parts * width)
        self.time = nn.Linear(width, parts * width, bias=False) if separable else None
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, condition: Tensor, time: Tensor) -> tuple[Tensor, ...]:
        if self.time is None:
            joint = self.condition(F.silu(time + condition))
        else:
            joint = self.time(F.silu(time)) + self.condition(F.silu(condition))
        return joint.chunk(self.parts, dim=-1)


class AdaLNBlock(nn.Module):
    """Residual perceptron block whose layer norm is modulated (MAR's `ResBlock`)."""

    def __init__(self, width: int, separable: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, width)
        self.modulation = Modulation(width, 3, separable)

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition, time)
        inner = self.norm(x) * (1 + scale) + shift
        return x + gate * self.contract(F.silu(self.expand(inner)))


class AdaLNDenoiser(Denoiser):
    """Residual AdaLN perceptron, the `SimpleMLPAdaLN` of MAR's DiffLoss (arXiv 2406.11838).

    Args:
        dim: item-space width D. width: hidden width W. depth: number of residual blocks.
        separable: sum of a time and a condition modulation instead of a joint one.
    """

    def __init__(self, dim: int, width: int, depth: int, separable: bool = False):
        super().__init__(dim)
        if width < 1 or depth < 1:
            raise ValueError(f"width, depth: expected positive sizes, got {width}, {depth}")
        self.width, self.depth, self.separable = width, depth, separable
        self.input = nn.Linear(dim, width)
        self.condition_input = nn.Linear(dim, width)
        self.time_input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, separable) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, 2, separable)
        self.output = nn.Linear(width, dim)

    def arguments(self) -> dict:
        return {
            "dim": self.dim,
            "width": self.width,
            "depth": self.depth,
            "separable": self.separable,
        }

    def predict(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        hidden = self.input(x)
        condition, time = self.condition_input(condition), self.time_input(time)
        for block in self.blocks:
            hidden = block(hidden, condition, time)
        shift, scale = self.modulation(condition, time)
        return self.output(self.norm(hidden) * (1 + scale) + shift)


DENOISERS = {"linear": LinearDenoiser, "mlp": MLPDenoiser, "adaln": AdaLNDenoiser}
