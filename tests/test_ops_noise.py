"""Counter-based noise: known answers of Philox, the documented layout, and its distribution."""

import math

import numpy as np
import pytest
import torch

from contrec_fast.ops.noise import MAX_STEPS, normals_of, philox, philox_normal

MASK = 2**32 - 1

# Random123's known-answer file, philox 4x32, 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


def python_philox(counter, key):
    """Philox4x32-10 in Python integers, as the paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = right >> 32 ^ c1 ^ k0, right & MASK, left >> 32 ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def python_normals(seed, user, dim, step, draw):
    """The documented noise of one user, in Python: float64 [dim]."""
    seed, user = seed % 2**64, user % 2**64
    values = []
    for block in range(-(-dim // 4)):
        counter = [block, step + 65536 * draw, user & MASK, user >> 32]
        found = python_philox(counter, [seed & MASK, seed >> 32])
        for first, second in (found[:2], found[2:]):
            radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
            angle = 2 * math.pi * (second >> 8) / 2**24
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(values[:dim], dtype=torch.float64)


def normal(seed, users, dim, step=0, draw=0):
    return philox_normal(torch.tensor(seed), torch.tensor(users), dim, step, draw)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    result = philox(
        tuple(torch.tensor(word) for word in words(counter)),
        tuple(torch.tensor(word) for word in words(key)),
    )
    assert [int(word) for word in result] == words(expected)
    assert python_philox(words(counter), words(key)) == words(expected)


def test_philox_of_random_counters():
    counters, keys = torch.randint(0, 2**32, (50, 4)), torch.randint(0, 2**32, (50, 2))
    result = torch.stack(philox(counters.unbind(1), keys.unbind(1)), dim=1)
    expected = [python_philox(c, k) for c, k in zip(counters.tolist(), keys.tolist())]
    assert result.tolist() == expected


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 127, 129])
def test_layout(dim):
    seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
    users = [0, 1, -1, 2**32, 2**63 - 1, -(2**63)]
    users += torch.randint(-(2**63), 2**63 - 1, (3,)).tolist()
    for step, draw in [(0, 0), (199, 0), (0, 3), (MAX_STEPS - 1, MAX_STEPS - 1)]:
        result = normal(seed, users, dim, step, draw)
        expected = torch.stack([python_normals(seed, user, dim, step, draw) for user in users])
        assert result.dtype == torch.float32 and result.shape == (len(users), dim)
        # One rounding to float32; multiples of a quarter turn are exact zeros in ours only.
        torch.testing.assert_close(result.double(), expected, rtol=2.0**-24, atol=1e-14)


def test_independent_of_the_batch():
    users = torch.randint(-(2**63), 2**63 - 1, (129,))
    seed = torch.tensor(17)
    full = philox_normal(seed, users, 37, step=5)
    chosen = torch.randint(0, 129, (40,))
    assert torch.equal(philox_normal(seed, users[chosen], 37, step=5), full[chosen])
    for row in (0, 63, 128):
        assert torch.equal(philox_normal(seed, users[row : row + 1], 37, step=5)[0], full[row])
    assert torch.equal(philox_normal(seed, users, 21, step=5), full[:, :21])


def test_every_key_has_its_own_noise():
    seeds = [0, 1, -1, 2**32, -(2**32), 2**63 - 1]
    users = [0, 1, -1, 2**32 - 1, 2**32, -(2**32), 2**63 - 1]
    places = [(0, 0), (1, 0), (0, 1), (1, 1), (MAX_STEPS - 1, 0), (0, MAX_STEPS - 1)]
    rows = torch.cat([normal(s, users, 8, *place) for s in seeds for place in places])
    assert len(rows) == len(seeds) * len(users) * len(places)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    # No four neighbours are repeated elsewhere either.
    assert len(torch.unique(rows.reshape(-1, 4), dim=0)) == 2 * len(rows)


def test_no_users():
    result = philox_normal(torch.tensor(3), torch.empty(0, dtype=torch.int64), 5, step=0)
    assert result.shape == (0, 5) and result.dtype == torch.float32


def test_extreme_integers():
    words = torch.tensor([0, 255, 256, 2**30, 2**31, 3 * 2**30, MASK])
    first, second = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    cosine, sine = normals_of(first, second)
    assert cosine.isfinite().all() and sine.isfinite().all()
    radius = math.sqrt(48 * math.log(2))
    assert float(torch.stack([cosine, sine]).abs().max()) == np.float32(radius)
    top = first == MASK  # u = 1: radius 0
    assert not cosine[top].any() and not sine[top].any()
    quarters = (first == 0) & (second % 2**30 == 0)
    turns = torch.stack([cosine, sine], dim=1)[quarters] / np.float32(radius)
    assert turns.tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]


@pytest.fixture(scope="module")
def sample():
    """A fixed seed: a test of a distribution must not fail by chance. [256 users, 1024]."""
    return normal(20240607, list(range(-128, 128)), 1024, step=7).double()


def test_moments(sample):
    count = sample.numel()
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = abs(float(sample.pow(power).mean()) - moment)
        assert error < 4 * math.sqrt(spread / count)


def test_kolmogorov_smirnov(sample):
    values = sample.flatten().sort().values
    count = len(values)
    cumulative = torch.special.ndtr(values)
    rank = torch.arange(count, dtype=torch.float64)
    above = ((rank + 1) / count - cumulative).max()
    below = (cumulative - rank / count).max()
    assert float(max(above, below)) * math.sqrt(count) < 1.95  # p = 0.001


def test_chi_squared_of_the_tails(sample):
    edges = torch.linspace(-4, 4, 81, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(sample.flatten(), edges), minlength=82)
    shares = torch.cat([torch.zeros(1), torch.special.ndtr(edges), torch.ones(1)]).diff()
    expected = shares * sample.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - 81) < 4 * math.sqrt(2 * 81)


def test_neighbours_are_uncorrelated(sample):
    """Elements, users, steps and draws: each pair's correlation is that of independence."""
    users = list(range(-128, 128))
    pairs = [
        (sample[:, :-1], sample[:, 1:]),
        (sample[:-1], sample[1:]),
        (sample, normal(20240607, users, 1024, step=8).double()),
        (sample, normal(20240607, users, 1024, step=7, draw=1).double()),
        (sample, normal(20240608, users, 1024, step=7).double()),
    ]
    for left, right in pairs:
        assert abs(float((left * right).mean())) < 4 / math.sqrt(left.numel())
        assert abs(float(((left**2 - 1) * (right**2 - 1)).mean())) < 8 / math.sqrt(left.numel())
