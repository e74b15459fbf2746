"""The Triton kernels of `denoise`: on a GPU, and without one in triton's interpreter."""

import pytest
import torch
from ops_cases import make_denoiser, make_pair, refused, relative_error

from contrec_fast import ops

pytest.importorskip("triton")
pytest.importorskip("contrec_kernels.denoise")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
KINDS = ("mlp", "adaln", "separable")
UNITS = {torch.float32: 64 * 2.0**-24, torch.bfloat16: 8 * 2.0**-9}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written holds nan."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def evaluate(denoiser, device, backend, x, condition, outward, t, guidance, drop):
    """The output and gradients of x, the condition and all parameters, on the CPU."""
    denoiser, dtype = denoiser.to(device), next(denoiser.parameters()).dtype
    x, condition = (tensor.to(device, dtype).requires_grad_() for tensor in (x, condition))
    drop = None if drop is None else drop.to(device)
    y = ops.denoise(denoiser, x, condition, t.to(device), guidance, drop, backend=backend)
    assert ops.last_backend("denoise") == backend and y.dtype == dtype
    inputs = [x, condition, *denoiser.parameters()]
    grads = torch.autograd.grad(y, inputs, outward.to(device, dtype), allow_unused=True)
    weights = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)][2:]
    found = y, *grads[:2], torch.cat([grad.flatten() for grad in weights])
    return [tensor.detach().cpu() for tensor in found]


def check(device, kind, dtype, batch, dim, single, guidance, dropped):
    """No worse than twice plain PyTorch's error in the same precision, against float64."""
    low, exact = make_pair(kind, dim, dtype)
    x, condition, outward = torch.randn(3, batch, dim).to(dtype)
    t = torch.randint(0, 20, (1 if single else batch,))
    drop = torch.rand(batch) < 0.4 if dropped else None
    arguments = x, condition, outward, t, guidance, drop
    expected = evaluate(exact, "cpu", "reference", *arguments)
    plain = evaluate(low, "cpu", "reference", *arguments)
    found = evaluate(low, device, "triton", *arguments)
    for ours, theirs, truth in zip(found, plain, expected):
        assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + UNITS[dtype]


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("single, guidance, dropped", [(True, 1.5, True), (False, 0.0, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kernel_device, kind, single, guidance, dropped, dtype):
    check(kernel_device, kind, dtype, 3, 33, single, guidance, dropped)


@pytest.mark.parametrize("single, guidance, dropped", [(True, 0.0, True), (False, 2.0, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_tables(kernel_device, kind, single, guidance, dropped):
    check(kernel_device, kind, torch.float32, 2, 1, single, guidance, dropped)


@pytest.mark.parametrize("batch, dim", [(1, 3), (127, 65), (129, 40)])
def test_several_tiles_of_an_mlp(kernel_device, batch, dim):
    """More rows and columns than a tile has, in either class of block sizes."""
    for guidance in (0.0, 2.0):
        check(kernel_device, "mlp", torch.float32, batch, dim, True, guidance, True)


def test_several_programs_for_the_norm(kernel_device):
    check(kernel_device, "adaln", torch.float32, 37, 3, True, 0.0, False)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_twice(kernel_device, kind):
    denoiser = make_denoiser(kind, 5, torch.float32)
    x, condition, outward = torch.randn(3, 7, 5)
    t = torch.randint(0, 20, (1,))
    arguments = x, condition, outward, t, 2.0, None
    whole = evaluate(denoiser, kernel_device, "triton", *arguments)
    again = evaluate(denoiser, kernel_device, "triton", *arguments)
    assert all(map(torch.equal, whole, again))


def test_no_rows_and_refusals(kernel_device):
    denoiser = make_denoiser("mlp", 6, torch.float32).to(kernel_device)
    empty, t = torch.zeros(0, 6, device=kernel_device), torch.zeros(1, device=kernel_device).long()
    assert ops.denoise(denoiser, empty, empty, t, backend="triton").shape == (0, 6)
    linear = make_denoiser("linear", 6, torch.float32).to(kernel_device)
    for refusing in (linear, denoiser.double()):
        x = empty.to(refusing.null_condition.dtype)
        with refused(ValueError, "backend"):
            ops.denoise(refusing, x, x, t, backend="triton")
