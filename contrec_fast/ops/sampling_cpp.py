"""`sample` by the C++ extension: a plan's tensors in the layout of csrc/cpu/sampler.h."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from contrec_fast import native
from contrec_fast.ops.dispatch import CPP, implements
from contrec_fast.ops.hoisting import Hoisted, HoistedAdaLN, HoistedLinear, hoist, once_per_plan

PANEL = 32  # columns that are stored together
DTYPES = (torch.float32, torch.bfloat16)


class Packed(NamedTuple):
    """What `native.sample` takes of a plan."""

    tensors: list[Tensor | None]
    coefficients: Tensor  # [steps, 6] float32 of x' = c_f f + c_x x + ..., see csrc/cpu/sampler.h
    settings: dict


@once_per_plan
def pack(
    weights: list[Tensor],
    times: Tensor,
    coefficients: Tensor,
    description: str,
    guidance: float,
    dtype: torch.dtype,
) -> Packed:
    """A plan's hoisted terms, zero-padded to whole panels, the matrices in `dtype` by panels."""
    hoisted = hoist(description, weights, times)
    network, tensors = _tensors(hoisted, guidance, dtype)
    hidden = 0 if network == "linear" else hoisted.output.shape[1]
    depth = len(hoisted.expand) if isinstance(hoisted, HoistedAdaLN) else 0
    settings = {"network": network, "hidden": hidden, "depth": depth, "guidance": guidance}
    c_x0, c_x, sigma, c_previous, p_x, p_f = coefficients.unbind(1)
    rows = torch.stack([c_x0 * p_f, c_x0 * p_x + c_x, sigma, c_previous, p_x, p_f], dim=1)
    return Packed(tensors, rows.float().contiguous(), settings)


def _tensors(h: Hoisted, guidance: float, dtype: torch.dtype):
    """The network's name and its tensors, in the order of its structure in csrc/cpu/sampler.h."""

    def matrix(weight: Tensor) -> Tensor:
        """[..., N, K] by panels of columns: [..., N / 32, K, 32], in bfloat16 of pairs along K."""
        weight = pad(weight, (0, weight.shape[-1] % 2, 0, -weight.shape[-2] % PANEL)).to(dtype)
        pair = 2 if dtype == torch.bfloat16 else 1
        panels = weight.unflatten(-1, (-1, pair)).unflatten(-3, (-1, PANEL))
        return panels.transpose(-3, -2).contiguous()

    def row(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, -tensor.shape[-1] % PANEL)).float().contiguous()

    if isinstance(h, HoistedLinear):
        times = row(h.times - guidance * h.null)
        return "linear", [matrix(h.of_x), matrix(h.of_condition), times]
    output = matrix(h.output), row(h.output_bias)
    if not isinstance(h, HoistedAdaLN):
        first = matrix(h.of_x), matrix(h.of_condition), row(h.times), row(h.null)
        return "mlp", [*first, *output]
    width = h.input.shape[0]

    def parts(tensor: Tensor | None) -> Tensor | None:
        """[..., M] with each modulation's columns as whole panels."""
        return None if tensor is None else row(tensor.unflatten(-1, (-1, width))).flatten(-2)

    modulation = pad(h.modulation.unflatten(0, (-1, width)), (0, 0, 0, -width % PANEL)).flatten(
        0, 1
    )
    tensors = [
        matrix(h.input), row(h.input_bias), matrix(h.condition), row(h.condition_bias),
        row(h.times), matrix(modulation), parts(h.modulation_bias), parts(h.time_modulation),
        parts(h.null_modulation), row(h.norm), matrix(h.expand), row(h.expand_bias),
        matrix(h.contract), row(h.contract_bias), *output,
    ]  # fmt: skip
    return "adaln" if h.time_modulation is None else "separable", tensors


def _obstacle(condition: Tensor, *rest) -> str | None:
    if condition.device.type != "cpu":
        return f"a CPU tensor, got {condition.device}"
    if condition.dtype not in DTYPES:
        return f"float32 or bfloat16, got {str(condition.dtype).removeprefix('torch.')}"
    return None if native.serves(condition) else f"the extension: {native.why_missing()}"


@implements("sample", CPP, obstacle=_obstacle)
def sample(
    condition: Tensor,
    seed: Tensor,
    user_ids: Tensor,
    samples: int,
    noise: Tensor | None,
    weights: list[Tensor],
    times: Tensor,
    coefficients: Tensor,
    noises: int,
    multistep: bool,
    description: str,
    guidance: float,
    isa: str | None = None,
) -> Tensor:
    """`ops.sampling`'s reference, with arguments alike, in C++.

    Products are in the plan's dtype with float32 sums, or in float32 where the processor lacks
    bfloat16 products; everything else is in float32. Noise is that of the reference.

    Args:
        isa: of `native.sampler_instruction_sets()`; the best for the dtype if not given.
    """
    batch, dim = condition.shape
    if batch == 0:
        return condition.new_empty(samples, 0, dim)
    low = condition.dtype == torch.bfloat16
    if isa is None:
        isa = next(n for n in native.sampler_instruction_sets() if low or "bf16" not in n)
    dtype = torch.bfloat16 if isa == "avx512_bf16" else torch.float32
    packed = pack(weights, times, coefficients, description, guidance, dtype)
    out = native.sample(
        condition.float(), seed, user_ids, samples, None if noise is None else noise.float(), low,
        packed.coefficients, packed.tensors, dim=dim, noises=noises, multistep=multistep,
        isa=isa, **packed.settings,
    )  # fmt: skip
    return out.to(condition.dtype)
