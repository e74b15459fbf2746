"""What a sampler can compute before it knows any user: once per plan, in plain PyTorch.

For every kind of backend. All of it is exact in real arithmetic:

- `linear_law`: a linear denoiser's whole chain is one Gaussian;
- `hoist`: the guided network as matrices of x and of the condition, and tables with a row for
  each step that hold everything else (time terms, biases, the null branch);
- `pre_activation`: the step of an `MLPDenoiser` in terms of `W1_x x`.

Folding the guidance needs nothing prepared: with one hidden layer
`(1 + w) W2 g(a_c) - w W2 g(a_0) = W2 ((1 + w) g(a_c) - w g(a_0))`, and in an AdaLN head the same
holds for its output layer.

Sums of products are formed in float64 and returned in float32 (float64 for float64 weights);
matrices that are only cut out keep the weights' dtype.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.weak import WeakTensorKeyDictionary

from contrec_fast.ops.denoise import rebuild


class HoistedLinear(NamedTuple):
    """`f(x, h, step) = x of_x^T + h of_condition^T + times[step]`; the null branch has `null`
    instead of the product with h."""

    of_x: Tensor  # [D, D]
    of_condition: Tensor  # [D, D]
    times: Tensor  # [steps, D], bias included
    null: Tensor  # [D]


class HoistedMLP(NamedTuple):
    """`f(x, h, step) = gelu(x of_x^T + h of_condition^T + times[step]) output^T + output_bias`;
    the null branch has `null` instead of the product with h."""

    of_x: Tensor  # [2D, D]
    of_condition: Tensor  # [2D, D]
    times: Tensor  # [steps, 2D], bias included
    null: Tensor  # [2D]
    output: Tensor  # [D, 2D]
    output_bias: Tensor  # [D]


class HoistedAdaLN(NamedTuple):
    """An AdaLN head of width W with its modulations side by side: shift, scale and gate of each
    block in turn, then the output's shift and scale; M = (3 depth + 2) W columns.

    A user's modulation at a step, with `c = h condition^T + condition_bias`, is
    `silu(times[step] + c) modulation^T + modulation_bias`, or with separable modulation
    `time_modulation[step] + silu(c) modulation^T + modulation_bias`.
    """

    input: Tensor  # [W, D]
    input_bias: Tensor  # [W]
    condition: Tensor  # [W, D]
    condition_bias: Tensor  # [W]
    times: Tensor  # [steps, W], bias included
    modulation: Tensor  # [M, W]
    modulation_bias: Tensor  # [M]
    time_modulation: Tensor | None  # [steps, M]; None unless separable
    null_modulation: Tensor  # [steps, M] of the null branch
    norm: Tensor  # [depth, 2, W] weight and bias of each block's layer norm
    expand: Tensor  # [depth, W, W]
    expand_bias: Tensor  # [depth, W]
    contract: Tensor  # [depth, W, W]
    contract_bias: Tensor  # [depth, W]
    output: Tensor  # [D, W]
    output_bias: Tensor  # [D]


Hoisted = HoistedLinear | HoistedMLP | HoistedAdaLN


@torch.no_grad()
def hoist(description: str, weights: list[Tensor], times: Tensor) -> Hoisted:
    """A denoiser with everything that does not depend on users worked out.

    Args:
        description, weights: of `ops.denoise.describe` and the denoiser's parameters in order.
        times: [steps, D] time embeddings.

    Returns:
        New tensors, apart from cuts of the weights, which may share their memory.
    """
    kind = description.split()[0]
    named = dict(zip(rebuild(description)[1], weights))
    if kind == "adaln":
        return _hoist_adaln(named, times)
    wide = _wide(times)
    layer = "output" if kind == "linear" else "hidden"
    weight, null = named[f"{layer}.weight"], named["null_condition"].double()
    of_x, of_condition, of_time = weight.split(len(null), dim=1)
    time_terms = times.double() @ of_time.double().T + named[f"{layer}.bias"].double()
    terms = of_x, of_condition, time_terms.to(wide), (of_condition.double() @ null).to(wide)
    if kind == "linear":
        return HoistedLinear(*terms)
    return HoistedMLP(*terms, named["output.weight"], named["output.bias"])


def _hoist_adaln(named: dict[str, Tensor], times: Tensor) -> HoistedAdaLN:
    wide = _wide(times)
    depth = sum(name.endswith("modulation.condition.bias") for name in named) - 1
    modulations = [f"blocks.{i}.modulation." for i in range(depth)] + ["modulation."]

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ named[f"{name}.weight"].double().T + named[f"{name}.bias"].double()

    def joined(name: str) -> Tensor:
        return torch.cat([named[prefix + name] for prefix in modulations])

    def stacked(name: str) -> Tensor:
        return torch.stack([named[f"blocks.{i}.{name}"] for i in range(depth)])

    time = affine("time_input", times.double())
    null = affine("condition_input", named["null_condition"].double())
    weight, bias = joined("condition.weight"), joined("condition.bias")
    if "modulation.time.weight" in named:
        of_time = silu(time) @ joined("time.weight").double().T
        of_null = of_time + silu(null) @ weight.double().T
    else:
        of_time, of_null = None, silu(time + null) @ weight.double().T
    return HoistedAdaLN(
        input=named["input.weight"],
        input_bias=named["input.bias"],
        condition=named["condition_input.weight"],
        condition_bias=named["condition_input.bias"],
        times=time.to(wide),
        modulation=weight,
        modulation_bias=bias,
        time_modulation=None if of_time is None else of_time.to(wide),
        null_modulation=(of_null + bias.double()).to(wide),
        norm=torch.stack([stacked("norm.weight"), stacked("norm.bias")], dim=1),
        expand=stacked("expand.weight"),
        expand_bias=stacked("expand.bias"),
        contract=stacked("contract.weight"),
        contract_bias=stacked("contract.bias"),
        output=named["output.weight"],
        output_bias=named["output.bias"],
    )


class PreActivation(NamedTuple):
    """`merged = W1_x W2` [2D, 2D] and `bias = W1_x b2` [2D]: see `pre_activation`."""

    merged: Tensor
    bias: Tensor


@torch.no_grad()
def pre_activation(hoisted: HoistedMLP) -> PreActivation:
    """What carries a chain of an `MLPDenoiser` as `a = x W1_x^T` instead of x.

    A step `x' = c_f (u W2^T + b2) + c_x x + s noise`, u being the (guided) activations, is
    `a' = c_f (u merged^T + bias) + c_x a + s noise W1_x^T`: one product that waits for the step
    before instead of two, while those with the noise of all steps are one product beforehand.
    The last step returns `u W2^T + b2`.
    """
    of_x = hoisted.of_x.double()
    merged, bias = of_x @ hoisted.output.double(), of_x @ hoisted.output_bias.double()
    wide = _wide(hoisted.of_x)
    return PreActivation(merged.to(wide), bias.to(wide))


def once_per_plan(prepare: Callable) -> Callable:
    """Decorator: remember what `prepare(weights, times, coefficients, *rest)` makes of a plan.

    Operators take tensors only, so what is prepared belongs to the plan's first weight, with
    which it is dropped. It cannot go stale: it is used again only for tensors at the same
    addresses with the same version counters (writing to a tensor counts one on), and the others
    are kept until then, so that nothing else can have come to lie there.
    """
    plans = WeakTensorKeyDictionary()

    @functools.wraps(prepare)
    def prepared(weights: list[Tensor], times: Tensor, coefficients: Tensor, *rest):
        tensors = [*weights, times, coefficients]
        state = [version(tensor) for tensor in tensors]
        known = plans.setdefault(weights[0], {})
        if rest not in known or known[rest][0] != state:
            with torch.no_grad():
                known[rest] = state, tensors[1:], prepare(weights, times, coefficients, *rest)
        return known[rest][2]

    return prepared


def version(tensor: Tensor) -> tuple:
    """Changes when a tensor is written to or replaced (inference tensors keep no count)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def linear_law(
    weight: Tensor,
    bias: Tensor,
    null: Tensor,
    times: Tensor,
    coefficients: Tensor,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussian that a linear denoiser's whole guided chain amounts to.

    With `f(x, h, t) = W_x x + W_h h + W_t t + b` every prediction x0_hat and every step is
    affine in x, h and the noise, so `y = M h + m + L z`, z standard normal. The last step
    returns its prediction, `x0_hat = A x + ...`, hence the covariance `A S A^T` with S the
    covariance before it, and `L = A chol(S)`, which needs no factor of the possibly singular
    product. Without ancestral noise, L is the matrix that x_T passes through. Computed in
    float64.

    Args:
        weight: [D, 3D] on `[x, h, t]`. bias, null: [D]. times: [steps, D].
        coefficients: [steps, 6]; ancestral noise or multistep, not both. guidance: w.

    Returns:
        M [D, D], m [D], L [D, D] in the dtype of `weight`.
    """
    dtype, dim = weight.dtype, len(bias)
    w_x, w_h, w_t = weight.double().split(dim, dim=1)
    constants = times.double() @ w_t.T + bias.double() - guidance * (w_h @ null.double())
    eye = torch.eye(dim, dtype=torch.float64, device=weight.device)
    # What depends on x_T, h and 1 in x, in f and in x0_hat: [D, 2D + 1] each.
    x, x0 = torch.zeros(2, dim, 2 * dim + 1, dtype=torch.float64, device=weight.device)
    x[:, :dim] = covariance = eye
    for (c_x0, c_x, sigma, c_previous, p_x, p_f), constant in zip(coefficients.tolist(), constants):
        f = torch.cat([torch.zeros_like(eye), (1 + guidance) * w_h, constant[:, None]], dim=1)
        x0_of_x, before = p_x * eye + p_f * w_x, covariance
        previous, x0 = x0, x0_of_x @ x + p_f * f
        x = c_x0 * x0 + c_x * x + c_previous * previous
        step = c_x0 * x0_of_x + c_x * eye
        covariance = step @ covariance @ step.T + sigma**2 * eye
    path, matrix, offset = x.split([dim, dim, 1], dim=1)
    ancestral = bool((coefficients[:, 2] > 0).any())
    factor = x0_of_x @ torch.linalg.cholesky(before) if ancestral else path
    return tuple(tensor.to(dtype) for tensor in (matrix, offset[:, 0], factor))
