"""The released objects, accelerated in place, against themselves."""

import copy
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ops_cases import refused, relative_error
from released_cases import diffusion_state
from torch import nn

from contrec_fast import ops
from contrec_fast.compat import accelerate_released

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # where its scripts find each other
from released_model import Network, Sampler  # noqa: E402

PRECISIONS = [(torch.float32, 3e-5), (torch.float64, 1e-11)]
ITEMS, DIM, POSITIONS = 11, 6, 3


class Tenc(Network):
    """A live network with random weights, which counts its calls."""

    def __init__(self, two_layers=True):
        super().__init__(torch.randn(ITEMS, DIM), POSITIONS, two_layers, dropout=0.5)
        state = diffusion_state(DIM, POSITIONS, two_layers, dtype=torch.get_default_dtype())
        # So that conditions depend on the states, as trained ones do.
        norms = [f"{name}.weight" for name in ("ln_2", "feed_forward.layer_norm", "ln_3")]
        self.load_state_dict(state | {name: torch.randn(DIM) + 3 for name in norms})
        self.calls = 0

    def forward(self, x, h, t):
        self.calls += 1
        return super().forward(x, h, t)


SCHEDULES = {
    "exp": [1 - math.exp(-0.1 / 20 - (1 + 40 * n / 19) * 9.9 / 800) for n in range(20)],
    "linear": [1e-4 + n * (0.02 - 1e-4) / 49 for n in range(50)],
    "one step": [0.3],
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=PRECISIONS, ids=["float32", "float64"])
def tolerance(request):
    with default_dtype(request.param[0]):
        yield request.param[1]


def objects(two_layers=True, schedule="exp", w=2.0):
    return Tenc(two_layers).eval(), sampler_of(schedule, w)


def sampler_of(schedule, w=2.0):
    betas = torch.tensor(SCHEDULES[schedule])
    return Sampler(len(betas), w, betas)


def seeded(action, *arguments):
    """What it returns from a given state of torch's generator, and the state it leaves."""
    torch.manual_seed(1)
    return action(*arguments), torch.get_rng_state()


def both(net, ddpm, users=3):
    """Vectors of `sample`, vectors and scores of `predict`, and the generator's last state."""
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(users, DIM, generator=generator)
    states = torch.randn(users, POSITIONS, DIM, generator=generator)
    vectors, _ = seeded(ddpm.sample, net.forward, net.forward_uncon, h)
    found, state = seeded(net.predict, states, [POSITIONS] * users, ddpm)
    return vectors, *found, state


@pytest.mark.parametrize("users", [1, 3, 17])
@pytest.mark.parametrize("w", [0.0, 2.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("two_layers", [False, True])
def test_results_are_equal_for_equal_noise(two_layers, schedule, w, users, tolerance):
    net, ddpm = objects(two_layers, schedule, w)
    *expected, state = both(net, ddpm, users)
    report = accelerate_released(net, ddpm)
    steps, kind = len(SCHEDULES[schedule]), "mlp2" if two_layers else "mlp1"
    assert repr(report) == f"Acceleration({kind}, D 6, {steps} steps, guidance {w:g})"
    net.calls = 0
    *found, left = both(net, ddpm, users)
    assert net.calls == 0 and ops.last_backend("sample") is not None
    assert torch.equal(left, state)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < tolerance


def test_restoring_leaves_no_trace():
    net, ddpm = objects()
    before = vars(net).copy(), vars(ddpm).copy(), torch.get_rng_state()
    net.train()
    net.ln_1.eval()  # each module keeps its own mode
    report = accelerate_released(net, ddpm)
    assert torch.equal(torch.get_rng_state(), before[2])
    assert net.dropout.training and not net.ln_1.training
    report.restore()
    report.restore()
    with accelerate_released(net.eval(), ddpm):
        assert "predict" in vars(net) and "sample" in vars(ddpm)
    net.calls = before[0]["calls"]
    assert vars(net).keys() == before[0].keys() and vars(ddpm).keys() == before[1].keys()
    assert net.predict == Tenc.predict.__get__(net)

    def own(*arguments):
        return Sampler.sample(ddpm, *arguments)

    ddpm.sample = own  # of the object, not of its class
    accelerate_released(net, ddpm).restore()
    assert ddpm.sample is own


def test_changes_are_followed(tolerance):
    net, ddpm = objects()
    accelerate_released(net, ddpm)
    both(net, ddpm)

    def compare():
        found = both(net, ddpm)
        with torch.no_grad():
            expected = both(*fresh(net, ddpm))
        assert relative_error(found[0], expected[0]) < tolerance
        assert relative_error(found[2], expected[2]) < tolerance

    torch.nn.init.normal_(net.diffuser[0].bias)
    compare()
    net.load_state_dict(Tenc().state_dict())
    compare()
    for options in ({"foreach": True}, {"fused": True}):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, **options)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        compare()
    ddpm.w = 0.7
    compare()
    ddpm.posterior_variance.mul_(4)
    compare()
    net.item_embeddings = torch.randn(ITEMS, DIM)
    compare()


def fresh(net, ddpm):
    """The same objects, not accelerated."""
    other, sampler = Tenc().eval(), copy.copy(ddpm)
    other.load_state_dict(net.state_dict())
    other.item_embeddings = net.item_embeddings
    del sampler.sample
    return other, sampler


def test_other_calls_go_to_the_original():
    net, ddpm = objects()
    accelerate_released(net, ddpm)
    states, h = torch.randn(2, POSITIONS, DIM), torch.randn(2, DIM)
    plain, sampler = fresh(net, ddpm)
    for arguments in (
        (lambda *a: 0.5 * net.forward(*a), net.forward_uncon, h),
        (plain.forward, plain.forward_uncon, h),
        (net.forward, net.forward_uncon, torch.randn(DIM, 2).T),
    ):
        expected = seeded(sampler.sample, *arguments)[0]
        assert torch.equal(seeded(ddpm.sample, *arguments)[0], expected)
    expected = seeded(plain.predict, states, [3, 3], other := sampler_of("linear"))[0]
    assert torch.equal(seeded(net.predict, states, [3, 3], other)[0][1], expected[1])
    net.train(), plain.train()  # with dropout, whose noise comes first
    found, expected = (
        seeded(net.predict, states, [3, 3], ddpm),
        seeded(plain.predict, states, [3, 3], sampler),
    )
    assert relative_error(found[0][0], expected[0][0]) < 3e-5
    assert torch.equal(found[1], expected[1])


def test_a_deep_copy_is_a_copy_of_all():
    net, ddpm = objects()
    accelerate_released(net, ddpm)
    other, sampler = copy.deepcopy((net, ddpm))
    expected = both(net, ddpm)[1]
    torch.nn.init.zeros_(net.diffuser[2].weight)
    assert torch.equal(both(other, sampler)[1], expected)
    assert not torch.equal(both(net, ddpm)[1], expected)


class OtherNetwork(Tenc):
    def forward_uncon(self, x, step):
        return super().forward_uncon(x, step) + 1


class OtherCondition(Tenc):
    def predict(self, states, len_states, diff):
        x, scores = super().predict(states, len_states, diff)
        return x + 1, scores


def test_unknown_objects_are_refused_in_one_line():
    net, ddpm = objects()
    with pytest.raises(TypeError, match="^ddpm: expected a released diffusion, got Tenc without t"):
        accelerate_released(net, net)
    with pytest.raises(TypeError, match="^diffusion_net: expected a released Tenc, got Linear wi"):
        accelerate_released(nn.Linear(2, 2), ddpm)
    for kind, name in ((OtherNetwork, "forward_uncon"), (OtherCondition, "predict")):
        with pytest.raises(ValueError, match=f"^diffusion_net: expected the released {name}, got"):
            accelerate_released(kind().eval(), ddpm)
    for attribute, value, named in (
        ("posterior_mean_coef1", torch.ones(3), "posterior_mean_coef1"),
        ("posterior_mean_coef2", torch.ones(20), "posterior_mean_coef2"),
        ("posterior_variance", None, "posterior_variance"),
    ):
        changed = copy.copy(ddpm)
        setattr(changed, attribute, value)
        with pytest.raises(ValueError, match=f"^ddpm: expected .*{named}"):
            accelerate_released(net, changed)
    net.extra = nn.Linear(2, 2)
    with refused(ValueError, "diffusion_net"):
        accelerate_released(net, ddpm)
    del net.extra
    assert vars(net).get("predict") is None and vars(ddpm).get("sample") is None
    accelerate_released(net, ddpm)
    for pair in ((net, sampler_of("one step")), (Tenc().eval(), ddpm)):
        with pytest.raises(ValueError, match="expected one that is not accelerated yet"):
            accelerate_released(*pair)
