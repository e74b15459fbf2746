"""The recommender: lists that depend on the user alone, history left out, the bonus applied."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    Recorder,
    one_thread,  # noqa: F401
    small_config,
    small_shop,
    trained_model,
)

from contrec_fast import ops
from contrec_fast.data.prompts import CategoryMatcher
from contrec_fast.engine import Recommender, stable_id
from contrec_fast.training import train

USERS, ITEMS = 30, 60


@pytest.fixture(scope="module")
def recommender():
    return Recommender(trained_model(), small_shop())


def with_texts(recommender, texts, monkeypatch):
    """The recommender, its model writing the given text for each user (any batch)."""
    user_of = {}
    honest = recommender.model.write

    def write(batch, max_tokens):
        conditions, _ = honest(batch, max_tokens)
        rows = [tuple(row[row >= 0].tolist()) for row in batch.rows]
        return conditions, [texts[user_of[row]] for row in rows]

    k = recommender.model.config.tokenizer.tokens
    for user, history in enumerate(recommender.dataset.histories):
        slots = (history[-20:, None] * k + np.arange(k)).ravel()
        user_of[tuple(slots.tolist())] = user
    monkeypatch.setattr(recommender.model, "write", write)
    return recommender


def test_shapes_and_order(recommender):
    lists = recommender.recommend([4, 0, 29], 7)
    assert lists.ids.shape == lists.scores.shape == lists.matched.shape == (3, 7)
    assert lists.ids.dtype == np.int64 and lists.scores.dtype == np.float32
    assert lists.matched.dtype == bool and len(lists.texts) == 3
    assert (np.diff(lists.scores, axis=1) <= 0).all() and (np.abs(lists.scores) <= 1.2).all()
    for row in lists.ids:
        assert len(set(row.tolist())) == 7 and row.min() >= 0 and row.max() < ITEMS


@pytest.mark.parametrize("method, steps", [(None, None), ("ddpm", 20)])
def test_a_list_is_the_same_whatever_the_batch(recommender, method, steps):
    if method:
        config = small_config(epochs=1)
        config.head.method, config.head.steps, config.head.guidance = method, steps, 1.0
        recommender = Recommender(train(small_shop(), config, Recorder()), small_shop())
    whole = recommender.recommend(range(USERS), 10)
    mixed = np.random.permutation(USERS)
    for rows, batch_size in (
        (np.arange(USERS), 1),
        (np.arange(USERS), 7),
        (mixed, 128),
        (mixed[:11], 4),
        (mixed[:1], 3),
        (np.repeat(mixed[:3], 2), 4),
    ):
        lists = recommender.recommend(rows, 10, batch_size)
        np.testing.assert_array_equal(lists.ids, whole.ids[rows])
        np.testing.assert_allclose(lists.scores, whole.scores[rows], atol=1e-4)
        assert lists.texts == [whole.texts[row] for row in rows]


def test_a_list_does_not_depend_on_the_other_users_of_the_dataset(recommender):
    rows = np.random.permutation(USERS)[:9]
    part = Recommender(recommender.model, recommender.dataset.of_users(rows))
    lists, whole = part.recommend(range(9), 10), recommender.recommend(rows, 10)
    np.testing.assert_array_equal(lists.ids, whole.ids)


def test_the_seed_and_the_user_id_key_the_noise(recommender):
    first = recommender.recommend(range(USERS), 10)
    again = Recommender(recommender.model, recommender.dataset).recommend(range(USERS), 10)
    np.testing.assert_array_equal(first.scores, again.scores)
    other = Recommender(recommender.model, recommender.dataset, seed=1)
    assert (other.recommend(range(USERS), 10).scores != first.scores).any(1).all()


def test_vectors_and_scores_are_those_of_the_parts(recommender):
    model, shop = recommender.model, recommender.dataset
    rows = np.array([3, 17])
    lists = recommender.recommend(rows, ITEMS)
    batch = recommender.prompts.inference_batch([shop.histories[row] for row in rows])
    condition, texts = model.write(batch, model.config.prompt.response_tokens)
    head = model.config.head
    plan = ops.plan_sampling(
        model.head.denoiser, head.schedule, head.timesteps, head.method, head.steps, head.guidance
    )
    keys = torch.tensor([stable_id(shop.user_ids[row]) for row in rows])
    with torch.inference_mode():
        vectors = plan(condition, seed=0, user_ids=keys)
        scores = F.cosine_similarity(vectors[:, None], model.item_vectors[None], dim=-1)
        matched = recommender.matcher.match(texts)[:, recommender.matcher.groups]
        scores *= 1 + model.config.retrieval.bonus * matched
    for line, row in enumerate(rows):
        seen = set(shop.histories[row].tolist())
        order = [i for i in scores[line].argsort(descending=True).tolist() if i not in seen]
        listed = lists.ids[line][lists.ids[line] >= 0]
        np.testing.assert_allclose(
            lists.scores[line, : len(order)], scores[line, order].numpy(), atol=1e-4
        )
        assert sorted(order) == sorted(listed.tolist())


@pytest.mark.parametrize("k", [1, 45, ITEMS])
def test_history_is_left_out_and_lists_end_with_minus_one(recommender, k):
    lists = recommender.recommend(range(USERS), k)
    for user, history in enumerate(recommender.dataset.histories):
        unseen = ITEMS - len(set(history.tolist()))
        listed = lists.ids[user] >= 0
        assert listed.tolist() == [rank < unseen for rank in range(k)]
        assert not set(lists.ids[user].tolist()) & set(history.tolist())
        assert (lists.scores[user] == -np.inf).tolist() == (~listed).tolist()
        assert not lists.matched[user, ~listed].any()


def test_items_that_the_text_names_get_the_bonus(recommender, monkeypatch):
    categories = recommender.dataset.items.categories
    plain = with_texts(recommender, [""] * USERS, monkeypatch).recommend(range(USERS), ITEMS)
    assert not plain.matched.any()
    monkeypatch.undo()
    named = [categories[user] for user in range(USERS)]
    texts = [f"The user might lean towards ({name.upper()}) products" for name in named]
    lists = with_texts(recommender, texts, monkeypatch).recommend(range(USERS), ITEMS)
    assert lists.texts == texts
    for user in range(USERS):
        listed = lists.ids[user][lists.ids[user] >= 0]
        expected = [categories[item] == named[user] for item in listed]
        assert lists.matched[user, : len(listed)].tolist() == expected
        before = dict(zip(plain.ids[user].tolist(), plain.scores[user].tolist()))
        for item, score, matched in zip(listed, lists.scores[user], expected):
            factor = 1 + recommender.model.config.retrieval.bonus * matched
            assert score == pytest.approx(before[item] * factor, abs=1e-4)
    assert lists.matched.any()


def test_a_catalog_without_categories_is_served(recommender):
    shop = recommender.dataset
    bare = copy.copy(shop.items)
    object.__setattr__(bare, "categories", [""] * ITEMS)
    dataset = type(shop)(bare, shop.user_ids, shop.histories, shop.targets)
    lists = Recommender(recommender.model, dataset).recommend(range(3), 5)
    assert not lists.matched.any() and (lists.ids >= 0).all()
    assert (CategoryMatcher(bare.categories).groups == -1).all()


def test_advance_is_called_once_per_batch(recommender):
    calls = []
    recommender.recommend(range(7), 3, batch_size=3, advance=lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize("k", [0, -1, ITEMS + 1])
def test_refuses_k_before_any_work(recommender, k, monkeypatch):
    monkeypatch.setattr(recommender.model, "write", None)
    with pytest.raises(ValueError, match=f"^k: expected 1 to .* {ITEMS} .*, got {k}$"):
        recommender.recommend([0], k)


@pytest.mark.parametrize("rows", [[], [-1], [0, USERS]])
def test_refuses_rows_that_no_user_has(recommender, rows):
    with pytest.raises(ValueError, match=f"^rows: expected .* 0 to {USERS - 1}, got "):
        recommender.recommend(rows, 3)


def test_stable_ids():
    # BLAKE2b with a digest of 8 bytes, little-endian and signed: recorded once, for ever.
    assert stable_id("user-0001") == 7538169733083457289
    assert stable_id("") == -5426141060434712860
    assert stable_id("Zoë 茶") == 5718272652049584388


def test_stable_ids_are_spread_over_64_bits():
    ids = [stable_id(str(number)) for number in range(20_000)]
    assert len(set(ids)) == len(ids)
    assert -(2**63) <= min(ids) < -(2**62) and 2**62 < max(ids) < 2**63
    unsigned = np.array(ids, dtype=np.int64).view(np.uint64)
    for bit in range(64):
        share = float((unsigned >> np.uint64(bit) & np.uint64(1)).mean())
        assert abs(share - 0.5) < 0.02, bit
    assert torch.tensor(ids).dtype == torch.int64
