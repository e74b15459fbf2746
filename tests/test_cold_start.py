"""New items without training: by their text, by who chose them, and what is refused."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    assert_same_weights,
    backbone_of,
    random_model,
    small_shop,
    trained_model,
)
from ops_cases import refused

from contrec_fast.engine import Engine
from contrec_fast.models import cold_start
from contrec_fast.models.cold_start import (
    PENALTIES,
    embed_texts,
    fit_text_map,
    own_directions,
    ridge_map,
    with_own_part,
)
from contrec_fast.models.contrec import ContRec

ITEMS = 60


def new_items(**columns):
    return pd.DataFrame(columns)


def chosen_by(**items):
    """Interactions: item="user user"."""
    pairs = [(user, item) for item, users in items.items() for user in users.split()]
    return pd.DataFrame(pairs, columns=["user_id", "item_id"])


def naive_ridge(x, y, penalty):
    """Weights [H, D] and intercept [D] of ridge regression; the intercept is not shrunk."""
    centred, mean_x, mean_y = x - x.mean(0), x.mean(0), y.mean(0)
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y))
    return weight, mean_y - mean_x @ weight


@pytest.mark.parametrize("items, width", [(12, 3), (9, 20), (40, 7)])
@pytest.mark.parametrize("noise", [0.0, 0.5, 30.0])
def test_ridge_map_takes_the_penalty_of_least_leave_one_out_error(items, width, noise):
    x = torch.randn(items, width, dtype=torch.float64) + 3
    y = x @ torch.randn(width, 4, dtype=torch.float64) + 5
    y += noise * torch.randn(items, 4, dtype=torch.float64)
    errors = []
    for penalty in PENALTIES.tolist():
        total = 0.0
        for item in range(items):
            others = torch.arange(items) != item
            # The penalty is per item of the catalog, whichever is left out.
            weight, intercept = naive_ridge(x[others], y[others], penalty * items)
            total += (x[item] @ weight + intercept - y[item]).square().sum()
        errors.append(float(total))
    best = PENALTIES[int(np.argmin(errors))].item()
    weight, intercept = naive_ridge(x, y, best * items)
    found = ridge_map(x, y)
    assert found.shape == (width + 1, 4) and found.dtype == torch.float64
    torch.testing.assert_close(found, torch.cat([weight, intercept[None]]), rtol=1e-6, atol=1e-7)


def test_ridge_map_of_text_that_says_nothing_is_the_mean():
    x, y = torch.ones(7, 3), torch.randn(7, 2)
    found = ridge_map(x, y)
    torch.testing.assert_close(F.pad(x, (0, 1), value=1.0) @ found, y.mean(0).expand(7, 2))


@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_text_embeddings_do_not_depend_on_the_texts_beside_them(kind, monkeypatch):
    model, items = random_model(backbone_of(kind)), small_shop().items
    monkeypatch.setattr(model.text_tokenizer, "padding_side", "left")  # as some have it
    whole = embed_texts(model, items.titles, items.categories)
    assert whole.shape == (ITEMS, 16) and whole.dtype == torch.float32
    monkeypatch.setattr(cold_start, "BATCH", 7)
    order = np.random.permutation(ITEMS)[:20]
    titles, categories = ([column[i] for i in order] for column in (items.titles, items.categories))
    torch.testing.assert_close(
        embed_texts(model, titles, categories), whole[order], rtol=1e-4, atol=1e-5
    )
    assert torch.pdist(whole).min() > 1e-4  # and all differ


def extended(model, *arguments):
    model = copy.deepcopy(model)
    model.add_items(*arguments)
    return model


@pytest.fixture(scope="module")
def fitted():
    """A model whose vectors follow from titles as far as a linear map can say."""
    model = copy.deepcopy(random_model())
    items = small_shop().items
    features = embed_texts(model, items.titles, items.categories)
    vectors = F.normalize(features - features.mean(0)) @ torch.randn(16, 16)
    model.item_vectors.data = vectors + 0.3 * vectors.std() * torch.randn(ITEMS, 16)
    model.collaborative.copy_(model.item_vectors.detach())
    model.calibrate()
    fit_text_map(model, items)
    return model


def test_items_by_text_land_near_their_twins(fitted):
    items = small_shop().items
    ids = [f"twin of {item}" for item in items.ids]
    frame = new_items(item_id=ids, title=items.titles, category=items.categories)
    vectors = extended(fitted, frame).item_vectors.detach()
    cosine = F.normalize(vectors[ITEMS:]) @ F.normalize(vectors[:ITEMS]).T
    twin, random = cosine.diagonal().mean(), cosine.mean()
    assert twin > 0.5 > random + 0.3


def test_added_items_are_served_like_any_other(fitted):
    shop, before = fitted.dataset, fitted.item_vectors.detach().clone()
    frame = new_items(item_id=["new-1", 2], title=["Corvane Spare Battery", ""],
                      category=["Photography", "Coffee"])  # fmt: skip
    model = extended(fitted, frame)
    items = model.dataset.items
    assert items.ids == [*shop.items.ids, "new-1", "2"]
    assert items.titles[-2:] == ["Corvane Spare Battery", ""]
    assert items.categories[-2:] == ["Photography", "Coffee"]
    assert model.dataset.user_ids == shop.user_ids
    assert torch.equal(model.item_vectors[:ITEMS], before)
    length = before.norm(dim=1).mean()
    torch.testing.assert_close(model.item_vectors[ITEMS:].norm(dim=1), length.expand(2))
    assert isinstance(model.item_vectors, torch.nn.Parameter)
    assert model.collaborative.shape == (62, 16) and model.item_tokens.shape == (62, 2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.item_tokens, model.encode(model.item_vectors))
    table = model.recommend(k=50)
    for item in ("new-1", "2"):
        assert (table.item_id == item).any()
    history = model.recommend(histories={"u": ["new-1", shop.items.ids[3], "2"]}, k=59)
    assert set(history.item_id).isdisjoint(["new-1", "2", shop.items.ids[3]])
    # Known items rank among each other as before.
    old, new = fitted.recommend(k=20), table[table.item_id.isin(shop.items.ids)]
    for user in shop.user_ids[:5]:
        expected = old[old.user_id == user].item_id.tolist()
        assert new[new.user_id == user].item_id.tolist()[:20] == expected


@pytest.mark.parametrize("overrides", [(), ("head.source=response",), ("head.space=tokenizer",),
                                       ("retrieval.draws=2",), ("prompt.text=none",)],
                         ids=",".join)  # fmt: skip
def test_items_by_interactions_go_where_their_users_do(overrides, monkeypatch):
    monkeypatch.setattr(cold_start, "BATCH", 2)
    monkeypatch.setattr(cold_start, "with_own_part", lambda vectors, *others: vectors)
    base, shop = random_model(*overrides), small_shop()
    users = {"new-1": [4, 7, 9, 11, 2], "new-2": [8]}
    frame = new_items(item_id=["new-1", "new-2", "new-3"], title=["Tent", "", "Tent"])
    pairs = {item: " ".join(shop.user_ids[row] for row in rows) for item, rows in users.items()}
    interactions = pd.concat([chosen_by(**{item: text}) for item, text in pairs.items()])
    vectors = extended(base, frame, interactions).item_vectors.detach()
    recommender = Engine(base, shop, text=False)
    for place, rows in enumerate(users.values()):
        mean = F.normalize(recommender.sample(rows)[0][0], dim=-1).mean(0)
        cosine = F.cosine_similarity(vectors[ITEMS + place], mean, dim=0)
        assert cosine == pytest.approx(1, abs=1e-4)
    by_text = extended(base, frame[2:]).item_vectors[-1]
    torch.testing.assert_close(vectors[-1], by_text)


@pytest.mark.parametrize("users, items, dim", [(1, 1, 2), (40, 3, 8), (129, 127, 37)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_new_items_enter_their_share_of_lists(users, items, dim, share):
    """Exactly so where samples leave directions out, which are then the items' own."""
    free = max(1, dim // 8)
    samples = F.normalize(F.pad(torch.randn(users, dim - free), (0, free)), dim=-1)
    vectors = F.pad(torch.randn(items, dim - free), (0, free))
    own = F.pad(torch.randn(items, free), (dim - free, 0))
    last = torch.rand(users) - 0.3
    found = with_own_part(vectors, own, samples, last, share)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(items))
    before = samples @ F.normalize(vectors, dim=-1).T
    entered = ((samples @ found.T > last[:, None] + 1e-5) & (last[:, None] > 0)).sum(0)
    assert (entered <= max(0, round(share * users) - 1)).all()
    few = ((before > last[:, None]) & (last[:, None] > 0)).sum(0) < max(1, round(share * users))
    torch.testing.assert_close((samples @ found.T)[:, few], before[:, few], atol=1e-5, rtol=0)
    a = F.cosine_similarity(found, vectors)
    assert (a > 0).all()  # whatever the scores, something of what is known of an item stays
    torch.testing.assert_close(samples @ found.T, a * before, atol=1e-5, rtol=0)


def test_new_items_do_not_crowd_everybodys_lists():
    """Twelve items, each chosen by all but a few: as they are sampled, they would be everywhere."""
    model, names = trained_model(), [f"new-{number}" for number in range(12)]
    users = {name: " ".join(model.dataset.user_ids[place:]) for place, name in enumerate(names)}
    frame = new_items(item_id=names, title=[""] * 12)
    table = extended(model, frame, chosen_by(**users)).recommend(k=10)
    part = 12 / (ITEMS + 12)
    assert 0.2 * part < table.item_id.isin(names).mean() < 1.3 * part


@pytest.mark.parametrize("dim, left", [(1, 1), (7, 1), (33, 4)])
def test_own_directions_are_where_samples_vary_least_and_differ(dim, left):
    basis = torch.linalg.qr(torch.randn(dim, dim)).Q
    samples = F.normalize(torch.randn(50, dim) * torch.arange(dim + 1, 1, -1) ** 4 @ basis, dim=-1)
    keys = torch.randint(-(2**62), 2**62, (5,))
    own = own_directions(samples, keys)
    torch.testing.assert_close(own.norm(dim=1), torch.ones(5))
    assert (samples.mean(0) @ own.T <= 1e-6).all()
    torch.testing.assert_close(own_directions(samples, keys[3:]), own[3:])
    energy, directions = torch.linalg.eigh(samples.T @ samples)
    torch.testing.assert_close((own @ directions[:, :left]).norm(dim=1), torch.ones(5))
    if left > 1:
        assert torch.pdist(own).min() > 0.01


@pytest.mark.parametrize("model", [random_model, trained_model], ids=["random", "trained"])
def test_a_model_with_new_items_is_saved_whole(model, tmp_path):
    frame = new_items(item_id=["a", "b"], title=["Green Tent", "Old Lens"])
    model = extended(model(), frame, chosen_by(b=small_shop().user_ids[0]))
    model.save_pretrained(tmp_path / "model")
    loaded = ContRec.from_pretrained(tmp_path / "model")
    assert_same_weights(model, loaded)
    pd.testing.assert_frame_equal(loaded.recommend(k=5), model.recommend(k=5))
    loaded.add_items(new_items(item_id=["c"], title=["Tea"], category=["Tea"]))
    assert loaded.dataset.items.ids[-3:] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name, frame, interactions",
    [
        ("frame", {"item_id": ["a"]}, None),
        ("frame", {"title": ["a"]}, None),
        ("item_id", {"item_id": ["SKU-0001"], "title": ["T"]}, None),
        ("item_id", {"item_id": ["a", "a"], "title": ["T", "U"]}, None),
        ("title", {"item_id": ["a", "b"], "title": ["T", ""]}, None),
        ("title", {"item_id": ["a"], "title": [None], "category": [None]}, None),
        ("interactions", {"item_id": ["a"], "title": ["T"]}, {"a": "nobody"}),
        ("interactions", {"item_id": ["a"], "title": ["T"]}, {"b": "user-0001"}),
        ("interactions", {"item_id": ["a"], "title": ["T"]}, {"SKU-0001": "user-0001"}),
        ("interactions", {"item_id": ["a"], "title": ["T"]}, "no columns"),
    ],
)
def test_refuses_items_that_cannot_be_added(name, frame, interactions):
    model = copy.copy(random_model())
    if interactions is not None:
        interactions = pd.DataFrame() if interactions == "no columns" else chosen_by(**interactions)
    with refused(ValueError, name):
        model.add_items(pd.DataFrame(frame), interactions)
    assert len(model.dataset.items) == len(model.item_vectors) == ITEMS


def test_no_items_change_nothing_and_a_model_without_a_dataset_is_refused():
    model = extended(random_model(), new_items(item_id=[], title=[]))
    assert_same_weights(model, random_model())
    model.dataset = None
    with refused(ValueError, "model"):
        model.add_items(new_items(item_id=["a"], title=["T"]))
