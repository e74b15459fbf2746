"""Metrics and baselines against plain restatements, the tie rule, and real data."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrec_fast.data import Dataset, Items, read_folder
from contrec_fast.evaluation import (
    ItemKNN,
    Markov,
    Popularity,
    evaluate_baselines,
    rank_metrics,
    recommend,
    target_counts,
)


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


def random_dataset(seed, users, items, longest=9):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, items, length) for length in rng.integers(1, longest + 1, users)]
    return make_dataset(histories, items, rng.integers(-1, items, users))


def test_metrics_by_hand():
    ids = np.array([[3, 1, 2], [0, 2, -1], [1, 2, 3], [5, 6, 7], [0, 1, 2]])
    targets = np.array([3, 2, 3, 0, -1])  # ranks 1, 2, 3, none; the last user has no target
    assert rank_metrics(ids, targets, (1, 3)) == pytest.approx(
        {
            "hr@1": 1 / 4,
            "ndcg@1": 1 / 4,
            "hr@3": 3 / 4,
            "ndcg@3": (1 + 1 / math.log2(3) + 1 / 2) / 4,
        }
    )


@pytest.mark.parametrize("users", [1, 3, 127, 129])
def test_metrics_agree_with_a_loop(users):
    rng = np.random.default_rng()
    ids = np.stack([rng.permutation(40)[:25] for _ in range(users)])
    ids[:, 17:] = np.where(rng.random((users, 1)) < 0.3, -1, ids[:, 17:])
    targets = rng.integers(-1, 40, users)
    targets[0] = 7
    wanted = {}
    for cutoff in (10, 20):
        ranks = [
            list(row[:cutoff]).index(target) + 1 if target in row[:cutoff] else None
            for row, target in zip(ids, targets, strict=True)
            if target >= 0
        ]
        wanted[f"hr@{cutoff}"] = sum(rank is not None for rank in ranks) / len(ranks)
        wanted[f"ndcg@{cutoff}"] = sum(1 / math.log2(r + 1) for r in ranks if r) / len(ranks)
    result = rank_metrics(ids, targets)
    assert result == pytest.approx(wanted)
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize(
    "ids, targets, message",
    [
        (np.zeros((2, 19)), [1, 2], r"ids: expected shape \[2, at least 20\], got \[2, 19\]"),
        (np.zeros((3, 20)), [1, 2], r"ids: expected shape \[2, at least 20\], got \[3, 20\]"),
        (np.zeros(20), [1], "ids: expected shape"),
        (np.zeros((1, 20)), [[1]], r"targets: expected shape \[U\], got \[1, 1\]"),
        (np.full((2, 20), -1), [-1, -1], "targets: expected at least one user with a target"),
        (np.full((0, 20), -1), [], "targets: expected at least one user with a target"),
        (np.array([[*range(18), 4, -1]]), [1], "ids: expected different items.*got item 4 twice"),
    ],
)
def test_metrics_refuse(ids, targets, message):
    with pytest.raises(ValueError, match=message):
        rank_metrics(ids, targets)


def test_target_counts():
    data = make_dataset([[0, 1], [2], [0, 3]], 6, [1, 3, 5])
    assert target_counts(data) == {"total": 3, "in_history": 1, "unseen": 1}
    data = make_dataset([[0, 1], [2]], 6, [-1, 4])
    assert target_counts(data) == {"total": 1, "in_history": 0, "unseen": 1}


def dense_knn(data):
    """[U, N] float64, the definition written out on dense matrices."""
    binary = np.zeros((len(data.histories), len(data.items)))
    for row, history in enumerate(data.histories):
        binary[row, history] = 1
    norms = np.maximum(np.linalg.norm(binary, axis=0), 1)
    similarity = binary.T @ binary / norms / norms[:, None]
    np.fill_diagonal(similarity, 0)
    return binary @ similarity


@pytest.mark.parametrize("users, items", [(1, 1), (1, 3), (3, 127), (129, 20), (127, 129)])
def test_baselines_agree_with_their_definitions(users, items):
    data = random_dataset(np.random.SeedSequence().entropy, users, items)
    popularity = np.zeros(items)
    transitions = np.zeros((items, items))
    for history in data.histories:
        for item in history:
            popularity[item] += 1
        for before, after in zip(history[:-1], history[1:], strict=True):
            transitions[before, after] += 1
    knn = dense_knn(data)
    markov = transitions[[history[-1] for history in data.histories]] + 0.001 * knn
    rows = np.random.default_rng().permutation(users)[: users // 2 + 1]
    for baseline, wanted in (
        (Popularity(), np.tile(popularity, (users, 1))),
        (ItemKNN(), knn),
        (Markov(), markov),
    ):
        scores = baseline.fit(data).scores(rows)
        assert scores.dtype == torch.float32 and scores.shape == (len(rows), items)
        np.testing.assert_allclose(scores.numpy(), wanted[rows], rtol=1e-6, atol=1e-9)


def test_baselines_never_read_targets():
    data = random_dataset(1, 30, 20)
    other = Dataset(data.items, data.user_ids, data.histories, np.full(30, 3))
    for kind in (Popularity, Markov):
        first, second = kind().fit(data), kind().fit(other)
        np.testing.assert_array_equal(recommend(first, data, 10), recommend(second, other, 10))


class Given:
    def __init__(self, scores):
        self.all_scores = scores

    def scores(self, rows):
        return self.all_scores[torch.from_numpy(rows)]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_recommend_orders_by_score_then_index_without_the_history(data):
    users, items = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 12))
    # Few different values, so that ties are the rule; both zeros are one value.
    value = st.sampled_from([-2.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3e38])
    scores = data.draw(st.lists(value, min_size=users * items, max_size=users * items))
    scores = torch.tensor(scores).reshape(users, items)
    item = st.integers(0, items - 1)
    histories = [data.draw(st.lists(item, min_size=1, max_size=items + 2)) for _ in range(users)]
    k, batch = data.draw(st.integers(1, items + 3)), data.draw(st.integers(1, 8))
    wanted = np.full((users, k), -1)
    for row, history in enumerate(histories):
        left = [item for item in range(items) if item not in history]
        left.sort(key=lambda item: (-scores[row, item].item(), item))
        wanted[row, : len(left)] = left[:k]
    before = scores.clone()
    ids = recommend(Given(scores), make_dataset(histories, items), k, batch)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, wanted)
    assert torch.equal(scores, before)  # the baseline's own scores are not written to


def test_recommend_does_not_depend_on_the_batch():
    data = random_dataset(2, 129, 60, longest=30)
    baseline = Markov().fit(data)
    whole = recommend(baseline, data, 20, batch=1000)
    for batch in (1, 3, 128):
        np.testing.assert_array_equal(recommend(baseline, data, 20, batch), whole)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        recommend(baseline, data, 0)


def test_evaluate_baselines_on_a_catalog_smaller_than_the_list():
    # Everybody goes round the circle of five; three items have been seen.
    data = make_dataset([[i, (i + 1) % 5, (i + 2) % 5] for i in range(5)], 5, [3, 4, 0, 1, 2])
    result = evaluate_baselines(data)
    assert result["markov"] == {"hr@10": 1.0, "ndcg@10": 1.0, "hr@20": 1.0, "ndcg@20": 1.0}
    # Equally popular: two are left, the lower index first: the target, but for user 1.
    assert result["popularity"]["ndcg@10"] == pytest.approx((4 + 1 / math.log2(3)) / 5)


REAL = os.environ.get("CONTREC_DATA")


@pytest.mark.skipif(not REAL, reason="CONTREC_DATA (a folder of real data sets) is not set")
@pytest.mark.parametrize(
    "name, popularity, markov",
    [
        ("software", (0.0067, 0.0028), (0.1732, 0.1135)),
        ("lastfm", (0.0477, 0.0212), (0.0467, 0.0247)),
        ("beauty", (0.0135, 0.0061), (0.0868, 0.0573)),
        ("ml1m", (0.0379, 0.0184), (0.1810, 0.1029)),
    ],
)
def test_baselines_agree_with_an_independent_measurement(name, popularity, markov):
    result = evaluate_baselines(read_folder(Path(REAL) / name))
    for kind, wanted in (("popularity", popularity), ("markov", markov)):
        got = (result[kind]["hr@10"], result[kind]["ndcg@10"])
        assert got == pytest.approx(wanted, abs=0.002)
