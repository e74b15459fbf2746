"""`accelerate` and `Recommender`: the reference's lists, options, and what is noticed."""

import copy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from model_cases import random_model, small_shop, trained_model
from ops_cases import refused

from contrec_fast import ContRec, Recommender, accelerate
from contrec_fast.data.prompts import Prompts, Window
from contrec_fast.data.templates import response_text
from contrec_fast.engine import Recommendations
from contrec_fast.engine.accelerate import histories_of

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from equal_lists import compare, reference_lists  # noqa: E402

USERS, K = 30, 10
MODELS = {
    "default": [],
    "steps": ["head.method=ddpm", "head.steps=20", "head.guidance=1.0"],
    "draws, seen": ["retrieval.draws=3", "retrieval.filter_seen=false"],
    "no text": ["prompt.text=none", "prompt.user_token=true"],
    "no bag": ["head.bag=false", "head.denoiser=linear", "head.guidance=2.0"],
    "response": ["head.source=response"],
    "space": ["head.space=tokenizer"],
    "no diffusion": ["head.diffusion=false"],
}


def prompts_of(model):
    config = model.config
    return Prompts(
        model.dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt
    )


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_the_references_wherever_scores_differ(name):
    """Of all users of a data set."""
    model = random_model(*MODELS[name])
    dataset = model.dataset.complete()
    fast = accelerate(model)
    found = fast.recommender.engine.over(dataset).recommend(np.arange(USERS), K)
    ids, scores, texts = reference_lists(model, dataset, np.arange(USERS), K + 1)
    counts = compare(found, ids, scores, texts)
    assert counts["settled"] > 0.9 * counts["ids"] == 0.9 * USERS * K
    assert counts["settled and different"] == counts["other texts"] == 0
    np.testing.assert_allclose(found.scores, scores[:, :K], rtol=1e-4, atol=1e-5)
    listed = fast.recommend(k=K).item_id
    assert listed.tolist() == [dataset.items.ids[item] for item in found.ids.flatten()]


def test_differences_of_lists_are_counted():
    ids, scores = np.array([[4, 2, 7, 5]]), np.array([[0.9, 0.5, 0.5 - 1e-6, 0.1]])
    for found, different, settled in [([4, 2, 7], 0, 0), ([4, 7, 2], 2, 0), ([5, 2, 7], 1, 1)]:
        lists = Recommendations(np.array([found]), None, None, ["a"])
        counts = compare(lists, ids, scores, ["a"])
        assert (counts["ids"], counts["settled"]) == (3, 1)
        assert (counts["different"], counts["settled and different"]) == (different, settled)
        assert compare(lists, ids, scores, ["b"])["other texts"] == 1


def test_reading_and_writing_batches():
    model = random_model()
    fast, batch = accelerate(model), prompts_of(model).inference_batch(small_shop().histories)
    for (found, texts), (expected, written) in [
        (fast.write(batch), model.write(batch)),
        ((fast.read(batch), None), (model.read(batch), None)),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert texts == written
    assert fast.recommender.engine.reader.counters["prompts"]  # which has served


def test_histories_of_batches():
    model, histories = trained_model(), small_shop().histories
    prompts, most = prompts_of(model), model.config.prompt.history
    found = histories_of(prompts.inference_batch(histories), most)
    assert len(found) == len(histories)
    for a, b in zip(found, histories):
        np.testing.assert_array_equal(a, b)
    windows = [Window(history, len(history) - 1) for history in histories]
    assert histories_of(prompts.inference_batch(histories, windows), most) is None
    for start in (0, -2):  # of a training window, the last item is the answer
        windows = [Window(h, start % len(h)) for h in histories if len(h) > 2]
        assert histories_of(prompts.training_batch(windows), most) is None


def test_the_interface_and_the_weights_are_the_models():
    model = random_model()
    fast = accelerate(model)
    assert isinstance(fast, ContRec) and not fast.training
    state = fast.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].data_ptr() == tensor.data_ptr()
    batch = prompts_of(model).training_batch([Window(h, 0) for h in small_shop().histories])
    torch.manual_seed(0)
    expected = model.eval()(batch)
    torch.manual_seed(0)
    for name, loss in fast(batch).items():
        assert torch.equal(loss, expected[name])


def test_changed_weights_are_noticed():
    model = copy.deepcopy(random_model())
    fast = accelerate(model)
    before = fast.recommend(k=3)
    with torch.no_grad():
        model.item_vectors.neg_()
    after = fast.recommend(k=3)
    pd.testing.assert_frame_equal(after, accelerate(model).recommend(k=3))
    assert (after.item_id != before.item_id).any()
    fast.train().eval()
    pd.testing.assert_frame_equal(fast.recommend(k=3), after)


def test_a_copy_is_a_model_of_its_own():
    fast = accelerate(random_model())
    expected, other = fast.recommend(k=3), copy.deepcopy(fast)
    with torch.no_grad():
        other.item_vectors.neg_()
    assert (other.recommend(k=3).item_id != expected.item_id).any()
    pd.testing.assert_frame_equal(fast.recommend(k=3), expected, rtol=1e-4)


def test_items_added_are_served_and_the_model_keeps_its_own():
    model, new = copy.deepcopy(random_model()), pd.DataFrame({"item_id": ["x"], "title": ["mug"]})
    fast, other = accelerate(model), copy.deepcopy(model)
    fast.add_items(new)
    other.add_items(new)
    assert len(model.item_vectors) == len(model.dataset.items) == len(fast.item_vectors) - 1
    pd.testing.assert_frame_equal(fast.recommend(k=61), other.recommend(k=61))


def test_a_recommender_of_a_changed_model_refuses():
    model = copy.deepcopy(random_model())
    recommender = Recommender(model)
    model.add_items(pd.DataFrame({"item_id": ["x"], "title": ["mug"]}))
    for call in (recommender.recommend, recommender.recommend_iter):
        with refused(RuntimeError, "model"):
            call(histories={"u": ["x"]})
    assert len(Recommender(model).recommend(histories={"u": ["x"]}, k=3)) == 3


def test_language_models_that_cannot_be_packed_are_read_as_they_are():
    model = copy.deepcopy(random_model())
    fast, batch = accelerate(model), prompts_of(model).inference_batch(small_shop().histories)
    fast.recommender.engine.reader.packed.suits = False
    found, texts = fast.write(batch)
    expected, written = model.write(batch)
    assert texts == written and torch.equal(found, expected)
    assert torch.equal(fast.read(batch), model.read(batch))


def test_the_report_says_what_serves(capsys, monkeypatch):
    fast = accelerate(random_model(), report=True)
    printed = capsys.readouterr().out
    served = {part.name: part for part in fast.report}
    assert all(name in printed for name in served)
    assert served["prompts"].served_by.startswith("packed")
    assert served["CUDA graphs"] == ("CUDA graphs", "none", "no GPU")
    assert served["language model"].served_by == "float32"
    monkeypatch.setattr("contrec_fast.ops.dispatch._choose", lambda *arguments: "reference")
    served = {part.name: part for part in fast.report}
    assert served["ops.cosine_topk"].served_by == "reference" and served["ops.cosine_topk"].why


def test_a_recommender_of_a_folder(tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path / "run")
    expected = model.recommend(k=4)
    for source in (tmp_path / "run", str(tmp_path / "run"), model):
        recommender = Recommender(source, device="cpu")
        for _ in range(2):
            pd.testing.assert_frame_equal(recommender.recommend(k=4), expected, rtol=1e-4)
    user, names = model.dataset.user_ids[3], model.dataset.items.ids
    history = {user: [names[item] for item in model.dataset.complete().histories[3]]}
    found = recommender.recommend(histories=history, k=4)
    pd.testing.assert_frame_equal(found, recommender.recommend([user], k=4), rtol=1e-4)


@pytest.mark.parametrize("overrides", [(), ("prompt.text=none",)])
def test_deterministic_lists_are_bitwise_the_same_in_any_company(overrides):
    recommender = Recommender(random_model(*overrides), deterministic=True)
    whole = recommender.recommend(k=5)
    users = np.random.permutation(whole.user_id.unique())
    for some in (users[:1], users[:7], users):
        found = recommender.recommend(list(some), k=5)
        expected = pd.concat([whole[whole.user_id == user] for user in some], ignore_index=True)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("size", [1, 7, 10, 100])
def test_progress_is_told_in_whole_batches(deterministic, size):
    engine, told = Recommender(trained_model(), deterministic=deterministic).engine, []
    engine.recommend(range(USERS), 1, size, lambda: told.append(size))
    assert len(told) == -(-USERS // size)


def test_users_who_come_back_are_remembered():
    """One item more, read behind what is remembered, gives the lists of reading it all."""
    model, names = random_model(), small_shop().items.ids
    plain, kept = Recommender(model), Recommender(model, remembered=2**24)
    histories = {user: names[i : i + 5] for i, user in enumerate("abcdef")}
    for _ in range(2):
        expected, found = (r.recommend(histories=histories, k=5) for r in (plain, kept))
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
        histories = {user: [*items, names[40]] for user, items in histories.items()}
    assert kept.engine.reader.counters["hits"] == len(histories)


def test_texts_name_what_exists():
    """Of a language model that writes anything: beginnings of responses of the catalog."""
    items = small_shop().items
    answers = [response_text(*pair).strip() for pair in zip(items.titles, items.categories)]
    model = random_model("prompt.response_tokens=40")
    texts = Recommender(model, constrained=True).recommend(k=1).text
    assert all(text and any(answer.startswith(text) for answer in answers) for text in texts)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_that_looks_everywhere_gives_the_exact_lists(kind):
    pytest.importorskip("faiss", reason="needs faiss, which is not installed")
    model = random_model("prompt.text=none")
    recommender = Recommender(model, index=kind)
    index = recommender.engine.head.index
    if kind == "ivf":
        index.faiss.nprobe = index.faiss.nlist
    pd.testing.assert_frame_equal(recommender.recommend(k=5), Recommender(model).recommend(k=5))
    assert index.counts["queries"] == USERS


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), ("fp8", 0.2)])
def test_fewer_bits_are_near_float32(dtype, error):
    model = random_model("prompt.text=none")
    fast = accelerate(model, dtype=dtype)
    engine, other = Recommender(model).engine, fast.recommender.engine
    exact, found = (e.reader.read(small_shop().histories) for e in (engine, other))
    assert found.dtype == exact.dtype == torch.float32
    assert 1e-4 < (found - exact).norm() / exact.norm() < error
    assert Recommender(model, dtype=dtype).engine.settings == other.settings != engine.settings
    (served,) = (part.served_by for part in fast.report if part.name == "language model")
    assert served == str(dtype).removeprefix("torch.")
    assert model.backbone.dtype == torch.float32  # the model's own stays


def test_graphs_are_captured_on_a_gpu_only():
    with refused(ValueError, "record"):
        Recommender(random_model()).warm_up()


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [(), ("prompt.text=none",)])
def test_graphs_serve_the_same_lists(overrides):
    model = copy.deepcopy(random_model(*overrides))
    fast = accelerate(model, device="cuda")
    expected = Recommender(model.to("cuda")).recommend(k=5)
    pd.testing.assert_frame_equal(fast.recommend(k=5), expected, rtol=1e-4)
    engine = fast.recommender.engine
    assert engine.head.recorded and bool(engine.reader.counters["captures"]) == engine.text
    (served,) = (part.served_by for part in fast.report if part.name == "CUDA graphs")
    assert served == "the sampler, decoding" if engine.text else "the sampler"


@pytest.mark.parametrize(
    "model, options, kind, name",
    [
        (7, {}, TypeError, "model"),
        ("nowhere", {}, ValueError, "nowhere"),
        (trained_model, {"dtype": torch.int8}, TypeError, "dtype"),
        (trained_model, {"dtype": "float32"}, TypeError, "dtype"),
        (trained_model, {"index": "tree"}, ValueError, "index"),
        (trained_model, {"seed": 1.5}, TypeError, "seed"),
        (trained_model, {"seed": 2**63}, TypeError, "seed"),
        (trained_model, {"device": "gpu"}, ValueError, "device"),
        (trained_model, {"device": "meta"}, ValueError, "device"),
        (trained_model, {"device": "cuda:77"}, ValueError, "device"),
        (trained_model, {"remembered": 1}, ValueError, "remembered"),
        (trained_model, {"constrained": True, "text": False}, ValueError, "constrained"),
        (trained_model, {"remembered": 2**24, "deterministic": True}, ValueError, "remembered"),
    ],
)
def test_refused(model, options, kind, name):
    model = model() if callable(model) else model
    with refused(kind, name):
        Recommender(model, **options)
    if model != "nowhere":
        with refused(kind, name):
            accelerate(model, **options)


def test_a_model_without_data_is_refused():
    model = copy.copy(random_model())
    model.dataset = None
    for way in (Recommender, accelerate):
        with refused(ValueError, "model"):
            way(model)
