"""`denoise`: one guided evaluation of a denoiser, and denoisers as tensors plus a description.

Registered operators take tensors only, so a denoiser travels as its parameters and a string
from which its architecture is rebuilt (`describe`, `rebuild`).
"""

import functools
import threading

import torch
from torch import Tensor
from torch.func import functional_call

from contrec_fast.models.denoisers import DENOISERS, Denoiser
from contrec_fast.ops.checks import INTEGERS, check
from contrec_fast.ops.dispatch import implements, resolve


def describe(denoiser: Denoiser) -> str:
    """The architecture of a denoiser as a string, e.g. `adaln dim=64 width=96 depth=2 separable=0`.

    Raises:
        TypeError: not one of the package's denoisers.
    """
    for kind, cls in DENOISERS.items():
        if type(denoiser) is cls:
            # Plain formatting, which torch.compile can trace.
            sizes = [f"{name}={int(value)}" for name, value in denoiser.arguments().items()]
            return " ".join([kind, *sizes])
    names = ", ".join(cls.__name__ for cls in DENOISERS.values())
    raise TypeError(f"denoiser: expected one of {names}, got {type(denoiser).__name__}")


def rebuild(description: str) -> tuple[Denoiser, tuple[str, ...]]:
    """The architecture without storage, and its parameters' names in order."""
    # `functional_call` puts weights into the skeleton for a while: threads must not share one.
    return _rebuild(description, threading.get_ident())


@functools.lru_cache(maxsize=64)
def _rebuild(description: str, thread: int) -> tuple[Denoiser, tuple[str, ...]]:
    kind, *sizes = description.split()
    arguments = dict(size.split("=") for size in sizes)
    with torch.device("meta"):
        skeleton = DENOISERS[kind](**{name: int(value) for name, value in arguments.items()})
    return skeleton, tuple(name for name, _ in skeleton.named_parameters())


class _Predict(torch.nn.Module):
    """`Denoiser.predict` as a module's forward, which `functional_call` needs."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *arguments):
        return self.denoiser.predict(*arguments)


def predict(description: str, weights: list[Tensor], x: Tensor, condition: Tensor, time: Tensor):
    """`Denoiser.predict` of the described architecture with these weights."""
    skeleton, names = rebuild(description)
    named = {f"denoiser.{name}": weight for name, weight in zip(names, weights)}
    return functional_call(_Predict(skeleton), named, (x, condition, time))


def embed_time(description: str, weights: list[Tensor], t: Tensor) -> Tensor:
    """`Denoiser.time_embedding` of the described architecture with these weights."""
    skeleton, names = rebuild(description)
    prefix = "time_embedding."
    named = {n.removeprefix(prefix): w for n, w in zip(names, weights) if n.startswith(prefix)}
    return functional_call(skeleton.time_embedding, named, (t,))


def guided(
    description: str,
    weights: list[Tensor],
    x: Tensor,
    condition: Tensor | None,
    time: Tensor,
    guidance: float,
    drop: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance: `(1 + w) f(x, h, t) - w f(x, null, t)` (arXiv 2207.12598).

    Args:
        x, condition: [B, D]; no condition means the null branch alone. time: embedding,
        [B, D] or broadcastable. guidance: w. drop: [B] bool, rows of the null branch alone.
    """
    null_condition = weights[rebuild(description)[1].index("null_condition")]
    null = null_condition.expand_as(x)
    if condition is None:
        return predict(description, weights, x, null, time)
    if drop is not None:
        condition = torch.where(drop[:, None], null_condition, condition)
    conditional = predict(description, weights, x, condition, time)
    if guidance == 0:
        return conditional
    unconditional = predict(description, weights, x, null, time)
    result = (1 + guidance) * conditional - guidance * unconditional
    return result if drop is None else torch.where(drop[:, None], conditional, result)


@implements("denoise")
def _denoise(
    x: Tensor,
    condition: Tensor | None,
    t: Tensor,
    weights: list[Tensor],
    description: str,
    guidance: float,
    drop: Tensor | None,
) -> Tensor:
    time = embed_time(description, weights, t)
    return guided(description, weights, x, condition, time, guidance, drop)


def _registered(x, condition, t, weights, description, guidance, drop, backend):
    arguments = (x, condition, t, weights, description, guidance, drop)
    return resolve("denoise", backend, *arguments)(*arguments)


_library = torch.library.Library("contrec", "FRAGMENT")
_library.define(
    "denoise(Tensor x, Tensor? condition, Tensor t, Tensor[] weights, str description,"
    " float guidance, Tensor? drop, str backend) -> Tensor"
)
_library.impl("denoise", _registered, "CompositeImplicitAutograd")


def denoise(
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor | None,
    t: Tensor,
    guidance: float = 2.0,
    drop: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One denoiser evaluation with classifier-free guidance; differentiable in x, the condition
    and the denoiser's parameters.

    Args:
        denoiser: LinearDenoiser, MLPDenoiser or AdaLNDenoiser.
        x: [B, D] noisy vectors, in the denoiser's dtype and on its device.
        condition: [B, D], or None for the null branch alone.
        t: [B] int64 step indices, or [1] for one step of all rows, which costs less.
        guidance: w in `(1 + w) f(x, h, t) - w f(x, null, t)`.
        drop: [B] bool: rows that get `f(x, null, t)` whatever their condition and the guidance
            (condition dropout, arXiv 2207.12598, algorithm 1).
        backend: "auto" or a name from `ops.backends()`. All but the reference work activations
            out again for the gradients instead of keeping them, and have no second derivatives.

    Returns:
        What the denoiser predicts [B, D]: x0, noise or v.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or backend, in one line.
    """
    description = describe(denoiser)
    weights = list(denoiser.parameters())
    check("x", x, ("B", denoiser.dim), (weights[0].dtype,), like=weights[0])
    single = isinstance(t, Tensor) and t.shape == (1,)
    check("t", t, (1 if single else x.shape[0],), INTEGERS, like=x)
    if condition is not None:
        check("condition", condition, tuple(x.shape), (x.dtype,), like=x)
    if drop is not None:
        check("drop", drop, (x.shape[0],), (torch.bool,), like=x)
    arguments = (x, condition, t, weights, description, float(guidance), drop)
    if torch.compiler.is_compiling():
        return torch.ops.contrec.denoise(*arguments, backend)
    return resolve("denoise", backend, *arguments)(*arguments)
