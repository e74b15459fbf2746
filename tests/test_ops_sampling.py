"""Sampling plans against a step-by-step float64 sampler written from the papers."""

import math

import pytest
import torch
from ops_cases import KINDS, make_denoiser, make_pair, needs_extension, relative_error
from sampler_cases import guided_network, naive_alpha_bars, solve

from contrec_fast import ops
from contrec_fast.models.schedules import METHODS, PREDICTIONS, SCHEDULES
from contrec_fast.ops.hoisting import linear_law
from contrec_fast.ops.noise import philox_normal

BACKENDS = [
    pytest.param(name, marks=needs_extension if name == "cpp" else ())
    for name in ops.backends()["sample"]
    if name != "triton"  # interpreted, it is slow: test_triton_sampling.py
]
# "reference" is compared in float64, the others in float32.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def dtype_of(backend):
    return torch.float64 if backend == "reference" else torch.float32


def step_by_step(
    denoiser, condition, noise, plan, timesteps, method="ddpm", guidance=2.0, prediction="x0",
    schedule="exp",
):  # fmt: skip
    """The guided reverse chain over the plan's steps, in the dtype of the denoiser."""
    indices = plan.timestep_indices.tolist()
    network = guided_network(denoiser, condition, indices, guidance)
    bars = naive_alpha_bars(schedule, timesteps)
    return solve(network, noise, bars, indices, method, prediction)


def visited(timesteps, steps):
    """Evenly spaced steps from the noisiest down to 0."""
    if steps == 1:
        return [timesteps - 1]
    return [round((timesteps - 1) * (1 - i / (steps - 1))) for i in range(steps)]


def compare(
    kind, batch, dim, timesteps, steps, method, guidance, backend="reference", prediction="x0",
    schedule="exp",
):  # fmt: skip
    dtype = dtype_of(backend)
    denoiser, exact = make_pair(kind, dim, dtype)
    plan = ops.plan_sampling(denoiser, schedule, timesteps, method, steps, guidance, prediction)
    condition = torch.randn(batch, dim, dtype=dtype)
    noise = torch.randn(steps, batch, dim, dtype=dtype)
    result = plan(condition, noise=noise, backend=backend)
    settings = plan, timesteps, method, guidance, prediction, schedule
    expected = step_by_step(exact, condition.double(), noise.double(), *settings)
    assert result.shape == (batch, dim) and not result.requires_grad
    assert ops.last_backend("sample") == backend
    error, limit = relative_error(result, expected), TOLERANCES[dtype]
    if error > limit and dtype == torch.float32:  # where rounding errors grow along the chain
        limit = 10 * relative_error(step_by_step(denoiser, condition, noise, *settings), expected)
    assert error <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_step_by_step_sampler(kind, method, backend):
    for steps in (1, 2, 5, 23):
        for guidance in (0, 1, 2, 0.5):
            compare(kind, 5, 6, 23, steps, method, guidance, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_prediction_and_method(schedule, prediction, method, backend):
    for kind, steps, guidance in [("mlp", 4, 2), ("linear", 23, 0), ("adaln", 3, 1.5)]:
        compare(kind, 3, 6, 23, steps, method, guidance, backend, prediction, schedule)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind, backend):
    for batch in (1, 3, 127, 129):
        for dim in (1, 3, 64, 127):
            compare(kind, batch, dim, 50, 4, "ddpm", 2, backend)


@pytest.mark.parametrize("method", METHODS)
def test_the_released_chain(method):
    compare("mlp", 3, 16, 200, 200, method, 2)


@pytest.mark.parametrize("timesteps", [1, 2, 3, 10, 199, 200])
def test_steps_and_coefficients(timesteps):
    for steps in {1, 2, 5, 7, 49, timesteps}:
        if steps > timesteps:
            continue
        for method in METHODS:
            plan = ops.plan_sampling(make_denoiser("linear", 4), "exp", timesteps, method, steps)
            indices = plan.timestep_indices.tolist()
            assert all(abs(a - b) <= 1 for a, b in zip(indices, visited(timesteps, steps)))
            assert indices[0] == timesteps - 1 and (steps == 1 or indices[-1] == 0)
            assert all(a > b for a, b in zip(indices, indices[1:]))
            assert plan.coefficients.shape == (steps, 6)
            assert plan.coefficients.dtype == torch.float64
            assert plan.coefficients[-1].tolist() == [1, 0, 0, 0, 0, 1]
            assert plan.noises == (steps if method == "ddpm" else 1)
            assert plan.multistep == (method == "dpm++" and steps > 2)
    plan = ops.plan_sampling(make_denoiser("linear", 4), timesteps=timesteps)
    assert plan.timestep_indices.tolist() == list(range(timesteps))[::-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_several_draws_and_fresh_noise(kind, backend):
    """Each draw follows its own noise: scripted, or the documented Philox normals."""
    dtype = dtype_of(backend)
    denoiser, exact = make_pair(kind, 7, dtype)
    plan = ops.plan_sampling(denoiser, timesteps=30, steps=4)
    condition, users = torch.randn(3, 7, dtype=dtype), torch.tensor([5, -3, 2**40])
    seed = torch.tensor(99)
    noise = torch.stack(
        [
            torch.stack([philox_normal(seed, users, 7, step, draw) for step in range(4)])
            for draw in range(3)
        ]
    )
    for result in (
        plan(condition, noise=noise.to(dtype), samples=3, backend=backend),
        plan(condition, seed=99, user_ids=users, samples=3, backend=backend),
    ):
        assert result.shape == (3, 3, 7)
        for drawn, script in zip(result, noise):
            expected = step_by_step(exact, condition.double(), script.double(), plan, 30)
            assert relative_error(drawn, expected) < TOLERANCES[dtype]
    one = plan(condition, seed=seed, user_ids=users, backend=backend)
    assert relative_error(one, result[0]) < TOLERANCES[dtype] / 100


def test_seeds():
    plan = ops.plan_sampling(make_denoiser("mlp", 8, torch.float32), timesteps=10)
    condition = torch.randn(4, 8)
    first = plan(condition, seed=5)
    assert torch.equal(first, plan(condition, seed=5))
    assert torch.equal(first, plan(condition, seed=torch.tensor(5)))
    assert torch.equal(first, plan(condition, seed=5, user_ids=torch.arange(4)))
    for seed in (6, -5, 5 + 2**32, torch.tensor(-(2**63)), 2**63 - 1):
        assert ((plan(condition, seed=seed) - first).abs().amax(1) > 0).all()
    others = plan(condition, seed=5, user_ids=torch.arange(4) + 2**32)
    assert ((others - first).abs().amax(1) > 0).all()
    same = plan(condition[:1].expand(4, 8), seed=5)
    assert len(torch.unique(same, dim=0)) == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_users(kind, backend):
    plan = ops.plan_sampling(make_denoiser(kind, 5, torch.float32), timesteps=10)
    assert plan(torch.empty(0, 5), backend=backend).shape == (0, 5)
    assert plan(torch.empty(0, 5), samples=3, backend=backend).shape == (3, 0, 5)
    if kind == "linear":
        assert plan(torch.empty(0, 5), draw="law").shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_independent_of_the_batch(kind, dtype, backend):
    """In the documented regime: widths that are multiples of 16."""
    plan = ops.plan_sampling(make_denoiser(kind, 64, dtype), timesteps=50, steps=6)
    condition = torch.randn(260, 64).to(dtype)
    users = torch.randperm(2**20)[:260] * 7919
    full = plan(condition, seed=3, user_ids=users, backend=backend)
    for size in (1, 2, 3, 5, 16, 17, 127, 129, 260):
        some = torch.randperm(260)[:size]
        part = plan(condition[some], seed=3, user_ids=users[some], backend=backend)
        assert torch.equal(part, full[some])
    twice = plan(condition[:9], seed=3, user_ids=users[:9], samples=2, backend=backend)
    assert torch.equal(twice[0], full[:9])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 3, 127])
def test_odd_widths_differ_by_rounding_only(kind, dim):
    plan = ops.plan_sampling(make_denoiser(kind, dim, torch.float32), timesteps=50, steps=6)
    condition, users = torch.randn(129, dim), torch.arange(129) * 31
    full = plan(condition, user_ids=users, backend="reference")
    for some in (torch.tensor([128]), torch.randperm(129)[:31]):
        part = plan(condition[some], user_ids=users[some], backend="reference")
        torch.testing.assert_close(part, full[some], rtol=1e-3, atol=1e-4 * float(full.abs().max()))


# Identity 1: the linear denoiser's chain is one Gaussian.


def propagated(denoiser, plan, timesteps, *settings):
    """Mean map, offset and each noise entry's map, by feeding basis vectors to the chain."""
    dim = denoiser.dim
    zero = torch.zeros(dim, dim, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)

    def chain(condition, entry=None):
        noise = torch.zeros(plan.steps, dim, dim, dtype=torch.float64)
        if entry is not None:
            noise[entry] = eye
        return step_by_step(denoiser, condition, noise, plan, timesteps, *settings)

    rest = chain(zero)
    maps = [(chain(zero, entry) - rest).T for entry in range(plan.steps)]
    return (chain(eye) - rest).T, rest[0], maps


@torch.no_grad()
def law_of(denoiser, plan, guidance):
    output = denoiser.output
    return linear_law(
        output.weight, output.bias, denoiser.null_condition, plan.times, plan.coefficients, guidance
    )


def with_state_weight(denoiser, rank):
    """Replace W_x by a matrix of this rank."""
    dim = denoiser.dim
    with torch.no_grad():
        left, right = torch.randn(2, dim, rank, dtype=torch.float64)
        denoiser.output.weight[:, :dim] = left @ right.T / dim
    return denoiser


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rank", [6, 2, 0])
def test_law_of_the_linear_chain(method, prediction, schedule, rank):
    for steps, guidance in [(1, 1), (2, 0), (5, 2), (20, 0.5)]:
        denoiser = with_state_weight(make_denoiser("linear", 6), rank)
        plan = ops.plan_sampling(denoiser, schedule, 20, method, steps, guidance, prediction)
        matrix, offset, maps = propagated(
            denoiser, plan, 20, method, guidance, prediction, schedule
        )
        found = law_of(denoiser, plan, guidance)
        assert relative_error(found[0], matrix) < 1e-11
        assert relative_error(found[1], offset) < 1e-11
        covariance = sum(part @ part.T for part in maps)
        assert (found[2] @ found[2].T - covariance).norm() <= 1e-11 * max(covariance.norm(), 1)
        condition, z = torch.randn(2, 9, 6, dtype=torch.float64)
        drawn = plan(condition, noise=z[None], draw="law")
        assert relative_error(drawn, condition @ matrix.T + offset + z @ found[2].T) < 1e-11
        if plan.noises == 1:
            assert relative_error(drawn, plan(condition, noise=z[None])) < 1e-10


def test_law_with_several_draws_and_fresh_noise():
    plan = ops.plan_sampling(make_denoiser("linear", 6), timesteps=20)
    condition, users = torch.randn(5, 6, dtype=torch.float64), torch.tensor([9, 8, -7, 6, 5])
    drawn = plan(condition, seed=4, user_ids=users, samples=3, draw="law")
    z = torch.stack([philox_normal(torch.tensor(4), users, 6, 0, draw) for draw in range(3)])
    scripted = plan(condition, samples=3, noise=z[:, None].double(), draw="law")
    assert drawn.shape == (3, 5, 6) and torch.equal(drawn, scripted)
    one = plan(condition, noise=z[1][None].double(), draw="law")
    assert relative_error(one, drawn[1]) < 1e-12


@pytest.mark.parametrize("draw", ["path", "law"])
def test_fresh_noise_has_the_law(draw):
    """Fixed seeds: a test of a distribution must not fail by chance."""
    torch.manual_seed(1)
    denoiser, count = make_denoiser("linear", 4), 20_000
    plan = ops.plan_sampling(denoiser, timesteps=12)
    matrix, offset, factor = law_of(denoiser, plan, 2.0)
    condition = torch.randn(1, 4, dtype=torch.float64)
    drawn = plan(condition.expand(count, 4), seed=11, draw=draw)
    centred = drawn - (condition @ matrix.T + offset)
    covariance = factor @ factor.T
    variance = covariance.diagonal()
    assert (centred.mean(0).abs() < 4 * (variance / count).sqrt()).all()
    spread = (variance[:, None] * variance + covariance**2) / count  # Isserlis
    assert ((centred.T @ centred / count - covariance).abs() < 4 * spread.sqrt()).all()
    whitened = torch.linalg.solve(factor, centred.T).sort(dim=1).values
    rank = torch.arange(count + 1, dtype=torch.float64) / count
    cumulative = torch.special.ndtr(whitened)
    distance = torch.maximum((rank[1:] - cumulative).max(), (cumulative - rank[:-1]).max())
    assert float(distance) * math.sqrt(count) < 2.2  # Kolmogorov-Smirnov, p = 1e-4


# Low precision.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_good_as_a_plain_loop(kind, prediction, method, backend):
    low, exact = make_pair(kind, 48, torch.bfloat16)
    if kind == "linear":  # the state itself survives the chain: the coefficients' bits matter
        with torch.no_grad():
            low.output.weight[:, :48] += torch.eye(48, dtype=torch.bfloat16)
        exact.load_state_dict(low.state_dict())
    condition = torch.randn(33, 48).bfloat16()
    noise = torch.randn(60, 33, 48).bfloat16()
    plan = ops.plan_sampling(low, timesteps=60, method=method, prediction=prediction)
    settings = plan, 60, method, 2.0, prediction
    expected = step_by_step(exact, condition.double(), noise.double(), *settings)
    plain = step_by_step(low, condition, noise, *settings)
    result = plan(condition, noise=noise, backend=backend)
    assert result.dtype == torch.bfloat16
    bound = 2 * relative_error(plain, expected) + 4 * 2.0**-9
    assert relative_error(result, expected) <= bound
