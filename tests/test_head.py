"""The head alone: the recommender's lists from hidden states, without the language model."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from model_cases import random_model, small_shop
from ops_cases import refused
from test_ops_capture import OneDevice

from contrec_fast import Head, ops
from contrec_fast.engine import Engine, head, stable_id
from contrec_fast.models.latent import load_latent_path

ITEMS = 60
TOKENS = ("prompt.text=none",)
VARIANTS = [
    (),
    TOKENS,
    (*TOKENS, "retrieval.draws=3", "head.method=ddpm", "head.steps=20"),
    (*TOKENS, "head.bag=false", "head.space=tokenizer"),
    (*TOKENS, "head.diffusion=false", "retrieval.filter_seen=false"),
]


@pytest.fixture(params=VARIANTS, ids=lambda overrides: ",".join(overrides) or "default")
def model(request):
    return random_model(*request.param)


def inputs(model, rows):
    """Keyword arguments of a head's `sample` for users of the shop, as the model reads them."""
    shop, rows = small_shop(), list(rows)
    recommender = Engine(model, shop, text=False)
    batch = recommender.prompts.inference_batch([shop.histories[row] for row in rows])
    with torch.inference_mode():
        hidden = model.hidden_states(batch)[batch.read_row, batch.read_column].clone()
    user_ids = torch.tensor([stable_id(shop.user_ids[row]) for row in rows])
    found = {"hidden": hidden, "user_ids": user_ids}
    if model.bag is not None:
        found["bag"] = recommender.head.bags([shop.histories[row] for row in rows])
    return found


def rows_of(given, rows):
    return {name: tensor[rows] for name, tensor in given.items()}


def test_lists_are_the_recommenders(model):
    shop, rows = small_shop(), np.random.permutation(30)[:9]
    head, recommender = Head.of(model, shop), Engine(model, shop, text=False)
    seen_rows = None if head.seen is None else torch.from_numpy(rows)
    given = inputs(model, rows)
    scores, ids = head(**given, k=10, seen_rows=seen_rows)
    expected = recommender.recommend(rows, 10)
    np.testing.assert_array_equal(ids, expected.ids)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32
    for row in range(3):  # whatever the batch
        own = None if seen_rows is None else seen_rows[row : row + 1]
        alone = head(**rows_of(given, [row]), k=10, seen_rows=own)[1]
        assert torch.equal(alone[0], ids[row])


def test_the_whole_catalog_is_ranked_with_the_bonus(model):
    head, rows = Head.of(model, small_shop()), [2, 7, 7]
    given = inputs(model, rows)
    matched = torch.rand(3, head.catalog.num_groups) < 0.5
    scores, ids = head(**given, k=ITEMS, matched=matched)
    vectors = head.sample(**given)
    cosines = F.cosine_similarity(vectors[:, :, None], model.item_vectors, dim=-1)
    bonus = model.config.retrieval.bonus * matched[:, head.catalog.groups.long()]
    expected = (cosines * (1 + bonus)).amax(0)
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=0, atol=1e-5)
    assert all(sorted(row.tolist()) == list(range(ITEMS)) for row in ids)
    assert (scores.diff(dim=1) <= 0).all()


def test_hidden_states_of_any_dtype_and_none():
    model = random_model(*TOKENS)
    head, given = Head.of(model, small_shop()), inputs(model, range(5))
    low = given | {"hidden": given["hidden"].bfloat16()}
    exact = given | {"hidden": given["hidden"].bfloat16().float()}
    assert torch.equal(head.sample(**low), head.sample(**exact))
    scores, ids = head(**rows_of(given, []), k=3)
    assert scores.shape == ids.shape == (0, 3)
    assert not torch.equal(Head.of(model, small_shop(), 1).sample(**given), head.sample(**given))


def test_bags_are_what_the_model_was_trained_with():
    model = random_model(*TOKENS)
    head, vectors = Head.of(model, small_shop()), model.item_vectors.detach()
    histories = [torch.randint(ITEMS, (length,)).tolist() for length in (1, 0, 129, 3)]
    bags = head.bags(histories)
    for history, bag in zip(histories, bags, strict=True):
        expected = vectors[history].sum(0) / max(len(history), 1) ** 0.5
        torch.testing.assert_close(bag, expected, rtol=1e-5, atol=1e-5)
    assert head.bags([]).shape == (0, 16)
    for wrong in (-1, ITEMS):
        with refused(ValueError, "histories"):
            head.bags([[0], [wrong]])


def test_a_folder_without_its_language_model(model, tmp_path):
    model = copy.copy(model)
    shop = small_shop()
    targets = np.where(np.arange(30) % 2, np.arange(30), -1)
    model.dataset = type(shop)(shop.items, shop.user_ids, shop.histories, targets)
    model.save_pretrained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "backbone")
    head = Head.from_pretrained(tmp_path / "run")
    assert not any(parameter.requires_grad for parameter in head.latent.parameters())
    given, rows = inputs(model, range(4)), torch.arange(4)
    rows = None if head.seen is None else rows
    expected = Head.of(model, model.dataset.complete())(**given, k=7, seen_rows=rows)
    for found, other in zip(head(**given, k=7, seen_rows=rows), expected):
        assert torch.equal(found, other)
    assert head.dataset.user_ids == shop.user_ids
    shutil.rmtree(tmp_path / "run" / "data")
    bare = Head.from_pretrained(tmp_path / "run", seed=torch.tensor(0))
    assert bare.dataset is None and bare.seen is None
    assert torch.equal(bare(**given, k=7)[1], head(**given, k=7)[1])


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    model = copy.copy(random_model(*TOKENS))
    model.dataset = small_shop()
    model.save_pretrained(tmp_path / "RUN")
    monkeypatch.chdir(tmp_path)
    examples = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (example,) = (text.split("```")[0] for text in examples if "Head.from_pretrained" in text)
    exec(example, found := {})
    assert found["ids"].shape == (2, 10) and (found["ids"] >= 0).all()


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with refused(ValueError, tmp_path / "nothing"):
        Head.from_pretrained(tmp_path / "nothing")
    with refused(ValueError, tmp_path):
        Head.from_pretrained(tmp_path)
    random_model("head.source=response").save_pretrained(tmp_path / "response")
    with refused(ValueError, tmp_path / "response" / "config.yaml"):
        Head.from_pretrained(tmp_path / "response")
    random_model(*TOKENS).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"{}")
    with refused(ValueError, tmp_path / "run" / "model.safetensors"):
        load_latent_path(tmp_path / "run")


def test_wrong_arguments_are_refused_in_one_line():
    model = random_model(*TOKENS)
    head, given = Head.of(model, small_shop()), inputs(model, range(2))
    for name, value, error in (
        ("hidden", torch.zeros(2, 9), ValueError),
        ("hidden", torch.zeros(2, 16).int(), TypeError),
        ("hidden", torch.zeros(2, 16, device="meta"), ValueError),
        ("user_ids", torch.arange(3), ValueError),
        ("user_ids", torch.zeros(2), TypeError),
        ("bag", None, ValueError),
        ("bag", torch.zeros(2, 9), ValueError),
    ):
        with refused(error, name):
            head(**given | {name: value}, k=3)
    with refused(ValueError, "k"):
        head(**given, k=ITEMS + 1)
    with refused(ValueError, "seen, seen_rows"):
        Head(model, head.catalog)(**given, k=3, seen_rows=torch.arange(2))
    bare = random_model(*TOKENS, "head.bag=false")
    with refused(ValueError, "bag"):
        Head.of(bare, small_shop())(**given, k=3)
    with refused(ValueError, "hidden"):
        Head.of(random_model("head.source=response"), small_shop()).sample(**given)
    with refused(ValueError, "record"):
        head.record()


def test_sampling_never_waits(model):
    """On the meta device there is nothing to wait for, so that waiting shows as an error."""
    given = {name: tensor.to("meta") for name, tensor in inputs(model, range(3)).items()}
    catalog = ops.Catalog(model.item_vectors.detach())
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    recorded = Head(copy.deepcopy(model).to("meta"), catalog, seed=seed)
    with OneDevice():
        vectors = recorded.sample(**given)
    assert vectors.shape == (model.config.retrieval.draws, 3, 16)


def test_recorded_calls_hold_their_users_and_no_others(model, monkeypatch):
    """With a stand-in for the graph, which runs the recorded call again."""
    batches = []

    def as_graph(call, device):
        output = call()

        def run():
            batches.append(output.shape[1])
            output.copy_(call())

        return run, output

    monkeypatch.setattr(head, "as_graph", as_graph)
    plain, recorded = Head.of(model, small_shop()), Head.of(model, small_shop())
    recorded.record([8, 2, 4])
    given = inputs(model, range(9))
    for count in (3, 1, 9, 0, 8, 2):
        own = rows_of(given, slice(count))
        found, expected = recorded.sample(**own), plain.sample(**own)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        recorded.sample(**rows_of(given, [8]))  # what was returned is not written to
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert batches == [4, 2, 2, 2, 2, 2, 2, 8, 2, 2, 2]


@pytest.mark.gpu
def test_graphs_give_what_calls_give(model):
    given = {name: tensor.cuda() for name, tensor in inputs(model, range(9)).items()}
    model = copy.deepcopy(model).cuda()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    plain, recorded = (Head.of(model, small_shop(), seed) for _ in range(2))
    recorded.record([1, 4, 8])
    for value, count in enumerate((3, 1, 9, 8, 2)):
        seed.fill_(value)
        own = rows_of(given, slice(count))
        torch.testing.assert_close(recorded.sample(**own), plain.sample(**own))
        scores, expected = recorded(**own, k=5)[0], plain(**own, k=5)[0]
        torch.testing.assert_close(scores, expected)
