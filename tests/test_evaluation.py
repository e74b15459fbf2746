"""Metrics against plain restatements, the tie rule of lists, the protocol, its picture."""

import json
import math
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from evaluation_cases import make_dataset, random_dataset, random_lists
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import Recorder, small_shop, trained_model

from contrec_fast import names
from contrec_fast.engine import Engine
from contrec_fast.evaluation import (
    BASELINES,
    Markov,
    bar_chart,
    catalog_coverage,
    list_diversity,
    paired_bootstrap,
    rank_metrics,
    recommend,
    target_counts,
    user_metrics,
)
from contrec_fast.evaluation.protocol import (
    CHOICES,
    compare,
    evaluate,
    keep_baselines,
    read_metrics,
)


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
    for name, values in user_metrics(ids, targets).items():
        assert values.shape == (np.sum(targets >= 0),)
        assert values.mean() == pytest.approx(wanted[name])
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


class Given:
    def __init__(self, scores):
        self.all_scores = scores

    def scores(self, rows):
        return self.all_scores[torch.from_numpy(rows)]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_recommend_orders_by_score_then_index_with_or_without_the_history(data):
    users, items = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 12))
    # Few different values, so that ties are the rule; both zeros are one value.
    value = st.sampled_from([-2.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3e38])
    scores = data.draw(st.lists(value, min_size=users * items, max_size=users * items))
    scores = torch.tensor(scores).reshape(users, items)
    item = st.integers(0, items - 1)
    histories = [data.draw(st.lists(item, min_size=1, max_size=items + 2)) for _ in range(users)]
    k, batch = data.draw(st.integers(1, items + 3)), data.draw(st.integers(1, 8))
    filter_seen = data.draw(st.booleans())
    wanted = np.full((users, k), -1)
    for row, history in enumerate(histories):
        left = [item for item in range(items) if not (filter_seen and item in history)]
        left.sort(key=lambda item: (-scores[row, item].item(), item))
        wanted[row, : len(left)] = left[:k]
    before = scores.clone()
    ids = recommend(Given(scores), make_dataset(histories, items), k, batch, filter_seen)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, wanted)
    assert torch.equal(scores, before)  # the baseline's own scores are not written to


def test_recommend_does_not_depend_on_the_batch():
    data = random_dataset(129, 60, longest=30)
    baseline = Markov().fit(data)
    whole = recommend(baseline, data, 20, batch=1000)
    for batch in (1, 3, 128):
        np.testing.assert_array_equal(recommend(baseline, data, 20, batch), whole)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        recommend(baseline, data, 0)


@pytest.mark.parametrize("users, items, k", [(1, 3, 1), (7, 127, 5), (129, 31, 13)])
def test_coverage_and_diversity_agree_with_loops(users, items, k):
    ids, vectors = random_lists(users, items, k), np.random.randn(items, 5)
    vectors[0] = 0
    cosines = np.zeros((items, items))
    for i in range(1, items):
        for j in range(1, items):
            norms = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
            cosines[i, j] = vectors[i] @ vectors[j] / norms
    for cutoff in {1, 2, k}:
        shown = [[item for item in row[:cutoff] if item >= 0] for row in ids]
        covered = len({item for row in shown for item in row}) / items
        assert catalog_coverage(ids, items, cutoff) == pytest.approx(covered)
        spread = [
            np.mean([1 - cosines[i, j] for i in row for j in row if i != j])
            for row in shown
            if len(row) > 1
        ]
        wanted = np.mean(spread) if spread else 0.0
        assert list_diversity(ids, vectors, cutoff) == pytest.approx(wanted)


def test_coverage_and_diversity_at_their_ends():
    ids = np.array([[0, 1], [2, -1], [-1, -1]])
    assert catalog_coverage(ids, 3) == 1 and catalog_coverage(ids[2:], 3) == 0
    assert list_diversity(ids, [[2, 0], [5, 0], [0, 0]]) == pytest.approx(0)
    assert list_diversity(ids, [[2, 0], [0, 3], [0, 0]]) == pytest.approx(1)
    assert list_diversity(ids, [[2, 0], [-1, 0], [0, 0]]) == pytest.approx(2)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_compare_puts_the_model_beside_the_best_baseline_of_each_metric(filter_seen):
    targets = np.arange(5)
    data = make_dataset([[5]] * 5, 40, targets)

    def lists(*ranks):  # of the target, from 0
        ids = np.tile(np.arange(10, 30), (5, 1))
        for user, rank in enumerate(ranks):
            ids[user, rank] = user
        return ids

    baselines = {"wide": lists(9, 9, 9), "sharp": lists(0, 0), "poor": lists()}
    result = json.loads(json.dumps(compare(lists(0, 0, 0), baselines, data, None, filter_seen)))
    assert result["filter_seen"] is filter_seen and "diversity" not in result
    assert result["model"] == rank_metrics(lists(0, 0, 0), targets)
    assert result["baselines"]["wide"]["hr@10"] == 3 / 5
    assert result["standard_errors"]["sharp"]["hr@10"] == pytest.approx(math.sqrt(0.4 * 0.6 / 5))
    assert {name: row["baseline"] for name, row in result["against"].items()} == {
        "hr@10": "wide",
        "ndcg@10": "sharp",
    }
    interval = paired_bootstrap([1, 1, 1, 0, 0], [1, 1, 0, 0, 0])
    row = result["against"]["ndcg@10"]
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(interval)
    assert result["coverage"] == {
        "model": 13 / 40,
        "wide": 13 / 40,
        "sharp": 12 / 40,
        "poor": 10 / 40,
    }


def test_compare_counts_histories_of_users_without_a_target_too():
    data = make_dataset([[0], [1, 2]], 4, [-1, 0])
    result = compare(np.full((1, 20), -1), {}, data)
    assert result["targets"] == {"total": 1, "in_history": 0, "unseen": 0}


def test_compare_without_a_baseline():
    data = make_dataset([[0], [1]], 4, [1, 0])
    result = compare(np.full((2, 20), -1), {}, data, np.eye(4))
    assert result["against"] == {} and result["baselines"] == {}
    assert result["model"]["hr@10"] == 0 and result["diversity"] == {"model": 0}


@pytest.fixture(scope="module")
def shop_of_some_targets():
    shop = small_shop()
    targets = np.where(np.arange(len(shop.targets)) % 3 == 1, -1, shop.targets)
    return type(shop)(shop.items, shop.user_ids, shop.histories, targets)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_evaluate_skips_users_without_a_target(shop_of_some_targets, filter_seen, monkeypatch):
    shop, model = shop_of_some_targets, trained_model()
    monkeypatch.setattr(model.config.retrieval, "filter_seen", filter_seen)
    recommender = Engine(model, shop)
    result = evaluate(recommender, Recorder(), ["markov"])
    ids = recommender.recommend(np.arange(len(shop.targets)), 20).ids
    assert result["model"] == rank_metrics(ids, shop.targets)
    markov = recommend(Markov().fit(shop), shop, 20, filter_seen=filter_seen)
    assert result["baselines"] == {"markov": rank_metrics(markov, shop.targets)}
    assert result["targets"]["total"] == 20 and result["filter_seen"] is filter_seen
    assert set(result["against"]["hr@10"]) == {"baseline", "difference", "low", "high"}


def test_evaluate_knows_sets_of_baselines(shop_of_some_targets):
    recommender = Engine(trained_model(), shop_of_some_targets)
    for choice, kinds in (("none", []), ("quick", ["popularity", "itemknn", "markov"])):
        assert list(evaluate(recommender, Recorder(), choice)["baselines"]) == kinds
    assert tuple(CHOICES) == names.BASELINE_SETS and CHOICES["all"] == tuple(BASELINES)
    for choice in ("fast", ["markov", "fast"]):
        with pytest.raises(ValueError, match="baselines: expected .*, got 'fast'"):
            evaluate(recommender, Recorder(), choice)


def test_an_evaluation_keeps_what_an_earlier_one_has_measured():
    """Two that measured different baselines make the one that measured all, either way round."""
    data = make_dataset([[0]] * 31, 40, np.random.randint(40, size=31))
    kinds = ("popularity", "markov", "ease", "sasrec")
    lists = {name: random_lists(31, 40, 20) for name in kinds}
    model, vectors = random_lists(31, 40, 20), np.random.randn(40, 5)

    def compared(*kinds, **options):
        return compare(model, {name: lists[name] for name in kinds}, data, **options)

    whole = compared(*lists, vectors=vectors)
    parts = [compared("popularity", "ease"), compared("markov", "sasrec")]
    for now, before in (parts, parts[::-1]):
        merged = keep_baselines(now, before)
        assert merged == {name: value for name, value in whole.items() if name != "diversity"}
        assert list(merged["baselines"]) == list(lists)
    assert keep_baselines(compared(), whole) == keep_baselines(parts[0], whole) == whole
    assert keep_baselines(whole, compared()) == keep_baselines(whole, None) == whole


@pytest.mark.parametrize("change", ["model", "filter_seen", "targets"])
def test_an_evaluation_of_something_else_keeps_nothing(change):
    data = make_dataset([[0]] * 31, 40, np.arange(31))
    lists, found = random_lists(31, 40, 20), np.tile(np.arange(20), (31, 1))
    other, options = found, {}
    if change == "model":
        other = found[:, ::-1]
    elif change == "filter_seen":
        options = {"filter_seen": False}
    before = compare(other, {"markov": lists}, data, **options)
    if change == "targets":
        before["targets"] = before["targets"] | {"in_history": 2}
    now = compare(found, {}, data)
    assert keep_baselines(now, before) == now and not now["baselines"]


@pytest.mark.parametrize("kinds", [(), ("markov", "lightgcn")])
def test_metrics_are_read_whole_or_refused_by_the_part_that_is_another(tmp_path, kinds):
    data, path = make_dataset([[0]] * 31, 40, np.arange(31)), tmp_path / "metrics.json"
    lists = {name: random_lists(31, 40, 20) for name in kinds}
    metrics = compare(random_lists(31, 40, 20), lists, data, np.random.randn(40, 5))
    assert read_metrics(path) is None
    for whole in (metrics, {name: part for name, part in metrics.items() if name != "diversity"}):
        path.write_text(json.dumps(whole))
        assert read_metrics(path) == whole

    parts = {name: part for name, part in metrics.items() if isinstance(part, dict)}
    wrong = [("contents", tree) for tree in (None, 5, [], "model")]
    for name, part in parts.items():
        wrong += [(name, metrics | {name: other}) for other in (None, 3, [], "x", [part])]
        for key in part if name != "targets" else ():
            for other in ("x", {}, None):
                wrong.append((name, metrics | {name: part | {key: other}}))
    for name in ("model", "standard_errors", "coverage", "targets"):
        wrong.append((name, {key: part for key, part in metrics.items() if key != name}))
    row = metrics["model"]
    wrong.append(("baselines", metrics | {"baselines": {"mine": row}}))
    against = {"hr@10": {"baseline": ["x"], "difference": 0, "low": 0, "high": 0}}
    wrong.append(("against", metrics | {"against": against}))
    for name, tree in wrong:
        path.write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=f"json: expected metrics .* got other {name}; remove"):
            read_metrics(path)
    for text in ('{"model"', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="json: expected JSON, got .*; remove it to go on"):
            read_metrics(path)


def metrics_of(rows, filter_seen=True):
    errors = {name: dict.fromkeys(("hr@10", "ndcg@10"), 0.01) for name in rows}
    rows = {name: {"hr@10": value, "ndcg@10": value / 2} for name, value in rows.items()}
    return {
        "model": rows.pop("model"),
        "baselines": rows,
        "standard_errors": errors,
        "targets": {"total": 1351},
        "filter_seen": filter_seen,
    }


@pytest.mark.parametrize("filter_seen, word", [(True, "excluded"), (False, "included")])
def test_the_chart_names_rows_and_setting(tmp_path, filter_seen, word):
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        path = tmp_path / "chart.svg"
        bar_chart(metrics_of({"model": 0.2, "ease": 0.1, "mine": 0.3}, filter_seen), path)
    text = path.read_text()
    xml.etree.ElementTree.fromstring(text)
    for words in ("ContRec", "EASE", "mine", "HR@10", "NDCG@10", "0.1500", "1,351", word):
        assert words in text
    height = {name: text.index(f">{name}<") for name in ("EASE", "ContRec", "mine")}
    assert sorted(height, key=height.get) == ["EASE", "ContRec", "mine"]  # drawn from below


@pytest.mark.parametrize("rows", [{"model": 0.0}, {"model": 0.1, "sasrec": 0.2}])
def test_the_chart_is_written_whole(tmp_path, rows, monkeypatch):
    path = tmp_path / "chart.png"
    bar_chart(metrics_of(rows), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [path]
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bar_chart(metrics_of(rows), path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    with pytest.raises(ValueError, match="path: expected a name ending in .png or .svg"):
        bar_chart(metrics_of(rows), tmp_path / "chart.pdf")
