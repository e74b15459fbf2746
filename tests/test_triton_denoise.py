"""The Triton kernels of `denoise`: on a GPU, and without one in triton's interpreter."""

import pytest
import torch
from denoise_cases import KINDS, check_gradients, evaluate, poisoned  # noqa: F401, a fixture
from ops_cases import make_denoiser, refused

from contrec_fast import ops

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.usefixtures("poisoned"),
]


def check(device, kind, dtype, *arguments):
    check_gradients(kind, "triton", dtype, *arguments, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("single, guidance, dropped", [(True, 1.5, True), (False, 0.0, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kernel_device, kind, single, guidance, dropped, dtype):
    check(kernel_device, kind, dtype, 3, 33, guidance, single, dropped)


@pytest.mark.parametrize("single, guidance, dropped", [(True, 0.0, True), (False, 2.0, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_tables(kernel_device, kind, single, guidance, dropped):
    check(kernel_device, kind, torch.float32, 5, 1, guidance, single, dropped)


@pytest.mark.parametrize("batch, dim", [(1, 3), (127, 65), (129, 40)])
def test_several_tiles_of_an_mlp(kernel_device, batch, dim):
    """More rows and columns than a tile has, in either class of block sizes."""
    for guidance in (0.0, 2.0):
        check(kernel_device, "mlp", torch.float32, batch, dim, guidance, True, True)


def test_several_programs_for_the_norm(kernel_device):
    check(kernel_device, "adaln", torch.float32, 37, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_twice(kernel_device, kind):
    denoiser = make_denoiser(kind, 5, torch.float32)
    x, condition, outward = torch.randn(3, 7, 5)
    t = torch.randint(0, 20, (1,))
    once, again = (
        evaluate(denoiser, "triton", x, condition, outward, t, device=kernel_device)
        for _ in range(2)
    )
    assert all(map(torch.equal, once, again))


def test_no_rows_and_refusals(kernel_device):
    denoiser = make_denoiser("mlp", 6, torch.float32).to(kernel_device)
    empty, t = torch.zeros(0, 6, device=kernel_device), torch.zeros(1, device=kernel_device).long()
    assert ops.denoise(denoiser, empty, empty, t, backend="triton").shape == (0, 6)
    linear = make_denoiser("linear", 6, torch.float32).to(kernel_device)
    for refusing in (linear, denoiser.double()):
        x = empty.to(refusing.null_condition.dtype)
        with refused(ValueError, "backend"):
            ops.denoise(refusing, x, x, t, backend="triton")
