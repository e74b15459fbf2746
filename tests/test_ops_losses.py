"""`denoise`: values, gradients and errors."""

import pytest
import torch
from ops_cases import KINDS, make_denoiser, refused, relative_error

from contrec_fast import ops
from contrec_fast.models import LinearDenoiser

DENOISE_BACKENDS = ["auto", "reference"]  # the others: test_ops_denoise.py


@pytest.mark.parametrize("backend", DENOISE_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_denoise_is_guided(kind, backend):
    for batch, dim in [(1, 1), (3, 127), (129, 3), (0, 5)]:
        denoiser = make_denoiser(kind, dim)
        x, condition = torch.randn(2, batch, dim, dtype=torch.float64)
        t = torch.randint(0, 200, (batch,))
        null = denoiser(x, denoiser.null_condition.expand_as(x), t)
        conditional = denoiser(x, condition, t)
        for guidance in (0, 1, 2, 0.5, -1):
            result = ops.denoise(denoiser, x, condition, t, guidance, backend=backend)
            expected = (1 + guidance) * conditional - guidance * null
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        unconditional = ops.denoise(denoiser, x, None, t, backend=backend)
        torch.testing.assert_close(unconditional, null, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", DENOISE_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0, 2, None])
def test_denoise_gradients(kind, guidance, backend):
    """In x, the condition and every parameter: those of the formula, taken by autograd."""
    denoiser = make_denoiser(kind, 5)
    x, condition, outward = torch.randn(3, 4, 5, dtype=torch.float64)
    x, condition = x.clone().requires_grad_(), condition.clone().requires_grad_()
    t = torch.randint(0, 200, (4,))
    null = denoiser(x, denoiser.null_condition.expand_as(x), t)
    if guidance is None:
        wanted, result = null, ops.denoise(denoiser, x, None, t, backend=backend)
    else:
        wanted = (1 + guidance) * denoiser(x, condition, t) - guidance * null
        result = ops.denoise(denoiser, x, condition, t, guidance, backend=backend)
    inputs = [x, condition, *denoiser.parameters()]
    found, expected = (
        torch.autograd.grad(y, inputs, outward, allow_unused=True) for y in (result, wanted)
    )
    for ours, theirs, tensor in zip(found, expected, inputs):
        ours, theirs = (torch.zeros_like(tensor) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)

    def function(x, condition):
        return ops.denoise(denoiser, x, condition, t, 2.0, backend=backend)

    assert torch.autograd.gradcheck(function, (x, condition))


@pytest.mark.parametrize("backend", DENOISE_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_denoise_in_bfloat16(kind, backend):
    low = make_denoiser(kind, 64, torch.bfloat16)
    exact = KINDS[kind](64).double()
    exact.load_state_dict(low.state_dict())
    x, condition = torch.randn(2, 33, 64).bfloat16()
    t = torch.randint(0, 200, (33,))
    expected = ops.denoise(exact, x.double(), condition.double(), t)
    null = low.null_condition.expand_as(x)
    plain = 3 * low(x, condition, t) - 2 * low(x, null, t)
    result = ops.denoise(low, x, condition, t, 2.0, backend=backend)
    assert result.dtype == torch.bfloat16
    bound = 2 * relative_error(plain, expected) + 4 * 2.0**-9
    assert relative_error(result, expected) <= bound


X, STEPS = torch.randn(3, 4), torch.tensor([0, 1, 2])
BAD_DENOISES = [
    (TypeError, "denoiser", {"denoiser": torch.nn.Linear(4, 4)}),
    (TypeError, "x", {"x": X.double()}),
    (ValueError, "x", {"x": X[:, :3]}),
    (ValueError, "x", {"x": torch.empty(3, 4, device="meta")}),
    (TypeError, "t", {"t": STEPS.float()}),
    (ValueError, "t", {"t": STEPS[:2]}),
    (TypeError, "condition", {"condition": X.double()}),
    (ValueError, "condition", {"condition": X[:2]}),
    (ValueError, "backend", {"backend": "fastest"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_DENOISES)
def test_bad_denoises(error, name, arguments):
    good = {"denoiser": LinearDenoiser(4), "x": X, "condition": X, "t": STEPS}
    with refused(error, name):
        ops.denoise(**(good | arguments))
