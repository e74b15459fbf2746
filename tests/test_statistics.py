"""The paired bootstrap against loops, the normal interval, and its own claim."""

import numpy as np
import pytest

from contrec_fast.evaluation import paired_bootstrap, statistics


@pytest.mark.parametrize("users, samples", [(1, 1), (3, 127), (129, 31)])
@pytest.mark.parametrize("chunk", [1, 500, 1 << 22])
def test_agrees_with_a_loop_whatever_the_chunk(users, samples, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    ours, theirs = np.random.rand(2, users).round(1)
    values, counts = np.unique(ours - theirs, return_counts=True)
    rng, means = np.random.default_rng(5), []
    for _ in range(samples):
        drawn = rng.multinomial(users, counts / users).tolist()
        assert sum(drawn) == users
        means.append(sum(count * value for count, value in zip(drawn, values)) / users)
    means.sort()

    def percentile(share):  # linear between neighbours
        place = share * (samples - 1)
        low = int(place)
        high = min(low + 1, samples - 1)
        return means[low] + (place - low) * (means[high] - means[low])

    wanted = (sum(ours - theirs) / users, percentile(0.025), percentile(0.975))
    assert paired_bootstrap(ours, theirs, samples, seed=5) == pytest.approx(wanted)


def test_many_users_give_the_normal_interval():
    ours, theirs = np.random.rand(2, 1001) < [[0.3], [0.25]]
    mean, low, high = paired_bootstrap(ours, theirs, 4001)
    difference = ours.astype(float) - theirs
    error = 1.96 * difference.std() / np.sqrt(1001)
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_the_interval_covers_the_truth_in_about_95_of_100_samples():
    """Hits with shares 0.3 and 0.25, half of the users alike under both; 200 times."""
    covered = 0
    for _ in range(200):
        first, second = np.random.rand(2, 151)
        theirs = np.where(np.random.rand(151) < 0.5, first, second) < 0.25
        _, low, high = paired_bootstrap(first < 0.3, theirs, 501)
        covered += low <= 0.3 - 0.25 <= high
    assert 0.88 < covered / 200 < 1  # a standard error is 0.015


@pytest.mark.parametrize(
    "ours, theirs, samples, message",
    [
        ([], [], 9, r"ours: expected shape \[U\], at least one, got \[0\]"),
        ([[1]], [[1]], 9, r"ours: expected shape \[U\], at least one, got \[1, 1\]"),
        ([1, 2], [1], 9, r"theirs: expected shape \[2\], got \[1\]"),
        ([1], [1], 0, "samples: expected at least 1, got 0"),
    ],
)
def test_refuses(ours, theirs, samples, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(ours, theirs, samples)
