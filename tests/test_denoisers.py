"""The denoisers against their definitions, written with plain matrix products."""

import math

import pytest
import torch
from ops_cases import KINDS, make_denoiser, refused

from contrec_fast import names
from contrec_fast.models import (
    DENOISERS,
    AdaLNDenoiser,
    Denoiser,
    LinearDenoiser,
    MLPDenoiser,
)

DIMS = [1, 2, 3, 64, 127]


def test_settings_may_name_every_denoiser():
    assert tuple(DENOISERS) == names.DENOISERS


def linear(layer, x):
    product = x @ layer.weight.T
    return product if layer.bias is None else product + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x):
    return x / (1 + torch.exp(-x))


def normed(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()


def time_vector(embedding, t):
    """The released embedding, wave by wave."""
    dim, half = embedding.dim, embedding.dim // 2
    waves = torch.zeros(len(t), dim, dtype=torch.float64)
    for row, n in enumerate(t.tolist()):
        for i in range(half):
            angle = n * math.exp(-i * math.log(10000) / max(half - 1, 1))
            waves[row, i], waves[row, half + i] = math.sin(angle), math.cos(angle)
    return linear(embedding.contract, gelu(linear(embedding.expand, waves)))


def modulation(layer, condition, time):
    if layer.time is None:
        return linear(layer.condition, silu(time + condition))
    return linear(layer.time, silu(time)) + linear(layer.condition, silu(condition))


def defined(denoiser, x, condition, t):
    """The definition of each architecture."""
    time = time_vector(denoiser.time_embedding, t)
    joined = torch.cat([x, condition, time], dim=1)
    if isinstance(denoiser, LinearDenoiser):
        return linear(denoiser.output, joined)
    if isinstance(denoiser, MLPDenoiser):
        return linear(denoiser.output, gelu(linear(denoiser.hidden, joined)))
    hidden = linear(denoiser.input, x)
    condition = linear(denoiser.condition_input, condition)
    time = linear(denoiser.time_input, time)
    for block in denoiser.blocks:
        shift, scale, gate = modulation(block.modulation, condition, time).chunk(3, dim=1)
        inner = normed(hidden) * block.norm.weight + block.norm.bias
        inner = inner * (1 + scale) + shift
        hidden = hidden + gate * linear(block.contract, silu(linear(block.expand, inner)))
    shift, scale = modulation(denoiser.modulation, condition, time).chunk(2, dim=1)
    return linear(denoiser.output, normed(hidden) * (1 + scale) + shift)


@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind):
    for dim in DIMS:
        denoiser = make_denoiser(kind, dim)
        for batch in (0, 1, 3, 129):
            x, condition = torch.randn(2, batch, dim, dtype=torch.float64)
            t = torch.randint(0, 200, (batch,))
            result = denoiser(x, condition, t)
            assert result.shape == (batch, dim)
            torch.testing.assert_close(
                result, defined(denoiser, x, condition, t), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("kind", KINDS)
def test_predict_takes_one_time_for_all(kind):
    denoiser = make_denoiser(kind, 6)
    x, condition = torch.randn(2, 5, 6, dtype=torch.float64)
    time = denoiser.time_embedding(torch.tensor([17]))
    expected = denoiser(x, condition, torch.full((5,), 17))
    for one in (time, time[0]):
        torch.testing.assert_close(
            denoiser.predict(x, condition, one), expected, rtol=1e-12, atol=1e-12
        )


def test_time_embedding():
    for dim in DIMS:
        embedding = make_denoiser("linear", dim).time_embedding
        t = torch.tensor([0, 1, 7, 199, 999])
        result = embedding(t)
        torch.testing.assert_close(result, time_vector(embedding, t), rtol=1e-10, atol=1e-10)
        assert torch.equal(embedding(t.int()), result)
    # The waves are computed in float64, whatever the parameters' precision.
    exact, low = make_denoiser("linear", 64), make_denoiser("linear", 64, torch.bfloat16)
    t = torch.arange(200)
    waves = low.time_embedding.sinusoid(t)
    assert torch.equal(waves, exact.time_embedding.sinusoid(t).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_reach_every_parameter(kind, dtype):
    denoiser = make_denoiser(kind, 6, dtype)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    condition = denoiser.null_condition.expand(4, 6)
    result = denoiser(x, condition, torch.arange(4))
    assert result.dtype == dtype
    result.square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert x.grad.any()


@pytest.mark.parametrize("kind", ["adaln", "separable"])
def test_new_blocks_are_identities(kind):
    """Zero modulations close every gate: the output is that of the input projection alone."""
    denoiser = KINDS[kind](8).double()
    x, condition = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = linear(denoiser.output, normed(linear(denoiser.input, x)))
    result = denoiser(x, condition, torch.arange(5))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_separable_modulation_is_a_sum_of_a_time_and_a_condition_part():
    """A mixed difference tells the two architectures apart."""
    for kind, separable in [("adaln", False), ("separable", True)]:
        denoiser = make_denoiser(kind, 8)
        c, t = torch.randn(2, 2, 1, 48, dtype=torch.float64)

        def at(i, j, layer=denoiser.blocks[0].modulation, c=c, t=t):
            return torch.cat(layer(c[i], t[j]), dim=1)

        mixed = at(0, 0) - at(0, 1) - at(1, 0) + at(1, 1)
        assert (float(mixed.abs().max()) < 1e-12) == separable


def test_names_and_shapes():
    """Checkpoints and kernels rely on these."""
    embedding = {
        "null_condition": [6],
        "time_embedding.expand.weight": [12, 6],
        "time_embedding.expand.bias": [12],
        "time_embedding.contract.weight": [6, 12],
        "time_embedding.contract.bias": [6],
    }
    output = {"output.weight": [6, 18], "output.bias": [6]}
    hidden = {"hidden.weight": [12, 18], "hidden.bias": [12], "output.weight": [6, 12]}
    for kind, own in [("linear", output), ("mlp", output | hidden)]:
        state = DENOISERS[kind](6).state_dict()
        assert {name: list(tensor.shape) for name, tensor in state.items()} == embedding | own


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_rebuild_the_architecture(kind):
    denoiser = make_denoiser(kind, 7)
    twin = type(denoiser)(**denoiser.arguments()).double()
    twin.load_state_dict(denoiser.state_dict())
    x, condition = torch.randn(2, 3, 7, dtype=torch.float64)
    t = torch.arange(3)
    assert torch.equal(twin(x, condition, t), denoiser(x, condition, t))
    assert denoiser.dim == 7 and denoiser.null_condition.shape == (7,)


BAD_SIZES = [
    ("dim", lambda: LinearDenoiser(0)),
    ("dim", lambda: MLPDenoiser(-1)),
    ("dim", lambda: AdaLNDenoiser(0, 8, 1)),
    ("width, depth", lambda: AdaLNDenoiser(4, 0, 1)),
    ("width, depth", lambda: AdaLNDenoiser(4, 8, 0)),
]


@pytest.mark.parametrize("name, make", BAD_SIZES)
def test_bad_sizes(name, make):
    with refused(ValueError, name):
        make()


def test_the_base_class_predicts_nothing():
    with refused(TypeError, "Denoiser is a base class"):
        Denoiser(4)(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0]))
