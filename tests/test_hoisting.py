"""What is worked out once per plan, against the step-by-step sampler in float64.

Identity 1, the law of the linear chain, is tested in test_ops_sampling.py.
"""

import pytest
import torch
from ops_cases import KINDS, make_denoiser, make_pair, relative_error
from torch.nn.functional import gelu, layer_norm, silu

from contrec_fast import ops
from contrec_fast.models.schedules import METHODS, PREDICTIONS, run_sampler
from contrec_fast.ops.denoise import guided
from contrec_fast.ops.hoisting import hoist, pre_activation

BATCH, DIM, STEPS = 7, 6, 9


def make_plan(kind, guidance=2.0, **settings):
    """Plan, hoisted terms, condition and noise, in float64."""
    plan = ops.plan_sampling(make_denoiser(kind, DIM), "exp", 40, steps=STEPS, guidance=guidance,
                             **settings)  # fmt: skip
    condition = torch.randn(BATCH, DIM, dtype=torch.float64)
    noise = torch.randn(STEPS, BATCH, DIM, dtype=torch.float64)
    return plan, hoist(plan.description, plan.weights, plan.times), condition, noise


def modulated(h, x, rows):
    """The AdaLN head up to its output layer, with modulations [B, M] or [M]."""
    width = h.input.shape[0]
    parts = rows.unflatten(-1, (-1, width)).unbind(-2)
    hidden = x @ h.input.T + h.input_bias
    for block, (weight, bias) in enumerate(h.norm):
        shift, scale, gate = parts[3 * block : 3 * block + 3]
        inner = layer_norm(hidden, (width,), weight, bias, eps=1e-6) * (1 + scale) + shift
        inner = silu(inner @ h.expand[block].T + h.expand_bias[block])
        hidden = hidden + gate * (inner @ h.contract[block].T + h.contract_bias[block])
    return layer_norm(hidden, (width,), eps=1e-6) * (1 + parts[-1]) + parts[-2]


def branches(h, x, condition, step):
    """Conditional and null branch from hoisted terms alone, up to the output layer."""
    if hasattr(h, "input"):
        c = condition @ h.condition.T + h.condition_bias
        if h.time_modulation is None:
            rows = silu(h.times[step] + c) @ h.modulation.T + h.modulation_bias
        else:
            rows = silu(c) @ h.modulation.T + h.modulation_bias + h.time_modulation[step]
        return modulated(h, x, rows), modulated(h, x, h.null_modulation[step])
    shared = x @ h.of_x.T + h.times[step]
    both = shared + condition @ h.of_condition.T, shared + h.null
    return both if not hasattr(h, "output") else tuple(gelu(branch) for branch in both)


@pytest.mark.parametrize("guidance", [0, 0.5, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_hoisted_terms_and_folded_guidance(kind, guidance):
    """Identities 2 and 4: one output product for both branches, all else from tables."""
    plan, h, condition, _ = make_plan(kind, guidance)
    for step in range(STEPS):
        x = torch.randn(BATCH, DIM, dtype=torch.float64)
        conditional, null = branches(h, x, condition, step)
        folded = (1 + guidance) * conditional - guidance * null
        if hasattr(h, "output"):
            folded = folded @ h.output.T + h.output_bias
        arguments = (plan.description, plan.weights, x, condition, plan.times[step])
        assert relative_error(folded, guided(*arguments, guidance)) < 1e-12


@pytest.mark.parametrize("guidance", [0, 2])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_pre_activation_state(method, prediction, guidance):
    """Identity 3: the chain in terms of W1_x x, whichever the solver."""
    settings = {"method": method, "prediction": prediction}
    plan, h, condition, noise = make_plan("mlp", guidance, **settings)
    merged, bias = pre_activation(h)
    user, outputs = condition @ h.of_condition.T, []

    def network(a, step):
        shared = a + h.times[step]
        u = (1 + guidance) * gelu(shared + user) - guidance * gelu(shared + h.null)
        outputs.append(u @ h.output.T + h.output_bias)
        return u @ merged.T + bias

    projected = noise @ h.of_x.T
    arguments = (plan.coefficients, plan.noises, projected.__getitem__, plan.multistep)
    last = run_sampler(network, *arguments)
    x = plan(condition, noise=noise, backend="reference")
    assert relative_error(last, x @ h.of_x.T) < 1e-11
    if prediction == "x0":  # the last step then returns the output itself
        assert relative_error(outputs[-1], x) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    """Matrices as they were, sums of products in float32 at least and rounded once."""
    low, exact = make_pair(kind, DIM, dtype)
    plan = ops.plan_sampling(low)
    found = hoist(plan.description, plan.weights, plan.times)
    expected = hoist(plan.description, list(exact.parameters()), plan.times.double())
    tables = {"times", "null", "time_modulation", "null_modulation"}
    for name, tensor in found._asdict().items():
        if tensor is None:
            assert name == "time_modulation" and kind == "adaln"
            continue
        assert not tensor.requires_grad
        if name in tables:
            assert tensor.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(tensor, getattr(expected, name).to(tensor.dtype))
        else:
            assert tensor.dtype == dtype and torch.equal(tensor.double(), getattr(expected, name))
