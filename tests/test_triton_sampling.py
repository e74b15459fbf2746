"""The Triton samplers: on a GPU, and without one in triton's interpreter."""

import pytest
import torch
from ops_cases import make_denoiser, make_pair, refused, relative_error
from sampler_cases import guided_network, naive_alpha_bars, solve

from contrec_fast import ops
from contrec_fast.models.schedules import METHODS
from contrec_fast.ops.noise import philox, philox_normal
from contrec_fast.ops.triton_sampling import obstacle, run_sample

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
sampling = pytest.importorskip("contrec_kernels.sampling")
words = pytest.importorskip("contrec_kernels.philox").words

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
FORMS = ("persistent", "persistent-pre", "cooperative-pre", "step-pre", "step")
MLP_FORMS = [("mlp", {"form": form}) for form in FORMS]
SAMPLERS = [("linear", {}), *MLP_FORMS, ("adaln", {}), ("separable", {})]
NAMES = [options.get("form", kind) for kind, options in SAMPLERS]
samplers = pytest.mark.parametrize("kind, options", SAMPLERS, ids=NAMES)
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written holds nan."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def call(plan, condition, users=None, seed=0, samples=1, noise=None, **options):
    """`plan(...)` by the kernels [S, B, D], with options that only these have."""
    users = torch.arange(len(condition)) if users is None else users
    noise = noise if noise is None or noise.dim() == 4 else noise[None]
    device = plan.times.device
    here = [None if t is None else t.to(device) for t in (condition, users, noise)]
    return run_sample(
        here[0], torch.tensor(seed, device=device), here[1], samples, here[2], plan.weights,
        plan.times, plan.coefficients, plan.noises, plan.multistep, plan.description,
        float(plan.guidance), **options,
    )  # fmt: skip


def check_against_the_papers(
    device, kind, batch, dim, dtype=torch.float32, timesteps=9, steps=4, method="ddpm",
    guidance=2.0, prediction="x0", **options,
):  # fmt: skip
    """Scripted noise, against the step-by-step sampler in float64 and in the same precision."""
    low, exact = make_pair(kind, dim, dtype)
    plan = ops.plan_sampling(low, "exp", timesteps, method, steps, guidance, prediction)
    condition, noise = torch.randn(batch, dim).to(dtype), torch.randn(steps, batch, dim).to(dtype)

    def chain(denoiser, dtype):
        indices = plan.timestep_indices.tolist()
        network = guided_network(denoiser, condition.to(dtype), indices, guidance)
        bars = naive_alpha_bars("exp", timesteps)
        return solve(network, noise.to(dtype), bars, indices, method, prediction)

    expected, plain = chain(exact, torch.float64), chain(low, dtype)
    result = call(plan.to(device), condition, noise=noise, **options)
    assert result.shape == (1, batch, dim) and result.dtype == dtype
    bound = 2 * relative_error(plain, expected) + 4 * EPS[dtype]
    assert relative_error(result[0].cpu(), expected) <= bound


@samplers
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_step_by_step_sampler(kernel_device, kind, options, method):
    check_against_the_papers(kernel_device, kind, 3, 33, steps=3, method=method, **options)


@samplers
@pytest.mark.parametrize("steps, guidance", [(1, 2.0), (2, 0.5), (3, 0.0)])
def test_few_steps_and_other_guidance(kernel_device, kind, options, steps, guidance):
    check_against_the_papers(kernel_device, kind, 1, 16, steps=steps, guidance=guidance, **options)


@samplers
def test_bfloat16_is_as_good_as_a_plain_loop(kernel_device, kind, options):
    check_against_the_papers(kernel_device, kind, 5, 24, torch.bfloat16, 30, **options)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("method", ["ddpm", "dpm++"])
@pytest.mark.parametrize(
    "kind, options", [("linear", {}), ("mlp", {}), ("mlp", {"form": "step"}), ("adaln", {})]
)
def test_other_predictions(kernel_device, kind, options, method, prediction):
    check_against_the_papers(
        kernel_device, kind, 3, 16, method=method, prediction=prediction, **options
    )


@pytest.mark.parametrize(
    "kind, options", [("linear", {}), *MLP_FORMS[2:]], ids=["linear", *FORMS[2:]]
)
@pytest.mark.parametrize("batch, dim", [(17, 150), (131, 40)])
def test_several_tiles(kernel_device, kind, options, batch, dim):
    """More rows, columns and inner columns than a tile has, none of them a whole number of it."""
    check_against_the_papers(kernel_device, kind, batch, dim, steps=3, **options)


def test_several_blocks_of_persistent_rows(kernel_device):
    for form, dim in [("persistent", 127), ("persistent-pre", 64)]:
        check_against_the_papers(kernel_device, "mlp", 33, dim, steps=3, form=form)


@samplers
def test_several_draws_and_fresh_noise(kernel_device, kind, options):
    """Each draw follows the documented Philox normals of its own."""
    users, condition = torch.tensor([5, -3, 2**40]), torch.randn(3, 22)
    plan = ops.plan_sampling(make_denoiser(kind, 22, torch.float32), timesteps=9, steps=3)
    plan = plan.to(kernel_device)
    noise = torch.stack(
        [
            torch.stack([philox_normal(torch.tensor(-7), users, 22, i, draw) for i in range(3)])
            for draw in range(2)
        ]
    )
    fresh = call(plan, condition, users, -7, 2, **options).cpu()
    scripted = call(plan, condition, users, 0, 2, noise, **options).cpu()
    assert fresh.shape == (2, 3, 22) and (fresh[0] != fresh[1]).all()
    assert relative_error(fresh, scripted) < 1e-5


@samplers
def test_bitwise_independent_of_the_batch(kernel_device, kind, options):
    """Within one class of batches: these all have the same block sizes."""
    plan = ops.plan_sampling(make_denoiser(kind, 32, torch.float32), timesteps=9, steps=2)
    plan = plan.to(kernel_device)
    condition, users = torch.randn(37, 32), torch.randperm(2**20)[:37] * 7919
    full = call(plan, condition, users, **options)[0]
    for size in (1, 19):
        some = torch.randperm(37)[:size]
        assert torch.equal(call(plan, condition[some], users[some], **options)[0], full[some])
    assert torch.equal(call(plan, condition[:9], users[:9], samples=2, **options)[0], full[:9])


def test_modulations_in_chunks(kernel_device):
    """However many steps are worked out at once, the same bits."""
    plan = ops.plan_sampling(make_denoiser("adaln", 16, torch.float32), timesteps=9, steps=3)
    plan, condition = plan.to(kernel_device), torch.randn(2, 16)
    whole = call(plan, condition)
    for steps in (0, 2):
        size = steps * 2 * 8 * 48 * 4  # of these steps: users, columns, bytes
        assert torch.equal(call(plan, condition, chunk_bytes=size), whole)


def test_cooperative_launches_in_chunks(kernel_device, monkeypatch):
    """One launch for all steps, launches of two, a launch per step: the same bits."""
    plan = ops.plan_sampling(make_denoiser("mlp", 16, torch.float32), timesteps=9, steps=6)
    plan, condition = plan.to(kernel_device), torch.randn(3, 16)
    whole = call(plan, condition, form="cooperative-pre")
    assert torch.equal(call(plan, condition, form="step-pre"), whole)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 2 * 3 * 32 * 4)
    assert torch.equal(call(plan, condition, form="cooperative-pre"), whole)


@triton.jit
def store_words(out, seed, users, draws, entry, first_column, ROWS: tl.constexpr):
    row, block = tl.arange(0, ROWS), tl.arange(0, 4)
    place = row[:, None] * 16 + block[None, :] * 4
    found = words(
        tl.load(seed), tl.load(users + row), tl.load(draws + row), entry, first_column, 16
    )
    for i in tl.static_range(4):
        tl.store(out + place + i, found[i].to(tl.int64))


def test_philox_integers(kernel_device):
    def random(low, high):
        return torch.randint(low, high, (8,))

    users, draws = random(-(2**63), 2**63 - 1), random(0, 65536)
    seed, entry, first = random(-(2**63), 2**63 - 1)[0].clone(), 65535, 4 * int(random(0, 99)[0])
    out = torch.full((8, 16), -1, device=kernel_device)
    here = [tensor.to(kernel_device) for tensor in (seed, users, draws.int())]
    store_words[(1,)](out, *here, entry, first, ROWS=8)
    mask = 0xFFFFFFFF
    counter = (
        first // 4 + torch.arange(4)[None], (entry + 65536 * draws)[:, None],
        (users & mask)[:, None], ((users >> 32) & mask)[:, None],
    )  # fmt: skip
    expected = torch.stack(philox(counter, (seed & mask, (seed >> 32) & mask)), dim=-1)
    assert torch.equal(out.cpu(), expected.flatten(1))


def test_normals_within_four_units_in_the_last_place(kernel_device):
    for users, dim, step, draw in [(300, 250, 65535, 65535), (1, 1, 0, 0), (3, 33, 7, 0)]:
        ids, seed = torch.randint(-(2**62), 2**62, (users,)), torch.randint(2**62, (), dtype=int)
        found = sampling.philox_normal(
            seed.to(kernel_device), ids.to(kernel_device), dim, step, draw
        ).cpu()
        expected = philox_normal(seed, ids, dim, step, draw)
        # Floats of one sign are ordered as their bits; near zero both are exact.
        apart = (found.view(torch.int32).long() - expected.view(torch.int32).long()).abs()
        assert int(apart[found != expected].max() if (found != expected).any() else 0) <= 4
    assert sampling.philox_normal(
        seed.to(kernel_device), ids[:0].to(kernel_device), 5, 0
    ).shape == (0, 5)


def test_served_by_name_and_refused_in_one_line(kernel_device, monkeypatch):
    plan = ops.plan_sampling(make_denoiser("mlp", 16, torch.float32), timesteps=4)
    plan, condition = plan.to(kernel_device), torch.randn(3, 16, device=kernel_device)
    found = plan(condition, samples=2, backend="triton")
    assert ops.last_backend("sample") == "triton"
    assert relative_error(found, plan(condition, samples=2, backend="reference")) < 1e-5
    assert plan(condition[:0], backend="triton").shape == (0, 16)
    double = ops.plan_sampling(make_denoiser("mlp", 16), timesteps=4).to(kernel_device)
    with refused(ValueError, "backend"):
        double(condition.double(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA tensors" in obstacle(torch.zeros(1))
    assert "float32" in obstacle(torch.zeros(1).half())


def test_law_of_the_linear_chain(kernel_device):
    plan = ops.plan_sampling(make_denoiser("linear", 24, torch.float32), timesteps=9)
    plan, condition = plan.to(kernel_device), torch.randn(3, 24, device=kernel_device)
    settings = {"seed": 5, "samples": 2, "draw": "law"}
    found = plan(condition, backend="triton", **settings)
    assert relative_error(found, plan(condition, backend="reference", **settings)) < 1e-5


@pytest.mark.gpu
@samplers
def test_captured_in_a_graph(kind, options):
    """Replays with other seeds, users and conditions."""
    plan = ops.plan_sampling(make_denoiser(kind, 64, torch.bfloat16), timesteps=9).cuda()
    condition = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    seed, users = torch.zeros((), dtype=int, device="cuda"), torch.arange(5, device="cuda")
    arguments = (
        condition, seed, users, 1, None, plan.weights, plan.times, plan.coefficients, plan.noises,
        plan.multistep, plan.description, float(plan.guidance),
    )  # fmt: skip
    run_sample(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_sample(*arguments, **options)
    for value in (3, -4):
        seed.fill_(value)
        users.add_(11)
        condition.normal_()
        graph.replay()
        assert torch.equal(found, run_sample(*arguments, **options))
