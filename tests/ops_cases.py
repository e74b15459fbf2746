"""What several tests of the operations share: denoisers, and the form of an error."""

from contextlib import contextmanager

import pytest
import torch

from contrec_fast import native
from contrec_fast.models import AdaLNDenoiser, LinearDenoiser, MLPDenoiser

KINDS = {
    "linear": LinearDenoiser,
    "mlp": MLPDenoiser,
    "adaln": lambda dim: AdaLNDenoiser(dim, width=48, depth=2),
    "separable": lambda dim: AdaLNDenoiser(dim, width=48, depth=2, separable=True),
}

needs_extension = pytest.mark.skipif(
    native.build_info() is None, reason=f"the C++ extension is absent: {native.why_missing()}"
)


def make_denoiser(kind, dim, dtype=torch.float64):
    """A denoiser of which every parameter is random (modulations start at zero)."""
    denoiser = KINDS[kind](dim)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return denoiser.to(dtype)


def make_pair(kind, dim, dtype):
    """A random denoiser and the same in float64."""
    denoiser, exact = make_denoiser(kind, dim, dtype), KINDS[kind](dim).double()
    exact.load_state_dict(denoiser.state_dict())
    return denoiser, exact


def relative_error(result, expected):
    """`||result - expected|| / ||expected||` in float64."""
    expected = expected.detach().double()
    return float((result.detach().double() - expected).norm() / expected.norm())


@contextmanager
def refused(error, name):
    """The block raises `error` with one line that starts with the argument's name."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "\n" not in message, message
