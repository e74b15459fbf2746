"""The released objects, accelerated in place, against themselves."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from ops_cases import refused, relative_error
from released_cases import diffusion_state, naive_condition
from torch import nn

from contrec_fast import ops
from contrec_fast.compat import accelerate_released

PRECISIONS = [(torch.float32, 3e-5), (torch.float64, 1e-11)]
ITEMS, DIM, POSITIONS = 11, 6, 3


class Sinusoid(nn.Module):
    def forward(self, n):
        steps = torch.tensor([math.exp(-i * math.log(10000) / 2) for i in range(3)])
        return torch.cat([(n[:, None] * steps).sin(), (n[:, None] * steps).cos()], dim=1)


class Tenc(nn.Module):
    """A live network with the released attributes, which counts its calls; D is 6, S is 3."""

    def __init__(self, two_layers=True):
        super().__init__()
        d, s = DIM, POSITIONS
        self.item_embeddings = torch.randn(ITEMS, d)
        self.none_embedding, self.positional_embeddings = nn.Embedding(1, d), nn.Embedding(s, d)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(d) for _ in range(3))
        self.mh_attn = nn.ModuleDict({f"linear_{name}": nn.Linear(d, d) for name in "qkv"})
        blocks = {f"w_{i}": nn.Conv1d(d, d, 1) for i in (1, 2)}
        self.feed_forward = nn.ModuleDict(blocks | {"layer_norm": nn.LayerNorm(d)})
        self.step_mlp = nn.Sequential(
            Sinusoid(), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        )
        self.emb_mlp = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.diff_mlp = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        wide = [nn.Linear(3 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)]
        self.diffuser = nn.Sequential(*(wide if two_layers else [nn.Linear(3 * d, d)]))
        self.dropout = nn.Dropout(0.5)
        state = diffusion_state(d, s, two_layers, dtype=torch.get_default_dtype())
        # So that conditions depend on the states, as trained ones do.
        norms = [f"{name}.weight" for name in ("ln_2", "feed_forward.layer_norm", "ln_3")]
        self.load_state_dict(state | {name: torch.randn(d) + 3 for name in norms})
        self.calls = 0

    def forward(self, x, h, step):
        self.calls += 1
        return self.diffuser(torch.cat([x, h, self.step_mlp(step)], dim=1))

    def forward_uncon(self, x, step):
        return self.forward(x, self.none_embedding.weight.repeat(len(x), 1), step)

    def predict(self, states, len_states, diff):
        state = self.state_dict()
        h = torch.stack([naive_condition(state, self.dropout(own)) for own in states])
        x = diff.sample(self.forward, self.forward_uncon, h)
        return x, x @ self.item_embeddings.T


class Diffusion:
    """A live sampler with the released tables and methods, in torch's default dtype."""

    def __init__(self, betas, w=2.0):
        self.timesteps, self.w = len(betas), w
        betas = torch.tensor(betas)
        bars = (1 - betas).cumprod(0)
        before = torch.cat([bars.new_ones(1), bars[:-1]])
        self.posterior_mean_coef1 = betas * before.sqrt() / (1 - bars)
        self.posterior_mean_coef2 = (1 - before) * (1 - betas).sqrt() / (1 - bars)
        self.posterior_variance = betas * (1 - before) / (1 - bars)

    def p_sample(self, model_forward, model_forward_uncon, x, h, t, t_index):
        x0 = (1 + self.w) * model_forward(x, h, t) - self.w * model_forward_uncon(x, t)
        mean = self.posterior_mean_coef1[t_index] * x0 + self.posterior_mean_coef2[t_index] * x
        if t_index == 0:
            return mean
        return mean + self.posterior_variance[t_index].sqrt() * torch.randn_like(x)

    def sample(self, model_forward, model_forward_uncon, h):
        x = torch.randn_like(h)
        with torch.no_grad():
            for n in reversed(range(self.timesteps)):
                t = torch.full((len(h),), n)
                x = self.p_sample(model_forward, model_forward_uncon, x, h, t, n)
        return x


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
    return Tenc(two_layers).eval(), Diffusion(SCHEDULES[schedule], w)


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
        return Diffusion.sample(ddpm, *arguments)

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
    expected = seeded(plain.predict, states, [3, 3], other := Diffusion(SCHEDULES["linear"]))[0]
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
    for pair in ((net, Diffusion([0.3])), (Tenc().eval(), ddpm)):
        with pytest.raises(ValueError, match="expected one that is not accelerated yet"):
            accelerate_released(*pair)
