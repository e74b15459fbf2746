"""Schedules, predictions and solvers against their papers' formulas, and a chain solved exactly."""

import math

import pytest
import torch
from ops_cases import refused, relative_error
from sampler_cases import naive_alpha_bars, solve

from contrec_fast.models import schedules
from contrec_fast.models.schedules import METHODS, PREDICTIONS, SCHEDULES, alpha_bars

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
each_method = pytest.mark.parametrize("method", METHODS)


@each_schedule
@pytest.mark.parametrize("timesteps", [1, 2, 3, 10, 199, 1000])
def test_schedules_equal_their_formulas(schedule, timesteps):
    expected = torch.tensor(naive_alpha_bars(schedule, timesteps), dtype=torch.float64)
    found = alpha_bars(schedule, timesteps)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


@each_schedule
@pytest.mark.parametrize("timesteps", [1, 2, 3, 5, 7, 20, 21, 127, 1000, 9999, 10001, 65535])
def test_schedules_fall_within_0_and_1(schedule, timesteps):
    bars = alpha_bars(schedule, timesteps)
    assert bars.shape == (timesteps,) and bars.dtype == torch.float64
    assert 0 < bars[-1] and bars[0] < 1 and (bars.diff() < 0).all()
    if timesteps >= 1000:
        assert bars[0] > 0.9 and bars[-1] < 0.01


def test_published_values():
    """Betas of 1000 linear steps; the continuous share is met wherever beta is below 0.999."""
    bars = alpha_bars("linear", 1000)
    betas = 1 - bars / torch.cat([torch.ones(1), bars[:-1]])
    assert betas[[0, 1, -1]].tolist() == pytest.approx([1e-4, 1e-4 + 0.0199 / 999, 0.02])
    t = torch.arange(1, 300).double() / 300
    cosine = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.004 / 1.008 * math.pi) ** 2
    torch.testing.assert_close(alpha_bars("cosine", 300)[:-1], cosine)
    torch.testing.assert_close(alpha_bars("sqrt", 300)[:-1], (1 - (t + 1e-4).sqrt()) / 0.99)


@each_prediction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_targets_give_x0_back(prediction, dtype):
    x0, noise = torch.randn(2, 40, 3).to(dtype)
    # Signal shares from end to end, those near 1 held in float64.
    signal = alpha_bars("linear", 40)[:, None]
    x = (signal.sqrt() * x0 + (1 - signal).sqrt() * noise).to(dtype)
    target = schedules.training_target(prediction, x0, noise, signal)
    found = schedules.to_x0(prediction, target, x, signal)
    assert target.dtype == found.dtype == dtype and target.shape == found.shape == x0.shape
    error = (found - x0).double().abs() * signal.sqrt()
    assert error.max() < 16 * torch.finfo(dtype).eps


@each_prediction
def test_targets_and_x0_are_differentiable(prediction):
    first, second = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    signal = torch.rand(4, 1, dtype=torch.float64)
    for function in (schedules.training_target, schedules.to_x0):

        def of_both(a, b, function=function):
            return function(prediction, a, b, signal) + 0 * (a + b)

        assert torch.autograd.gradcheck(of_both, (first, second))


def test_x0_and_eps_are_their_own_targets():
    x0, noise = torch.randn(2, 5, 3)
    signal = torch.rand(5, 1)
    assert torch.equal(schedules.training_target("x0", x0, noise, signal), x0)
    assert torch.equal(schedules.training_target("eps", x0, noise, signal), noise)


def random_network(dim, steps):
    """A smooth network, another one at each step."""
    weights = torch.randn(steps, dim, dim, dtype=torch.float64) / dim**0.5
    return lambda x, step: (x @ weights[step]).tanh() + 0.3 * x


@each_method
@each_prediction
@each_schedule
def test_solvers_equal_their_papers(schedule, prediction, method):
    timesteps = 40
    bars = alpha_bars(schedule, timesteps)
    for steps in (1, 2, 3, 4, 7, 40):
        indices = schedules.respaced_indices(timesteps, steps)
        table = schedules.sampler_coefficients(bars, indices, method, prediction)
        assert table.shape == (steps, 6) and table.dtype == torch.float64
        assert table[-1, :4].tolist() == [1, 0, 0, 0]
        noises = schedules.count_noises(table)
        assert noises == (steps if method == "ddpm" else 1)
        multistep = schedules.is_multistep(table)
        assert multistep == (method == "dpm++" and steps > 2) == bool((table[1:-1, 3] < 0).any())
        noise = list(torch.randn(noises, 5, 6, dtype=torch.float64))
        network, naive = random_network(6, steps), naive_alpha_bars(schedule, timesteps)
        expected = solve(network, noise, naive, indices.tolist(), method, prediction)
        for flag in (multistep, True):
            found = schedules.run_sampler(network, table, noises, noise.__getitem__, flag)
            assert relative_error(found, expected) < 1e-10


@each_method
@each_prediction
@each_schedule
def test_guidance_on_outputs_is_guidance_on_x0(schedule, prediction, method):
    """Every x0_hat is affine in f with the same share of x, and the two weights add up to one."""
    guidance, steps = 1.7, 5
    bars, indices = alpha_bars(schedule, 30), schedules.respaced_indices(30, steps)
    table = schedules.sampler_coefficients(bars, indices, method, prediction)
    conditional, free = random_network(6, steps), random_network(6, steps)
    noise = torch.randn(steps, 3, 6, dtype=torch.float64)

    def outputs(x, step):
        return (1 + guidance) * conditional(x, step) - guidance * free(x, step)

    def predictions(x, step):
        signal = bars[indices[step]].expand(3, 1)
        one, other = (
            schedules.to_x0(prediction, branch(x, step), x, signal)
            for branch in (conditional, free)
        )
        return (1 + guidance) * one - guidance * other

    count, of_x0 = schedules.count_noises(table), table.clone()
    of_x0[:, 4:] = torch.tensor([0.0, 1.0])
    found = schedules.run_sampler(outputs, table, count, noise.__getitem__)
    expected = schedules.run_sampler(predictions, of_x0, count, noise.__getitem__)
    assert relative_error(found, expected) < 1e-10


MEAN, DEVIATION = torch.tensor([[0.5, -2.0, 0.0]]), torch.tensor([[0.3, 1.0, 2.0]])


def gaussian_error(bars, indices, method, prediction="x0"):
    """Distance from the exact solution when the data are `MEAN + DEVIATION * normal`.

    The probability flow keeps each point's standard score under the marginals (variance
    `signal * DEVIATION^2 + 1 - signal`); the last step then reads off the posterior's mean.
    """

    def spread(signal):
        return (signal * DEVIATION**2 + 1 - signal).sqrt()

    def posterior_mean(x, signal):
        return MEAN + signal.sqrt() * DEVIATION**2 / spread(signal) ** 2 * (
            x - signal.sqrt() * MEAN
        )

    def network(x, step):
        signal = bars[indices[step]]
        x0 = posterior_mean(x, signal)
        eps = (x - signal.sqrt() * x0) / (1 - signal).sqrt()
        return {
            "x0": x0, "eps": eps, "v": signal.sqrt() * eps - (1 - signal).sqrt() * x0
        }[prediction]  # fmt: skip

    first, last = bars[indices[0]], bars[indices[-1]]
    score = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    start = first.sqrt() * MEAN + spread(first) * score
    exact = posterior_mean(last.sqrt() * MEAN + spread(last) * score, last)
    table = schedules.sampler_coefficients(bars, indices, method, prediction)
    found = schedules.run_sampler(network, table, 1, lambda _: start)
    return float((found - exact).norm())


@each_prediction
@pytest.mark.parametrize("method, order", [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(method, order, prediction):
    """On steps of equal width in lambda, halved again and again."""
    errors = []
    for steps in (40, 80, 160, 320):
        bars = torch.linspace(3, -3, steps + 1, dtype=torch.float64).mul(2).sigmoid()
        errors.append(gaussian_error(bars, torch.arange(steps, -1, -1), method, prediction))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert orders == pytest.approx([order] * 3, abs=0.15), orders


@each_schedule
@pytest.mark.parametrize("steps", [3, 4, 5, 8, 15, 30, 100])
def test_second_order_is_nearer_than_first(schedule, steps):
    bars, indices = alpha_bars(schedule, 1000), schedules.respaced_indices(1000, steps)
    errors = {method: gaussian_error(bars, indices, method) for method in ("ddim", "dpm++")}
    assert errors["dpm++"] < 0.9 * errors["ddim"], errors


@pytest.mark.parametrize(
    "name, function, arguments",
    [
        ("schedule", alpha_bars, ("cubic", 10)),
        ("timesteps", alpha_bars, ("sqrt", 0)),
        ("method", schedules.sampler_coefficients, (torch.ones(1), torch.zeros(1).long(), "dpm")),
        (
            "prediction",
            schedules.sampler_coefficients,
            (torch.ones(1), torch.zeros(1).long(), "ddim", "x1"),
        ),
        ("prediction", schedules.to_x0, ("score", *torch.ones(3, 1, 1))),
        ("prediction", schedules.training_target, ("score", *torch.ones(3, 1, 1))),
    ],
)
def test_refusals(name, function, arguments):
    with refused(ValueError, name):
        function(*arguments)
