"""The condition encoder against a restatement of the released one, position by position."""

import math

import pytest
import torch
import torch.nn.functional as F
from ops_cases import refused, relative_error

from contrec_fast.models.condition import ConditionEncoder


def make_encoder(width=5, dim=6, positions=9):
    """An encoder in float64 of which every parameter is random, norms and biases included."""
    encoder = ConditionEncoder(width, dim, positions).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    return encoder


def released_condition(encoder, states):
    """Of one response without padding, [S, H] to [D]: all positions, with a causal mask."""
    p = dict(encoder.named_parameters())

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x = linear("project", states) + p["positional_embeddings.weight"][: len(states)]
    q = norm("ln_1", x)
    scores = linear("mh_attn.linear_q", q) @ linear("mh_attn.linear_k", x).T
    future = torch.ones(len(x), len(x)).triu(1).bool()
    scores = (scores / math.sqrt(x.shape[1])).masked_fill(future, -math.inf)
    y = norm("ln_2", scores.softmax(1) @ linear("mh_attn.linear_v", x) + q)
    hidden = linear("feed_forward.w_2", linear("feed_forward.w_1", y).relu())
    return norm("ln_3", norm("feed_forward.layer_norm", hidden + y))[-1]


@pytest.mark.parametrize("width, dim", [(1, 2), (5, 6), (33, 7)])
@pytest.mark.parametrize("padding", [0.0, 3.0, math.nan])
def test_equals_the_released_encoder_whatever_the_padding(width, dim, padding):
    encoder = make_encoder(width, dim)
    lengths = [1, 9, 4, 2, 9]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    states = torch.randn(5, 9, width, dtype=torch.float64)
    states[~mask] = padding
    found = encoder(states, mask)
    assert found.shape == (5, dim)
    for row, length in enumerate(lengths):
        assert relative_error(found[row], released_condition(encoder, states[row, :length])) < 1e-12
        alone = encoder(states[row : row + 1, :length], mask[row : row + 1, :length])[0]
        assert relative_error(found[row], alone) < 1e-12


def test_empty_rows_are_finite_and_equal():
    encoder = make_encoder()
    states = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 0] = True
    found = encoder(states, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], found[2])
    assert relative_error(found[1], found[0]) > 1e-3
    found.square().sum().backward()
    assert states.grad.isfinite().all()
    assert states.grad.flatten(1).any(1).tolist() == [False, True, False]
    assert encoder(states[:0], mask[:0]).shape == (0, 6)


def test_gradients_reach_every_parameter_and_valid_state():
    encoder = make_encoder()
    states = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5])[:, None]
    (encoder(states, mask) * torch.randn(4, 6)).sum().backward()
    for name, parameter in encoder.named_parameters():
        if name != "mh_attn.linear_k.bias":  # shifts all scores of a query alike
            assert parameter.grad.norm() > 0, name
    assert torch.equal(states.grad.any(-1), mask)


def test_parameters_have_the_released_names():
    layers = ["ln_1", "ln_2", "ln_3"]
    layers += [f"mh_attn.linear_{name}" for name in "qkv"]
    layers += [f"feed_forward.{name}" for name in ("w_1", "w_2", "layer_norm")]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"positional_embeddings.weight", "project.weight", "project.bias"}
    assert set(make_encoder().state_dict()) == expected


@pytest.mark.parametrize("count", [0, 10])
def test_refuses_responses_that_do_not_fit(count):
    with refused(ValueError, "states"):
        make_encoder()(torch.zeros(2, count, 5).double(), torch.ones(2, count, dtype=torch.bool))
