"""The sampler in C++: every set of instructions, its memory, staleness, and what it refuses."""

import pytest
import torch
from ops_cases import KINDS, make_denoiser, make_pair, needs_extension, refused, relative_error

from contrec_fast import native, ops
from contrec_fast.models import LinearDenoiser
from contrec_fast.models.schedules import METHODS
from contrec_fast.ops import hoisting, sampling_cpp

pytestmark = needs_extension
ALL = native.sampler_instruction_sets()
DTYPES = [torch.float32, torch.bfloat16]
PAIRS = [
    (name, dtype) for name in ALL for dtype in DTYPES if "bf16" not in name or dtype != DTYPES[0]
]


def run(plan, isa, condition, seed=0, user_ids=None, samples=1, noise=None):
    """The plan's chain [S, B, D] with these instructions."""
    users = torch.arange(len(condition)) if user_ids is None else user_ids
    arguments = condition, torch.tensor(seed), users, samples, noise, *plan._chain()
    return sampling_cpp.sample(*arguments, isa=isa)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa, dtype", PAIRS)
def test_as_good_as_plain_pytorch(isa, dtype, kind, method):
    """At most twice the error of the reference in the same precision, against float64."""
    low, exact = make_pair(kind, 129, dtype)
    settings = dict(timesteps=40, steps=11, method=method, guidance=2.0)
    plan, truth = ops.plan_sampling(low, **settings), ops.plan_sampling(exact, **settings)
    condition, noise = torch.randn(45, 129).to(dtype), torch.randn(2, 11, 45, 129).to(dtype)
    result = run(plan, isa, condition, samples=2, noise=noise)
    plain = plan(condition, samples=2, noise=noise, backend="reference")
    expected = truth(condition.double(), samples=2, noise=noise.double(), backend="reference")
    unit = torch.finfo(dtype).eps
    assert result.dtype == dtype
    assert relative_error(result, expected) < 2 * relative_error(plain, expected) + 4 * unit


@pytest.mark.parametrize("dim", [1, 3, 127, 129])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa, dtype", PAIRS)
def test_bitwise_independent_of_batch_and_threads(isa, dtype, kind, dim):
    """Whatever the widths."""
    plan = ops.plan_sampling(make_denoiser(kind, dim, dtype), timesteps=50, steps=3)
    condition, users = torch.randn(150, dim).to(dtype), torch.randperm(2**20)[:150] * 7919
    full, threads = run(plan, isa, condition, 3, users, samples=2), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for size in (1, 13, 127):
                some = torch.randperm(150)[:size]
                part = run(plan, isa, condition[some], 3, users[some], samples=2)
                assert torch.equal(part, full[:, some])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_the_reference(kind):
    """Counter-based noise, rounded to the plan's dtype, is the script that the reference has."""
    for dtype in DTYPES:
        plan = ops.plan_sampling(make_denoiser(kind, 33, dtype), timesteps=20, steps=4)
        condition, users = torch.randn(5, 33).to(dtype), torch.tensor([7, -1, 2**40, 0, 3])
        draws = [
            [ops.noise.philox_normal(torch.tensor(9), users, 33, step, draw) for step in range(4)]
            for draw in range(3)
        ]
        script = torch.stack([torch.stack(steps) for steps in draws]).to(dtype)
        scripted = plan(condition, samples=3, noise=script, backend="cpp")
        fresh = plan(condition, seed=9, user_ids=users, samples=3, backend="cpp")
        assert relative_error(fresh, scripted) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_law(dtype):
    low, exact = make_pair("linear", 129, dtype)
    plan, truth = ops.plan_sampling(low, timesteps=30), ops.plan_sampling(exact, timesteps=30)
    condition, z = torch.randn(2, 40, 129).to(dtype)
    drawn = plan(condition, noise=z[None], draw="law", backend="cpp")
    plain = plan(condition, noise=z[None], draw="law", backend="reference")
    expected = truth(condition.double(), noise=z[None].double(), draw="law")
    unit = torch.finfo(dtype).eps
    assert relative_error(drawn, expected) < 2 * relative_error(plain, expected) + 4 * unit
    fresh = plan(condition, draw="law", samples=2)
    assert ops.last_backend("sample") == "cpp"
    assert torch.equal(
        fresh[1, 7:9], plan(condition[7:9], 0, torch.tensor([7, 8]), 2, draw="law")[1]
    )


def test_extreme_inputs_stay_finite():
    """GELU and SiLU far out; what infinities become is the reference's business."""
    for kind in KINDS:
        plan = ops.plan_sampling(make_denoiser(kind, 16, torch.float32), timesteps=9)
        condition = torch.randn(5, 16) * 10.0 ** torch.arange(-8, 12, 4)[:, None]
        found, expected = (plan(condition, backend=b) for b in ("cpp", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_all_written_and_nothing_else(kind, monkeypatch):
    """Into memory that was poisoned, with a margin behind it that stays as it was."""
    plan = ops.plan_sampling(make_denoiser(kind, 13, torch.float32), timesteps=9)
    condition, held = torch.randn(7, 13), []

    def poisoned(*shape, **options):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        held.append(torch.full((shape.numel() + 64,), torch.nan, **options))
        return held[-1][:-64].view(shape)

    expected = run(plan, ALL[-1], condition, samples=2)
    monkeypatch.setattr(native.torch, "empty", poisoned)
    assert torch.equal(run(plan, ALL[-1], condition, samples=2), expected)
    assert len(held) == 1 and held[0][-64:].isnan().all()


def test_inputs_may_be_strided():
    plan = ops.plan_sampling(make_denoiser("mlp", 8, torch.float32), timesteps=9, method="ddim")
    condition, noise = torch.randn(8, 6), torch.randn(8, 6, 1)
    users = torch.arange(12)[::2]
    for given in ({"user_ids": users}, {"noise": noise.permute(2, 1, 0)}):
        found = plan(condition.T, backend="cpp", **given)
        copies = {name: tensor.contiguous() for name, tensor in given.items()}
        assert torch.equal(found, plan(condition.T.contiguous(), backend="cpp", **copies))


# What is prepared once.


def test_prepared_once_and_never_stale():
    made = []

    @hoisting.once_per_plan
    def prepare(weights, times, coefficients, scale):
        made.append(scale)
        return weights[1] * scale

    weights, times = [torch.randn(3), torch.randn(3)], torch.randn(2, 3)
    for _ in range(3):
        assert torch.equal(prepare(weights, times, times, 2), weights[1] * 2)
    assert made == [2]
    prepare(weights, times, times, 3)
    prepare(weights, times, times, 2)
    assert made == [2, 3]
    weights[1].zero_()  # written to
    assert prepare(weights, times, times, 2).eq(0).all()
    weights[1] = torch.ones(3)  # replaced
    assert prepare(weights, times, times, 2).eq(2).all()
    prepare([torch.randn(3), weights[1]], times, times, 2)  # another plan
    assert made == [2, 3, 2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_plan_is_prepared_again(kind):
    condition = torch.randn(4, 8)
    plan = ops.plan_sampling(make_denoiser(kind, 8, torch.float32), timesteps=9)
    before = plan(condition, backend="cpp")
    plan.weights[-1].add_(1)
    after = plan(condition, backend="cpp")
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, plan(condition, backend="reference"), rtol=1e-4, atol=1e-4)
    plan.bfloat16()
    low = plan(condition.bfloat16(), backend="cpp")
    assert low.dtype == torch.bfloat16 and relative_error(low, after) < 0.1


def test_layout_of_a_matrix():
    """Panels of 32 columns, in bfloat16 of pairs along the inner dimension, zeros around."""
    denoiser = LinearDenoiser(33)
    plan = ops.plan_sampling(denoiser, timesteps=5)
    for dtype, pair in ((torch.float32, 1), (torch.bfloat16, 2)):
        chain = plan._chain()
        packed = sampling_cpp.pack(*chain[:3], plan.description, 2.0, dtype).tensors[0]
        assert packed.shape == (2, 34 // pair, 32, pair) and packed.dtype == dtype
        weight = denoiser.output.weight.detach()[:, :33].to(dtype)
        for row, column in [(0, 0), (5, 7), (31, 32), (32, 31), (32, 32)]:
            place = packed[row // 32, column // pair, row % 32, column % pair]
            assert place == weight[row, column]
        assert packed.abs().sum(dtype=torch.float64) == weight.abs().sum(dtype=torch.float64)


# Who serves.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_who_serves(dtype):
    plan = ops.plan_sampling(make_denoiser("linear", 8, dtype), timesteps=5)
    condition, served = torch.randn(3, 8).to(dtype), dtype in DTYPES
    for draw in ("path", "law"):
        plan(condition, draw=draw)
        assert ops.last_backend("sample") == ("cpp" if served else "reference")
    if not served:
        with refused(ValueError, "backend"):
            plan(condition, backend="cpp")


def test_without_the_extension_the_reference_serves(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_missing", "not built")
    plan = ops.plan_sampling(make_denoiser("mlp", 8, torch.float32), timesteps=5)
    assert plan(torch.randn(3, 8)).shape == (3, 8)
    assert ops.last_backend("sample") == "reference"
    with refused(ValueError, "backend"):
        plan(torch.randn(3, 8), backend="cpp")


def test_unknown_instructions_are_refused():
    plan = ops.plan_sampling(make_denoiser("mlp", 8, torch.float32), timesteps=5)
    with refused(ValueError, "isa"):
        run(plan, "avx1024", torch.randn(3, 8))
