"""`sample` by the Triton kernels of `contrec_kernels`, which are imported at the first call.

The first call with a plan prepares it and compiles, which a CUDA graph cannot hold: make one before
the capture.
"""

import importlib.util
import os

import contrec_kernels
import torch
from torch import Tensor

from contrec_fast.ops.dispatch import implements
from contrec_fast.ops.hoisting import (
    Hoisted,
    HoistedMLP,
    PreActivation,
    hoist,
    once_per_plan,
    pre_activation,
)

DTYPES = (torch.bfloat16, torch.float32)
MOST_ROWS = (16, 128, 1024, 4096)  # bounds of the classes of batches that are measured
SOURCES = (
    "contrec_kernels.philox",
    "contrec_kernels.sampling",
    "contrec_kernels.sampling_adaln",
    "contrec_kernels.sampling_persistent",
    "contrec_kernels.sampling_steps",
    "contrec_fast.ops.hoisting",
    "contrec_fast.ops.triton_sampling",
)


def obstacle(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """What keeps Triton kernels from serving such a tensor; None if nothing does."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        missing = importlib.util.find_spec("triton") is None
        return "triton cannot be imported" if missing else None
    if tensor.device.type != "cuda":
        return f"expected CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device.type} tensors"
    found, reason = contrec_kernels.available()
    return None if found else reason


def _obstacle(condition: Tensor, *arguments) -> str | None:
    return obstacle(condition)


def _bucket(
    condition, seed, user_ids, samples, noise, weights, times, coefficients, noises, multistep,
    description, guidance,
):  # fmt: skip
    """The architecture with its widths, dtype, the class of the batch and that of the steps."""
    rows, steps = samples * len(condition), len(coefficients)
    batch = next((f"<={most}" for most in MOST_ROWS if rows <= most), f">{MOST_ROWS[-1]}")
    dtype = str(condition.dtype).removeprefix("torch.")
    return f"{description} {dtype} rows{batch} steps{'<=8' if steps <= 8 else '>8'}"


@once_per_plan
def _prepare(
    weights: list[Tensor], times: Tensor, coefficients: Tensor, description: str
) -> tuple[Hoisted, PreActivation | None, Tensor]:
    """The hoisted weights, contiguous; the pre-activation's, if the network predicts x0; and the
    solver's steps [steps, 6] float32 in terms of the network's output and x."""
    hoisted = hoist(description, weights, times)
    pre = None
    if isinstance(hoisted, HoistedMLP) and not bool(coefficients[:, 4].any()):
        merged, bias = pre_activation(hoisted)
        pre = PreActivation(merged.to(times.dtype), bias)
    hoisted = type(hoisted)(*(part if part is None else part.contiguous() for part in hoisted))
    c_x0, c_x, sigma, c_previous, p_x, p_f = coefficients.unbind(1)
    rows = torch.stack([c_x0 * p_f, c_x0 * p_x + c_x, sigma, c_previous, p_x, p_f], dim=1)
    return hoisted, pre, rows.float()


@implements("sample", "triton", _obstacle, _bucket, SOURCES)
def run_sample(
    condition, seed, user_ids, samples, noise, weights, times, coefficients, noises, multistep,
    description, guidance, **options,
):  # fmt: skip
    """As the reference; options go to the sampler of the architecture."""
    from contrec_kernels import sampling

    batch, dim = condition.shape
    if batch == 0:
        return condition.new_empty(samples, 0, dim)
    hoisted, pre, rows = _prepare(weights, times, coefficients, description)
    chain = sampling.Chain(
        condition.contiguous(), seed, user_ids.contiguous(), samples,
        noise if noise is None else noise.contiguous(), rows, noises, multistep, guidance,
    )  # fmt: skip
    kind = description.split()[0]
    if kind == "mlp":
        y = sampling.sample_mlp(chain, hoisted, pre, **options)
    else:
        y = getattr(sampling, f"sample_{kind}")(chain, hoisted, **options)
    return y.reshape(samples, batch, dim)
