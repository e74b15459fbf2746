"""The made-up shop: reproducible, well-formed, and worth a model that looks back."""

import hashlib

import numpy as np
import pytest
import torch

from contrec_fast.data import read_folder, synthetic_shop, write_folder
from contrec_fast.data.shop import CATEGORIES
from contrec_fast.evaluation import Popularity, evaluate_baselines, rank_metrics, recommend


def digest(shop):
    parts = [*shop.items.ids, *shop.items.titles, *shop.items.categories, *shop.user_ids]
    parts += [str(history.tolist()) for history in shop.histories] + [str(shop.targets.tolist())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def test_is_the_same_everywhere():
    # Recorded once: another value means that published numbers on the shop no longer apply.
    assert digest(synthetic_shop()) == "bf2734ffa43ff97a"
    assert digest(synthetic_shop(seed=1)) != digest(synthetic_shop())


def test_more_users_leave_the_earlier_ones_as_they_are():
    small, large = synthetic_shop(users=3), synthetic_shop(users=129)
    assert small.items == large.items
    assert small.user_ids == large.user_ids[:3]
    for a, b in zip(small.histories, large.histories[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(small.targets, large.targets[:3])


@pytest.mark.parametrize("users, items, seed", [(1, 60, 0), (129, 61, 5), (127, 240, 2**40)])
def test_is_well_formed(users, items, seed):
    shop = synthetic_shop(users, items, seed)
    assert (len(shop.user_ids), len(shop.items)) == (users, items)
    assert set(shop.items.categories) == set(CATEGORIES)
    assert len(set(shop.items.titles)) == items
    assert max(map(len, shop.items.titles)) <= 50
    for history, target in zip(shop.histories, shop.targets, strict=True):
        assert 5 <= len(history) <= 19
        assert len({*history.tolist(), target}) == len(history) + 1


def test_a_large_catalog_has_different_titles_too():
    titles = synthetic_shop(users=1, items=5000).items.titles
    assert len(set(titles)) == 5000
    assert max(map(len, titles)) <= 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"users": 0}, "users: expected at least 1, got 0"),
        ({"items": 59}, "items: expected at least 60, got 59"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_shop(**arguments)


def test_takes_the_path_of_real_data(tmp_path):
    shop = synthetic_shop(users=40)
    write_folder(shop, tmp_path / "shop")
    again = read_folder(tmp_path / "shop")
    assert digest(again) == digest(shop)


class TwoBack:
    """How often an item came next after the last one, or next but one after the second-last."""

    def fit(self, dataset):
        self.histories, items = dataset.histories, len(dataset.items)
        self.counts = torch.zeros(2, items, items)
        for history in dataset.histories:
            for lag in (1, 2):
                np.add.at(self.counts[lag - 1].numpy(), (history[:-lag], history[lag:]), 1)
        return self

    def scores(self, rows):
        ends = np.array([self.histories[row][-2:] for row in rows])
        return self.counts[0][ends[:, 1]] + self.counts[1][ends[:, 0]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_popularity_is_beaten_by_markov_and_markov_by_looking_further_back(seed):
    shop = synthetic_shop(seed=seed)
    results = evaluate_baselines(shop)
    look_back = rank_metrics(recommend(TwoBack().fit(shop), shop, 20), shop.targets)
    for metric in ("hr@10", "ndcg@10"):
        assert results["markov"][metric] > 2.5 * results["popularity"][metric]
        assert look_back[metric] > 1.3 * results["markov"][metric]


def test_popularity_is_skewed():
    counts = np.sort(Popularity().fit(synthetic_shop()).counts.numpy())[::-1]
    assert counts[:24].sum() > 0.2 * counts.sum()  # by a tenth of the items
