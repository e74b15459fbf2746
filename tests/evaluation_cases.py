"""What the tests of metrics and baselines share: small datasets, and lists of their own."""

import numpy as np

from contrec_fast.data import Dataset, Items


def make_dataset(histories, items, targets=None):
    names = [str(item) for item in range(items)]
    blank = [""] * items
    targets = [-1] * len(histories) if targets is None else targets
    return Dataset(
        Items(names, blank, blank),
        [str(user) for user in range(len(histories))],
        [np.array(history, dtype=np.int64) for history in histories],
        np.array(targets, dtype=np.int64),
    )


def random_dataset(users, items, longest=9):
    rng = np.random.default_rng(np.random.randint(2**31))  # of the test run's seed
    histories = [rng.integers(0, items, length) for length in rng.integers(1, longest + 1, users)]
    return make_dataset(histories, items, rng.integers(-1, items, users))


def cycle(users, items, length):
    """Everybody goes round the same circle of items; the target is the next one."""
    starts = [user % items for user in range(users)]
    histories = [[(start + step) % items for step in range(length)] for start in starts]
    return make_dataset(histories, items, [(start + length) % items for start in starts])


def random_lists(users, items, k):
    """[users, k] different items per list, some of them ended early."""
    ids = np.stack([np.random.permutation(items)[:k] for _ in range(users)])
    lengths = np.random.randint(0, k + 1, (users, 1))
    return np.where(np.arange(k) < lengths, ids, -1)
