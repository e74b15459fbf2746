"""A sampling plan as an object: frozen, stale, shared between threads; and its errors."""

import threading

import pytest
import torch
from ops_cases import KINDS, make_denoiser, refused

from contrec_fast import ops
from contrec_fast.models import LinearDenoiser


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_plan_is_refused(kind):
    denoiser = make_denoiser(kind, 5, torch.float32)
    condition = torch.randn(2, 5)

    def step():
        optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
        denoiser(condition, condition, torch.tensor([0, 1])).square().sum().backward()
        optimizer.step()

    for change in (
        step,
        lambda: torch.nn.init.zeros_(denoiser.null_condition),
        lambda: denoiser.load_state_dict(KINDS[kind](5).state_dict()),
        lambda: denoiser.double(),
    ):
        plan = ops.plan_sampling(denoiser, timesteps=10)
        plan(condition)
        change()
        with refused(RuntimeError, "plan"):
            plan(condition)


def test_a_plan_is_frozen_and_leaves_the_denoiser_alone():
    denoiser = make_denoiser("mlp", 5)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    plan = ops.plan_sampling(denoiser, timesteps=10)
    assert not list(plan.parameters()) and not any(b.requires_grad for b in plan.buffers())
    condition = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    copy = condition.detach().clone()
    plan(condition)
    assert torch.equal(condition, copy)
    assert all(torch.equal(before[n], t) for n, t in denoiser.state_dict().items())


def test_scripted_noise_is_not_written_to():
    for batch in (3, 16):
        plan = ops.plan_sampling(make_denoiser("linear", 4), timesteps=8)
        noise = torch.randn(8, batch, 4, dtype=torch.float64)
        copy = noise.clone()
        plan(torch.zeros(batch, 4, dtype=torch.float64), noise=noise)
        assert torch.equal(noise, copy)


def test_threads_do_not_mix_their_weights():
    """Plans of one architecture with different weights, sampled at the same time."""
    plans = [ops.plan_sampling(make_denoiser("mlp", 32, torch.float32), timesteps=40) for _ in "ab"]
    condition = torch.randn(64, 32)
    expected = [plan(condition) for plan in plans]
    wrong = []

    def work(plan, answer):
        for _ in range(5):
            if not torch.equal(plan(condition), answer):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(plans, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Errors.

H = torch.zeros(3, 4)
BAD_CALLS = [
    (TypeError, "condition", {"condition": [[0.0] * 4]}),
    (TypeError, "condition", {"condition": H.double()}),
    (ValueError, "condition", {"condition": torch.zeros(3, 5)}),
    (ValueError, "condition", {"condition": torch.zeros(4)}),
    (ValueError, "condition", {"condition": torch.zeros(3, 4, device="meta")}),
    (ValueError, "samples", {"samples": 0}),
    (ValueError, "samples", {"samples": 65536}),
    (ValueError, "samples", {"samples": 1.5}),
    (ValueError, "draw", {"draw": "mean"}),
    (TypeError, "user_ids", {"user_ids": [0, 1, 2]}),
    (TypeError, "user_ids", {"user_ids": torch.zeros(3)}),
    (TypeError, "user_ids", {"user_ids": torch.zeros(3, dtype=torch.int32)}),
    (ValueError, "user_ids", {"user_ids": torch.arange(4)}),
    (TypeError, "seed", {"seed": 1.5}),
    (TypeError, "seed", {"seed": "1"}),
    (ValueError, "seed", {"seed": 2**63}),
    (TypeError, "seed", {"seed": torch.tensor(1.0)}),
    (ValueError, "seed", {"seed": torch.tensor([1])}),
    (ValueError, "backend", {"backend": "fastest"}),
    (ValueError, "backend", {"backend": "fastest", "draw": "law"}),
    (TypeError, "noise", {"noise": torch.zeros(9, 3, 4, dtype=torch.float64)}),
    (ValueError, "noise", {"noise": torch.zeros(9, 2, 4)}),
    (ValueError, "noise", {"noise": torch.zeros(9, 3, 5)}),
    (ValueError, "noise", {"noise": torch.zeros(8, 3, 4)}),
    (ValueError, "noise", {"noise": torch.zeros(10, 3, 4)}),
    (ValueError, "noise", {"noise": torch.zeros(1, 3, 4)}),
    (ValueError, "noise", {"noise": torch.zeros(2, 9, 3, 4)}),
    (ValueError, "noise", {"noise": torch.zeros(9, 3, 4), "samples": 2}),
    (ValueError, "noise", {"noise": torch.zeros(3, 9, 3, 4), "samples": 2}),
    (ValueError, "noise", {"noise": torch.zeros(2, 3, 4), "draw": "law"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_CALLS)
def test_bad_calls(error, name, arguments):
    plan = ops.plan_sampling(LinearDenoiser(4), timesteps=9)
    with refused(error, name):
        plan(**({"condition": H} | arguments))


BAD_PLANS = [
    (TypeError, "denoiser", {"denoiser": torch.nn.Linear(4, 4)}),
    (ValueError, "schedule", {"schedule": "quadratic"}),
    (ValueError, "timesteps", {"timesteps": 0}),
    (ValueError, "timesteps", {"timesteps": 65536}),
    (ValueError, "timesteps", {"timesteps": 10.0}),
    (ValueError, "method", {"method": "euler"}),
    (ValueError, "prediction", {"prediction": "score"}),
    (ValueError, "prediction", {"prediction": None}),
    (ValueError, "steps", {"steps": 0}),
    (ValueError, "steps", {"steps": 201}),
    (ValueError, "steps", {"steps": 2.5}),
    (ValueError, "guidance", {"guidance": float("nan")}),
    (ValueError, "guidance", {"guidance": float("inf")}),
    (ValueError, "guidance", {"guidance": "2"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_PLANS)
def test_bad_plans(error, name, arguments):
    with refused(error, name):
        ops.plan_sampling(**({"denoiser": LinearDenoiser(4)} | arguments))


def test_noise_shapes_that_are_accepted():
    for method, entries in [("ddpm", [9]), ("ddim", [1, 9]), ("dpm++", [1, 9])]:
        plan = ops.plan_sampling(LinearDenoiser(4), timesteps=9, method=method)
        for count in entries:
            noise = torch.randn(count, 3, 4)
            several = torch.stack([noise, noise.flip(2)])
            one, two = plan(H, noise=noise), plan(H, noise=several, samples=2)
            torch.testing.assert_close(two[0], one)
            if count == 9 and method != "ddpm":  # entries after the first are not used
                assert torch.equal(plan(H, noise=noise[:1]), one)
    with pytest.raises(ValueError, match="^draw: 'law' needs a LinearDenoiser"):
        ops.plan_sampling(make_denoiser("mlp", 4, torch.float32))(H, draw="law")
