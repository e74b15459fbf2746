"""The recommender: lists that depend on the user alone, history left out, the bonus applied."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    Recorder,
    random_model,
    small_shop,
    trained_model,
)
from ops_cases import refused

from contrec_fast import ops
from contrec_fast.engine import Engine, best_of_draws, stable_id

USERS, ITEMS = 30, 60
COLUMNS = ["user_id", "item_id", "title", "score", "rank", "matched", "text"]


@pytest.fixture(scope="module")
def recommender():
    return Engine(trained_model(), small_shop())


def writing(model, texts):
    """A recommender whose reader writes these texts, a list by user row."""
    recommender = Engine(model, small_shop())
    honest = recommender.reader.write
    rows = {tuple(history.tolist()): row for row, history in enumerate(small_shop().histories)}

    def write(histories, users=None):
        return honest(histories)[0], [texts[rows[tuple(h.tolist())]] for h in histories]

    recommender.reader.write = write
    return recommender


# Lists by rows


def test_shapes_and_order(recommender):
    lists = recommender.recommend([4, 0, 29], 7)
    assert lists.ids.shape == lists.scores.shape == lists.matched.shape == (3, 7)
    assert lists.ids.dtype == np.int64 and lists.scores.dtype == np.float32
    assert lists.matched.dtype == bool and len(lists.texts) == 3
    assert (np.diff(lists.scores, axis=1) <= 0).all() and (np.abs(lists.scores) <= 1.2).all()
    for row in lists.ids:
        assert len(set(row.tolist())) == 7 and row.min() >= 0 and row.max() < ITEMS


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["prompt.text=none", "prompt.user_token=true"],
        ["head.method=ddpm", "head.steps=20", "head.guidance=1.0", "retrieval.draws=3"],
    ],
    ids=lambda overrides: ",".join(overrides) or "default",
)
def test_a_list_is_the_same_whatever_the_batch(overrides):
    recommender = Engine(random_model(*overrides), small_shop())
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
    part = Engine(recommender.model, recommender.dataset.of_users(rows))
    lists, whole = part.recommend(range(9), 10), recommender.recommend(rows, 10)
    np.testing.assert_array_equal(lists.ids, whole.ids)


def test_the_seed_and_the_user_id_key_the_noise(recommender):
    first = recommender.recommend(range(USERS), 10)
    again = Engine(recommender.model, recommender.dataset).recommend(range(USERS), 10)
    np.testing.assert_array_equal(first.scores, again.scores)
    other = Engine(recommender.model, recommender.dataset, seed=1)
    assert (other.recommend(range(USERS), 10).scores != first.scores).any(1).all()


def sampled(recommender, rows):
    """Vectors [S, B, D] of a plan made here, and the texts."""
    model, shop = recommender.model, recommender.dataset
    batch = recommender.prompts.inference_batch([shop.histories[row] for row in rows])
    condition, texts = model.write(batch)
    head, draws = model.config.head, model.config.retrieval.draws
    plan = ops.plan_sampling(
        model.head.denoiser, head.schedule, head.timesteps, head.method, head.steps, head.guidance
    )
    keys = torch.tensor([stable_id(shop.user_ids[row]) for row in rows])
    vectors = plan(condition, seed=0, user_ids=keys, samples=draws)
    return vectors.reshape(draws, len(rows), -1), texts


@pytest.mark.parametrize("draws", [1, 4])
def test_lists_rank_the_whole_catalog_by_the_best_draw(draws):
    """Cosine times the bonus, the highest of the draws, for every item that is not excluded."""
    model, rows = random_model(f"retrieval.draws={draws}"), np.array([3, 17])
    recommender = Engine(model, small_shop())
    lists = recommender.recommend(rows, ITEMS)
    with torch.inference_mode():
        vectors, texts = sampled(recommender, rows)
        scores = F.cosine_similarity(vectors[:, :, None], model.item_vectors, dim=-1)
        matched = recommender.matcher.match(texts)[:, recommender.matcher.groups]
        scores = (scores * (1 + model.config.retrieval.bonus * matched)).amax(0)
    for line, row in enumerate(rows):
        seen = set(small_shop().histories[row].tolist())
        order = [i for i in scores[line].argsort(descending=True).tolist() if i not in seen]
        listed = lists.ids[line][lists.ids[line] >= 0]
        assert sorted(order) == sorted(listed.tolist())
        np.testing.assert_allclose(lists.scores[line, : len(order)], scores[line, order], atol=1e-4)


def test_best_of_draws_is_the_maximum_over_draws():
    draws, users, items = 5, 40, 12
    scores = np.random.choice([-0.5, 0.0, 0.25, 0.5, 0.75], (draws, users, items))  # many ties
    scores[:, np.random.rand(users, items) < 0.3] = -np.inf  # seen
    for k in (1, 4, items):
        order = np.lexsort((np.broadcast_to(np.arange(items), scores.shape), -scores))[:, :, :k]
        best = np.take_along_axis(scores, order, 2)
        ids = np.where(best == -np.inf, -1, order)
        found, found_ids = best_of_draws(torch.tensor(best).float(), torch.tensor(ids))
        highest = scores.max(0)
        expected = np.lexsort((np.broadcast_to(np.arange(items), highest.shape), -highest))[:, :k]
        values = np.take_along_axis(highest, expected, 1)
        np.testing.assert_array_equal(found, values)
        np.testing.assert_array_equal(found_ids, np.where(values == -np.inf, -1, expected))


@pytest.mark.parametrize("k", [1, 45, ITEMS])
def test_history_is_left_out_and_lists_end_with_minus_one(recommender, k):
    """Released defect 8: there the latest item of the history stays in."""
    lists = recommender.recommend(range(USERS), k)
    for user, history in enumerate(recommender.dataset.histories):
        unseen = ITEMS - len(set(history.tolist()))
        listed = lists.ids[user] >= 0
        assert listed.tolist() == [rank < unseen for rank in range(k)]
        assert not set(lists.ids[user].tolist()) & set(history.tolist())
        assert (lists.scores[user] == -np.inf).tolist() == (~listed).tolist()
        assert not lists.matched[user, ~listed].any()


def test_items_left_out_never_outrank_negative_similarities():
    """Released defect 9: there they score 0, above every item of a negative cosine."""
    model = copy.deepcopy(random_model("head.diffusion=false"))
    away = F.normalize(torch.randn(16), dim=0)
    model.item_vectors.data = F.normalize(torch.randn(ITEMS, 16), dim=1) * 0.1 + away
    model.condition.weight.data.zero_()
    model.condition.bias.data.copy_(-away)
    model.bag.weight.data.zero_()
    lists = Engine(model, small_shop()).recommend(range(USERS), ITEMS)
    listed = lists.ids >= 0
    assert (lists.scores[listed] < -0.5).all() and (lists.scores[~listed] == -np.inf).all()
    for user, history in enumerate(small_shop().histories):
        assert sorted(lists.ids[user][listed[user]]) == np.setdiff1d(range(ITEMS), history).tolist()


def test_without_filter_seen_everything_is_listed():
    on = random_model()
    off = copy.copy(on)
    off.config = copy.deepcopy(on.config)
    off.config.retrieval.filter_seen = False
    everything = Engine(off, small_shop()).recommend(range(USERS), ITEMS)
    assert (np.sort(everything.ids, axis=1) == np.arange(ITEMS)).all()
    unseen = Engine(on, small_shop()).recommend(range(USERS), ITEMS)
    for user, history in enumerate(small_shop().histories):
        kept = [item for item in everything.ids[user] if item not in history]
        assert unseen.ids[user, : len(kept)].tolist() == kept


def test_items_that_the_text_names_get_the_bonus(recommender):
    """Released defects 1 and 2: there no text ever matches, and other items got the bonus."""
    categories, bonus = recommender.dataset.items.categories, 0.1
    assert recommender.model.config.retrieval.bonus == bonus
    plain = writing(recommender.model, [""] * USERS)
    plain = plain.recommend(range(USERS), ITEMS)
    assert not plain.matched.any()
    named = [categories[user] for user in range(USERS)]
    texts = [f"The user might lean towards ({name.upper()}) products" for name in named]
    lists = writing(recommender.model, texts)
    lists = lists.recommend(range(USERS), ITEMS, batch_size=7)
    assert lists.texts == texts
    for user in range(USERS):
        listed = lists.ids[user][lists.ids[user] >= 0]
        expected = [categories[item] == named[user] for item in listed]
        assert lists.matched[user, : len(listed)].tolist() == expected
        before = dict(zip(plain.ids[user].tolist(), plain.scores[user].tolist()))
        for item, score, matched in zip(listed, lists.scores[user], expected):
            assert score == pytest.approx(before[item] * (1 + bonus * matched), abs=1e-4)
    assert lists.matched.any()


def test_without_text_there_is_no_bonus(recommender):
    latent = Engine(recommender.model, small_shop(), text=False).recommend(range(5), ITEMS)
    assert latent.texts == [""] * 5 and not latent.matched.any()
    none = Engine(random_model("prompt.text=none"), small_shop()).recommend(range(5), 3)
    assert none.texts == [""] * 5 and not none.matched.any()


def test_a_catalog_without_categories_is_served(recommender):
    shop = recommender.dataset
    items = dataclasses.replace(shop.items, categories=[""] * ITEMS)
    dataset = dataclasses.replace(shop, items=items)
    lists = Engine(recommender.model, dataset).recommend(range(3), 5)
    assert not lists.matched.any() and (lists.ids >= 0).all()


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


# Lists by ids, as a DataFrame


def test_recommends_everybody_by_default():
    model, shop = trained_model(), small_shop()
    table = model.recommend(k=4)
    assert list(table.columns) == COLUMNS and len(table) == 4 * USERS
    assert table.user_id.tolist() == [user for user in shop.user_ids for _ in range(4)]
    assert table["rank"].tolist() == [1, 2, 3, 4] * USERS
    assert (table["score"].dtype, table["matched"].dtype) == (np.float32, bool)
    assert pd.api.types.is_integer_dtype(table["rank"])
    lists = Engine(model, shop.complete()).recommend(range(USERS), 4)
    assert table.item_id.tolist() == [shop.items.ids[item] for item in lists.ids.flatten()]
    assert table.title.tolist() == [shop.items.titles[item] for item in lists.ids.flatten()]
    assert table.score.tolist() == lists.scores.flatten().tolist()
    assert table.matched.tolist() == lists.matched.flatten().tolist()
    assert table.text.tolist() == [text for text in lists.texts for _ in range(4)]


def test_recommends_known_users_in_their_order_once_each():
    model, shop = trained_model(), small_shop()
    whole, some = model.recommend(k=3), [shop.user_ids[row] for row in (7, 2, 7, 29)]
    table = model.recommend(users=some, k=3)
    assert table.user_id.drop_duplicates().tolist() == [some[0], some[1], some[3]]
    for user, part in table.groupby("user_id"):
        expected = whole[whole.user_id == user]
        assert part.item_id.tolist() == expected.item_id.tolist()
        np.testing.assert_allclose(part.score, expected.score, atol=1e-4)


def test_a_new_user_is_served_like_a_known_one_with_that_id_and_history():
    model, shop = trained_model(), small_shop()
    names, rows = shop.items.ids, (4, 11, 28)
    chosen = shop.complete().histories
    histories = {shop.user_ids[row]: [names[i] for i in chosen[row]] for row in rows}
    known = model.recommend(users=list(histories), k=8)
    pd.testing.assert_frame_equal(model.recommend(histories=histories, k=8), known)
    # By another id the noise differs, and with another history the items that are left out.
    stranger = model.recommend(histories={"new": histories[shop.user_ids[4]]}, k=8)
    assert stranger.user_id.unique().tolist() == ["new"]
    assert stranger.score.tolist() != known.score[:8].tolist()
    assert not set(stranger.item_id) & set(histories[shop.user_ids[4]])


@pytest.mark.parametrize("filter_seen", [True, False])
def test_the_held_out_item_is_read_and_left_out_in_serving_alone(filter_seen):
    shop, model = small_shop(), copy.copy(random_model())
    model.config = copy.deepcopy(model.config)
    model.config.retrieval.filter_seen = filter_seen
    targets = np.where(np.arange(USERS) % 5, shop.targets, -1)
    model.dataset = dataclasses.replace(shop, targets=targets)
    blind = Engine(model, model.dataset).recommend(range(USERS), ITEMS)
    served = {user: rows for user, rows in model.recommend(k=ITEMS).groupby("user_id")}
    for row, (user, history) in enumerate(zip(shop.user_ids, shop.histories)):
        ids, held_out = shop.items.ids, targets[row] >= 0
        assert targets[row] not in history
        scores = dict(zip(served[user].item_id, served[user].score))
        before = {ids[i]: score for i, score in zip(blind.ids[row], blind.scores[row]) if i >= 0}
        known = {ids[item] for item in (*history, targets[row]) if item >= 0}
        assert set(scores) == set(ids) - (known if filter_seen else set())
        assert not held_out or ids[targets[row]] in before
        moved = max(abs(scores[item] - before[item]) for item in scores if item in before)
        assert moved > 1e-3 if held_out else moved < 1e-4


@pytest.mark.parametrize("kind", [tuple, iter, np.array, pd.Series, dict.fromkeys])
def test_ids_may_come_in_any_container(kind):
    model, shop = trained_model(), small_shop()
    users = shop.user_ids[3:5]
    assert model.recommend(kind(users), k=np.int64(1)).user_id.tolist() == users
    items = {"u": kind(shop.items.ids[:3])}
    assert model.recommend(histories=items, k=1).user_id.tolist() == ["u"]


def test_short_lists_have_fewer_rows():
    shop = small_shop()
    history = list(np.random.permutation(shop.items.ids)[: ITEMS - 2])
    table = trained_model().recommend(histories={"u": history}, k=5)
    assert table["rank"].tolist() == [1, 2] and set(table.item_id).isdisjoint(history)
    everything = trained_model().recommend(histories={"u": shop.items.ids}, k=5)
    assert everything.empty and list(everything.columns) == COLUMNS


def test_progress_counts_batches():
    recorder = Recorder()
    trained_model().recommend(k=1, progress=recorder)
    assert recorder.totals == {"Users": 1} and len(recorder.figures["Users"]) == 1


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("users", {"users": ["user-0001", "nobody"]}, "'nobody'"),
        ("users", {"users": []}, "none"),
        ("users, histories", {"users": ["user-0001"], "histories": {"u": ["SKU-0001"]}}, "both"),
        ("histories", {"histories": {}}, "at least one user, got none"),
        ("histories", {"histories": {"u": ["SKU-0001", "SKU-9999"]}}, "'SKU-9999'"),
        ("histories", {"histories": {"u": []}}, "user 'u', got none"),
        ("k", {"k": 0}, "1 to the catalog's 60 items, got 0"),
        ("k", {"k": 61}, "61"),
    ],
)
def test_refuses_what_it_does_not_know(name, arguments, words):
    with refused(ValueError, name):
        trained_model().recommend(**arguments)
    with pytest.raises(ValueError, match=words):
        trained_model().recommend(**arguments)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("users", {"users": "user-0001"}),
        ("histories", {"histories": {"u": ["SKU-0001"], "v": "SKU-0001"}}),
        ("histories", {"histories": [["SKU-0001"]]}),
        ("histories", {"histories": "SKU-0001"}),
        ("histories", {"histories": {7: ["SKU-0001"]}}),
        ("histories", {"histories": {"u": None}}),
        ("histories", {"histories": {"u": 5}}),
        ("histories", {"histories": {"u": [["SKU-0001"]]}}),
        ("users", {"users": 7}),
        ("users", {"users": [["user-0001"]]}),
        ("users", {"users": [1]}),
        ("k", {"k": "3"}),
        ("k", {"k": 3.0}),
    ],
)
def test_refuses_other_types(name, arguments):
    with refused(TypeError, name):
        trained_model().recommend(**arguments)


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
