"""Returning users: what is remembered of them changes how much is read, and nothing else."""

import numpy as np
import pytest
import torch
from model_cases import backbone_of, prompts_of, random_history, random_model, small_shop
from ops_cases import refused

from contrec_fast.data import Dataset
from contrec_fast.engine import Engine
from contrec_fast.engine import reader as reader_module
from contrec_fast.engine.reader import Reader
from contrec_fast.engine.remembered import growing_window

ITEMS, MOST = 60, 4  # of the catalog, in a window that is cut back
HISTORY = f"prompt.history={MOST}"


def remembering(*overrides, limit=2**24, tokens=None):
    """A reader that remembers at most so many bytes or tokens."""
    model = random_model(HISTORY, *overrides)
    reader = Reader(model, prompts_of(model), remembered=limit)
    if tokens is not None:
        limit = tokens * reader.packed.cache.place_bytes
        reader = Reader(model, prompts_of(model), remembered=limit)
    for pool in reader.remembered._pool:
        pool.fill_(torch.nan)
    return reader


def check(reader, histories, users, write=True):
    """Compare with windows read from scratch; returns how the counters changed."""
    before = dict(reader.counters)
    batch = reader.prompts.inference_batch(histories, reader.windows(histories))
    if write and reader.model.config.prompt.text != "none":
        expected, texts = reader.model.write(batch)
        found, written = reader.write(histories, users)
        assert written == texts
    else:
        expected, found = reader.model.read(batch), reader.read(histories, users)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    store = reader.remembered
    taken = [known.places for known in store._users.values()]
    free = np.concatenate([*taken, store._free[: store._left]])
    assert np.array_equal(np.sort(free), np.arange(len(store._free)))
    return {name: count - before[name] for name, count in reader.counters.items()}


@pytest.mark.parametrize("most", [1, 4, 20])
def test_windows_grow_to_twice_their_length(most):
    starts = [0]
    for length in range(1, 9 * most):
        window = growing_window(np.arange(length), most)
        shown = length - window.start
        assert min(length, most) <= shown <= 2 * most
        # It moves only when it would become too long, and then shows `most` items.
        assert window.start == starts[-1] or (length - starts[-1] > 2 * most and shown == most)
        starts.append(window.start)
    assert len(set(starts)) > 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["prompt.text=none"],
        ["prompt.text=response", "prompt.user_token=true", "tokenizer.tokens=3"],
        ["head.source=response", "prompt.response_tokens=25"],
        [backbone_of("gpt2"), "head.bag=false"],
        [backbone_of("llama"), "prompt.user_token=true"],
    ],
)
def test_random_visits_are_read_as_from_scratch(overrides, monkeypatch):
    monkeypatch.setitem(reader_module.BUDGET, "cpu", 300)
    rng = np.random.default_rng(np.random.randint(2**31))
    length = prompts_of(random_model(HISTORY, *overrides)).blocks(np.arange(1))[1][0]
    reader = remembering(*overrides, tokens=22 * length)
    users = [f"user {i}" for i in range(9)]
    histories = {user: random_history(rng.integers(1, 12)) for user in users}
    for visit in range(12):
        here = [str(user) for user in rng.permutation(users)[: rng.integers(1, 9)]]
        for user in here:
            new = rng.integers(ITEMS, size=rng.integers(4))
            histories[user] = np.append(histories[user], new)
            if rng.random() < 0.1:
                histories[user][rng.integers(len(histories[user]))] = rng.integers(ITEMS)
        writes = reader.model.config.head.source == "response" or visit % 3 > 0
        check(reader, [histories[user] for user in here], here, writes)
    assert min(reader.counters[name] for name in ("hits", "misses", "saved")) > 0
    assert reader.counters["evictions"] > 0


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_only_new_items_are_read(new, write):
    reader = remembering()
    history = random_history(5)
    blocks = reader.prompts.blocks(history)[1]
    first = check(reader, [history[: 5 - new]], [7], write)
    again = check(reader, [history], [7], write)
    assert (first["hits"], first["misses"], first["saved"]) == (0, 1, 0)
    assert (again["hits"], again["misses"], again["evictions"]) == (1, 0, 0)
    behind = reader.prompts.behind
    question = reader.prompts.fixed[1].shape[1] + len(reader._decoder.opening()) if write else 0
    if new:  # what stands behind the last state that was read without a question
        assert again["prompts"] == sum(blocks[5 - new :]) + question
    else:  # only the state where the condition is read, and what follows it
        assert again["prompts"] == 1 + write * behind + question
    assert again["prompts"] + again["saved"] == sum(blocks) + question - (not write) * behind


def test_a_window_that_is_cut_back_is_read_anew():
    reader, history = remembering(), random_history(3 * MOST)
    hits = []
    for length in range(MOST, 3 * MOST + 1):
        hits.append(check(reader, [history[:length]], ["u"])["hits"])
    assert hits == [0] + [1] * MOST + [0] + [1] * (MOST - 1)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_changed_history_is_read_anew(place):
    """A window of items 5 to 9 of ten, with items before it that only the bag shows."""
    reader, history = remembering("prompt.user_token=true"), random_history(10)
    assert reader.windows([history])[0].start == 5
    check(reader, [history], ["u"])
    history[place] = np.setdiff1d(np.arange(ITEMS), history)[0]  # in place: a copy is kept
    assert check(reader, [history], ["u"])["hits"] == 0
    assert check(reader, [history], ["u"])["hits"] == 1
    assert check(reader, [history[:-1]], ["u"])["hits"] == 0  # shorter


def test_users_are_told_apart_by_their_ids():
    reader, history = remembering(), random_history(3)
    assert check(reader, [history], [1])["misses"] == 1
    assert check(reader, [history], [2])["misses"] == 1
    assert check(reader, [history], None)["misses"] == 0
    # Twice in a call, once with another history: the first of them counts.
    counts = check(reader, [history, random_history(4), history], [1, 1, 2])
    assert (counts["hits"], counts["misses"]) == (2, 0)
    assert check(reader, [history], [1])["hits"] == 1


def test_what_could_not_be_copied_is_not_known(monkeypatch):
    reader, history = remembering(), random_history(5)
    check(reader, [history[:2]], [1])
    with monkeypatch.context() as short:
        short.setattr(reader.remembered, "_copy", lambda *args, save: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reader.read([history], [2])
    assert check(reader, [history], [1])["hits"] == 1
    assert check(reader, [history], [2])["hits"] == 0


def test_the_users_seen_longest_ago_are_forgotten():
    histories = [random_history(4) for _ in range(4)]
    prompts = prompts_of(random_model(HISTORY))
    tokens = [prompts.blocks(items)[1].sum() for items in histories]
    reader = remembering(tokens=sum(sorted(tokens)[1:]))  # of any three
    held = sum(pool.numel() * pool.element_size() for pool in reader.remembered._pool)
    assert held == sum(sorted(tokens)[1:]) * reader.packed.cache.place_bytes
    for user in range(3):
        check(reader, [histories[user]], [user])
    assert check(reader, [histories[0]], [0])["hits"] == 1  # now 1 is the oldest
    assert check(reader, [histories[3]], [3])["evictions"] == 1
    assert check(reader, [histories[0]], [0])["hits"] == 1
    assert check(reader, [histories[1]], [1])["hits"] == 0
    # More at once than there is room for: nobody of the same call is forgotten.
    reader = remembering(tokens=tokens[0] + tokens[1])
    counts = check(reader, histories, range(4))
    assert (counts["misses"], counts["evictions"]) == (4, 0)
    counts = check(reader, histories, range(4))
    assert 1 <= counts["hits"] <= 2 and counts["evictions"] == 0


def test_drafts_graphs_and_more_users_than_fit_at_once(monkeypatch):
    """Parts of a batch, passes of fixed shapes, and a cache that is allocated anew in between."""
    monkeypatch.setattr(reader_module, "CACHE_BYTES", 2**18)
    reader = remembering("prompt.response_tokens=17")
    histories = [random_history(length) for length in np.random.randint(1, 9, 40)]
    check(reader, histories[:3], range(3))
    check(reader, histories, range(40))
    longer = [np.append(history, random_history(2)) for history in histories]
    reader.warm_up(longer)  # of less, longer prompts would be served without graphs
    counts = check(reader, longer, range(40))
    assert counts["hits"] > 20 and counts["replays"] > 0


def test_a_model_that_cannot_be_packed_reads_the_same_windows():
    model = random_model(HISTORY)
    reader = Reader(model, prompts_of(model), remembered=2**20)
    histories = [random_history(length) for length in (3, 7, 12)]
    expected, texts = reader.write(histories, [1, 2, 3])
    reader.packed.suits = False
    found, written = reader.write(histories, [1, 2, 3])
    assert written == texts
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reader.read(histories), expected, rtol=1e-4, atol=1e-5)


def test_the_engine_remembers_users_by_their_ids():
    """The same lists whether users are new or come back, also with other rows of a dataset."""
    model, shop = random_model(HISTORY), small_shop()
    engine = Engine(model, shop, remembered=2**24)
    before = Dataset(shop.items, shop.user_ids, [h[:-1] for h in shop.histories], shop.targets)
    fresh = Engine(model, shop, remembered=2**24).recommend(range(30), 10)
    engine.over(before).recommend(range(30), 10)
    found = engine.recommend(range(30), 10)
    assert engine.reader.counters["hits"] > 15
    np.testing.assert_array_equal(found.ids, fresh.ids)
    np.testing.assert_allclose(found.scores, fresh.scores, atol=1e-4)
    with refused(ValueError, "remembered"):
        Engine(model, shop, remembered=2**24, deterministic=True)


def test_refuses_less_than_a_token_takes_and_other_than_an_id_for_each_history():
    model = random_model()
    with refused(ValueError, "remembered"):
        Reader(model, prompts_of(model), remembered=3)
    for users in ([], [1, 2]):
        with refused(ValueError, "users"):
            remembering().read([random_history(3)], users)
