"""`denoise` and its gradients against float64, for the tests of its backends."""

import pytest
import torch
from ops_cases import make_pair, relative_error

from contrec_fast import ops

KINDS = ("mlp", "adaln", "separable")
# Gradients are sums over many rows that partly cancel.
UNITS = {torch.float32: 64 * 2.0**-24, torch.bfloat16: 8 * 2.0**-9, torch.float64: 1e-12}


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds nan."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def evaluate(denoiser, backend, x, condition, outward, t, guidance=2.0, drop=None, device="cpu"):
    """The output, gradients of x and of the condition, and those of all parameters in a row."""
    denoiser, dtype = denoiser.to(device), next(denoiser.parameters()).dtype
    given = [tensor for tensor in (x, condition) if tensor is not None]
    given = [tensor.to(device, dtype).requires_grad_() for tensor in given]
    drop = None if drop is None else drop.to(device)
    pair = given if condition is not None else (*given, None)
    y = ops.denoise(denoiser, *pair, t.to(device), guidance, drop, backend=backend)
    assert ops.last_backend("denoise") == backend and y.dtype == dtype
    inputs = [*given, *denoiser.parameters()]
    grads = torch.autograd.grad(y, inputs, outward.to(device, dtype), allow_unused=True)
    grads = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)]
    weights = torch.cat([grad.flatten() for grad in grads[len(given) :]])
    return [tensor.detach().cpu() for tensor in (y, *grads[: len(given)], weights)]


def check_gradients(
    kind, backend, dtype, batch, dim, guidance=0.0, single=True, dropped=False, conditional=True,
    device="cpu",
):  # fmt: skip
    """No worse than twice plain PyTorch's error in the same precision, against float64.

    single: one step for all rows. dropped: some rows. conditional: not the null branch alone.
    """
    low, exact = make_pair(kind, dim, dtype)
    x, condition, outward = torch.randn(3, batch, dim).to(dtype)
    t = torch.randint(0, 20, (1 if single else batch,))
    drop = torch.rand(batch) < 0.4 if dropped else None
    arguments = x, condition if conditional else None, outward, t, guidance, drop
    expected = evaluate(exact, "reference", *arguments)
    plain = evaluate(low, "reference", *arguments)
    found = evaluate(low, backend, *arguments, device=device)
    for ours, theirs, truth in zip(found, plain, expected):
        if truth.any():
            bound = 2 * relative_error(theirs, truth) + UNITS[dtype]
            assert relative_error(ours, truth) <= bound
        else:
            assert not ours.any()
