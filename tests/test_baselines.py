"""Baselines against plain restatements of their definitions, planted structure, and real data."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import cycle, make_dataset, random_dataset
from model_cases import Recorder

from contrec_fast.data import Dataset, read_folder
from contrec_fast.evaluation import (
    BASELINES,
    EASE,
    CatalogTooLarge,
    ItemKNN,
    LightGCNBaseline,
    Markov,
    Popularity,
    SASRec,
    evaluate_baselines,
    fit_baselines,
    rank_metrics,
    recommend,
)
from contrec_fast.evaluation.sasrec import SASRecNetwork, _batches

SMALL = {"epochs": 3, "patience": 2, "every": 1}


def binary_matrix(data):
    binary = np.zeros((len(data.histories), len(data.items)))
    for row, history in enumerate(data.histories):
        binary[row, history] = 1
    return binary


def dense_knn(data):
    """[U, N] float64, the definition written out on dense matrices."""
    binary = binary_matrix(data)
    norms = np.maximum(np.linalg.norm(binary, axis=0), 1)
    similarity = binary.T @ binary / norms / norms[:, None]
    np.fill_diagonal(similarity, 0)
    return binary @ similarity


@pytest.mark.parametrize("users, items", [(1, 1), (1, 3), (3, 127), (129, 20), (127, 129)])
def test_counts_agree_with_their_definitions(users, items):
    data = random_dataset(users, items)
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


@pytest.mark.parametrize("users, items, l2", [(1, 1, 100), (3, 127, 0.5), (129, 31, 200)])
def test_ease_is_ridge_regression_of_each_item_on_the_others(users, items, l2):
    """Column j of the weights minimises |X_j - X b|^2 + l2 |b|^2 with b_j = 0 (the paper's
    problem, solved item by item instead of by its closed form)."""
    data = random_dataset(users, items, longest=30)
    binary, weights = binary_matrix(data), np.zeros((items, items))
    for item in range(items):
        other = np.arange(items) != item
        rest = binary[:, other]
        gram = rest.T @ rest + l2 * np.eye(items - 1)
        weights[other, item] = np.linalg.solve(gram, rest.T @ binary[:, item])
    ease = EASE(l2).fit(data)
    np.testing.assert_allclose(ease.weights.numpy(), weights, rtol=1e-3, atol=2e-6)
    rows = np.random.permutation(users)[: users // 2 + 1]
    scores = ease.scores(rows)
    assert scores.dtype == torch.float32 and scores.shape == (len(rows), items)
    np.testing.assert_allclose(scores.numpy(), (binary @ weights)[rows], rtol=1e-3, atol=2e-5)


def test_a_catalog_too_large_for_ease_is_refused_and_its_row_left_out(monkeypatch):
    monkeypatch.setattr(EASE, "LARGEST", 6)
    data, progress = random_dataset(9, 7), Recorder()
    with pytest.raises(CatalogTooLarge, match="items: expected at most 6 for EASE.*got 7"):
        EASE().fit(data)
    fitted = dict(fit_baselines(data, ["popularity", "ease", "markov"], progress))
    assert list(fitted) == ["popularity", "markov"]
    assert progress.lines == [f"ease is left out: {error_of(EASE().fit, data)}"]


def error_of(function, *arguments):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def test_an_unknown_baseline_is_refused_before_anything_is_fitted():
    message = error_of(fit_baselines, None, ["sasrec", "pop"])
    assert message.startswith("baselines: expected some of popularity,")
    assert message.endswith("got 'pop'")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_never_read_targets_and_repeat_themselves(name):
    data = random_dataset(31, 19)
    other = Dataset(data.items, data.user_ids, data.histories, np.full(31, 3))
    arguments = SMALL if name in ("lightgcn", "sasrec") else {}
    lists = []
    for part in (data, other):
        state = torch.get_rng_state()
        lists.append(recommend(BASELINES[name](**arguments).fit(part), part, 10))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
    np.testing.assert_array_equal(*lists)


@pytest.mark.parametrize("kind", [LightGCNBaseline, SASRec])
def test_epochs_are_those_of_the_best_look_at_the_held_out_items(kind, monkeypatch):
    """Scripted values: the third look is the best, and two more do not improve on it."""
    data, progress = random_dataset(9, 21), Recorder()
    script, seen = iter([0.1, 0.2, 0.5, 0.5, 0.4]), []

    def scripted(ids, targets, cutoffs):
        seen.append((ids, targets))
        return {"ndcg@10": next(script)}

    monkeypatch.setattr("contrec_fast.evaluation.trained.rank_metrics", scripted)
    baseline = kind(epochs=20, patience=4, every=2).fit(data, progress)
    assert baseline.chosen_epochs == 6
    assert [len(figures) for figures in progress.figures.values()] == [10, 6]
    assert list(progress.totals.values()) == [20, 6]
    for ids, targets in seen:
        np.testing.assert_array_equal(targets, data.for_validation().targets)
        for row, history in zip(ids, data.for_validation().histories):
            assert not set(row) & set(history)


@pytest.mark.parametrize("kind", [LightGCNBaseline, SASRec])
def test_nothing_to_hold_out_trains_all_epochs(kind):
    data = make_dataset([[0, 1], [2], [1, 2]], 4)
    baseline = kind(epochs=3, patience=1, every=1).fit(data)
    assert baseline.chosen_epochs == 3
    scores = baseline.scores(np.array([2, 0]))
    assert scores.shape == (2, 4) and scores.dtype == torch.float32 and scores.isfinite().all()


def test_lightgcn_finds_planted_blocks():
    """Users choose within their block; a few items are popular everywhere."""
    blocks, size, users = 7, 11, 161
    rng = np.random.default_rng(np.random.randint(2**31))
    histories, targets = [], []
    for user in range(users):
        own = rng.permutation(size)[:6] + size * (user % blocks)
        hits = blocks * size + rng.permutation(3)[:2]
        histories.append(rng.permutation([*own[:-1], *hits]))
        targets.append(own[-1])
    data = make_dataset(histories, blocks * size + 3, targets)
    ours, popular = (
        rank_metrics(recommend(baseline.fit(data), data, 10), data.targets, (10,))["hr@10"]
        for baseline in (LightGCNBaseline(dim=16, epochs=40), Popularity())
    )
    assert popular < 0.4 and ours > 0.9  # the block has six more items


def network(items=29, length=13, dropout=0.0):
    return SASRecNetwork(items, 16, 2, 2, length, dropout).eval()


@pytest.mark.parametrize("changed", [1, 6, 12])
def test_sasrec_is_causal(changed):
    histories = torch.randint(29, (3, 13))
    other = histories.clone()
    other[:, changed] = (other[:, changed] + 1) % 29
    with torch.no_grad():
        before, after = (network_(rows) for network_ in [network()] for rows in (histories, other))
    torch.testing.assert_close(before[:, :changed], after[:, :changed])
    moved = (before[:, changed:] - after[:, changed:]).abs().amax((0, 2))
    assert (moved > 1e-5).all()  # and what follows does see it


def test_sasrec_scores_do_not_depend_on_the_batch_or_its_padding():
    data = random_dataset(37, 23, longest=17)
    baseline = SASRec(width=16, length=13, dropout=0.5, **SMALL).fit(data)
    rows = np.random.permutation(37)
    together = baseline.scores(rows)
    for position, row in enumerate(rows):
        alone = baseline.scores(np.array([row]))
        torch.testing.assert_close(alone[0], together[position])
    shorter = make_dataset([history[-13:] for history in data.histories], 23)
    baseline.histories = shorter.histories  # only the last 13 items are shown
    torch.testing.assert_close(baseline.scores(rows), together)


@pytest.mark.parametrize("length, filter_seen", [(6, True), (17, False)])
def test_sasrec_learns_a_cycle(length, filter_seen):
    """Histories longer than the window, too, where every item has been seen."""
    data = cycle(33, 11, length)
    baseline = SASRec(
        width=32, length=7, dropout=0.0, batch=8, epochs=40, learning_rate=1e-2,
        filter_seen=filter_seen,
    ).fit(data)  # fmt: skip
    ids = recommend(baseline, data, 10, filter_seen=filter_seen)
    assert rank_metrics(ids, data.targets, (1, 10))["hr@1"] == 1


def test_sasrec_needs_a_pair():
    message = error_of(SASRec(**SMALL).fit, make_dataset([[0], [1]], 2))
    assert message == "histories: expected a user with at least two items, found none"


@pytest.mark.parametrize("size", [2, 3, 8, 51])
def test_sasrec_batches_train_every_position_once(size):
    data = random_dataset(53, 1000, longest=127)
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(3):
        batches = _batches(data.histories, size, 5, rng)
        assert all(1 <= len(batch) <= 5 for batch in batches)
        windows = [window for batch in batches for window in batch]
        assert all(2 <= len(window) <= size for window in windows)
        pairs = [pair for window in windows for pair in zip(window[:-1], window[1:])]
        wanted = [pair for history in data.histories for pair in zip(history[:-1], history[1:])]
        assert sorted(pairs) == sorted(wanted)
        orders.add(tuple(pairs))
    assert len(orders) == 3  # cut and mixed anew each time


def test_evaluate_baselines_on_a_catalog_smaller_than_the_list():
    # Everybody goes round the circle of five; three items have been seen.
    data = make_dataset([[i, (i + 1) % 5, (i + 2) % 5] for i in range(5)], 5, [3, 4, 0, 1, 2])
    result = evaluate_baselines(data)
    assert result["markov"] == {"hr@10": 1.0, "ndcg@10": 1.0, "hr@20": 1.0, "ndcg@20": 1.0}
    # Equally popular: two are left, the lower index first: the target, but for user 1.
    assert result["popularity"]["ndcg@10"] == pytest.approx((4 + 1 / math.log2(3)) / 5)


REAL = os.environ.get("CONTREC_DATA")
MEASURED = {  # HR@10 and NDCG@10 by an independent implementation
    "software": ((0.0067, 0.0028), (0.1614, 0.0934), (0.1732, 0.1135), (0.1636, 0.0933)),
    "lastfm": ((0.0477, 0.0212), (0.0926, 0.0466), (0.0467, 0.0247), (0.1027, 0.0575)),
    "beauty": ((0.0135, 0.0061), (0.0643, 0.0376), (0.0868, 0.0573), (0.0764, 0.0418)),
    "ml1m": ((0.0379, 0.0184), (0.0689, 0.0363), (0.1810, 0.1029), (0.1108, 0.0548)),
}


@pytest.mark.skipif(not REAL, reason="CONTREC_DATA (a folder of real data sets) is not set")
@pytest.mark.parametrize("name", MEASURED)
def test_baselines_agree_with_an_independent_measurement(name):
    kinds = ("popularity", "itemknn", "markov", "ease")
    result = evaluate_baselines(read_folder(Path(REAL) / name), kinds)
    for kind, wanted in zip(kinds, MEASURED[name]):
        got = (result[kind]["hr@10"], result[kind]["ndcg@10"])
        assert got == pytest.approx(wanted, abs=0.005), kind
