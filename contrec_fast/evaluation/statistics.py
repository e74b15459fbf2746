"""Whether a difference between two systems is more than chance."""

import numpy as np

CHUNK = 1 << 22  # counts drawn at a time: 32 MiB


def paired_bootstrap(
    ours, theirs, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean difference ours - theirs over users, and its 95 % bootstrap interval.

    Users are drawn with replacement, `samples` times as many as there are, each with both of its
    values; the interval is from the 2.5th to the 97.5th percentile of the mean differences (Efron
    and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

    Args:
        ours, theirs: [U] a metric of each user under either system, in the same order.

    Returns:
        (difference, low, high).

    Raises:
        ValueError: other shapes, no user, or no samples.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.ndim != 1 or not len(ours):
        raise ValueError(f"ours: expected shape [U], at least one, got {list(ours.shape)}")
    if theirs.shape != ours.shape:
        raise ValueError(f"theirs: expected shape {list(ours.shape)}, got {list(theirs.shape)}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    difference = ours - theirs
    # Users with the same difference are alike: how often each value is drawn is multinomial.
    values, counts = np.unique(difference, return_counts=True)
    users, rng = len(difference), np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, CHUNK // len(values))
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = rng.multinomial(users, counts / users, size)
        means[start : start + size] = drawn @ values / users
    low, high = np.percentile(means, (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)
