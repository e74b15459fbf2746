"""Whole released checkpoints to lists, against the released way restated in bench/."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from model_cases import small_shop, write_backbone
from ops_cases import refused, relative_error
from released_cases import randomize_language_model
from torch import nn

from contrec_fast.compat import load_released_checkpoint
from contrec_fast.compat.ranking import MEASURES, Ranking

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # where its scripts find each other
from released_model import Generated, ReleasedModel, write_prompts  # noqa: E402

ITEMS, USERS, DIM, STEPS, TOKENS = 60, 7, 6, 9, 12
GAP = 1e-5  # of scores, below which lists may differ


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    write_backbone(path, "llama")
    return path


def made_up(folder, two_layers=True, dim=DIM, dtype=torch.float64, **sizes):
    """A released model in which everything depends on everything before it.

    In `dtype`, but the language model's weights are float32's numbers.
    """
    with default_dtype(dtype):
        vectors = torch.randn(ITEMS, dim), torch.randn(USERS, dim)
        sizes = {"tokens": TOKENS, "timesteps": STEPS, "rank": 4} | sizes
        model = ReleasedModel(folder, *vectors, two_layers, **sizes)
        randomize_language_model(model.model)
        model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 1)
    for norm in (model.diffusion_net.ln_1, model.diffusion_net.ln_2, model.diffusion_net.ln_3):
        # Not 1: queries that sum to 0 are padding, whatever rounding makes of their sums.
        nn.init.normal_(norm.weight, mean=3)
    for layer in (model.output_decoder.dim_block[2], model.output_decoder.length_block[3]):
        nn.init.uniform_(layer.bias, 0.1, 1)  # or all states may be zero
        nn.init.normal_(layer.weight)
    return model.eval()


def loaded(model, folder, **options):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return load_released_checkpoint(model.checkpoint() | {"state_dict": state}, folder, **options)


def question(users=5, longest=7, ways=2):
    """Prompts, histories and users."""
    lengths = [*torch.randint(1, longest + 1, (users - 1,)).tolist(), longest]
    histories = [torch.randperm(ITEMS)[:length].tolist() for length in lengths]
    prompts = write_prompts(small_shop().items.titles, histories, ways)
    return prompts, histories, torch.randperm(USERS)[:users].tolist()


def released_way(model, *asked):
    """What the release generates, and the noise that it drew."""
    with default_dtype(model.item_embeds.dtype):
        torch.manual_seed(1)
        found = model.generate(*asked)
        torch.manual_seed(1)
        noise = [torch.randn(found.vectors.shape) for _ in range(model.ddpm.timesteps)]
    return found, torch.stack(noise)


def assert_lists(scores, ids, expected):
    """Lists are the best of all scores [B, N], the same items where no two scores are close."""
    k = ids.shape[1]
    best, order = expected.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores.double(), best[:, :k].double(), rtol=1e-5, atol=GAP)
    gaps = torch.nn.functional.pad(-best.diff(dim=1).nan_to_num(0), (1, 1), value=torch.inf)
    clear = (gaps[:, :-1] > GAP) & (gaps[:, 1:] > GAP)
    clear[:, 0] = gaps[:, 1] > GAP
    clear, out = clear[:, :k], best[:, :k] == -torch.inf
    assert torch.equal(ids[clear & ~out], order[:, :k][clear & ~out])
    assert (ids[out] == -1).all()
    assert (clear | out).double().mean() > 0.5


def masked(scores, excluded):
    scores = scores.clone()
    for row, items in enumerate(excluded):
        scores[row, list(items)] = -torch.inf
    return scores


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("two_layers", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"ways": 3, "positions": 1, "tokens": 5}, {"dim": 34}])
def test_lists_are_the_released_ones_for_equal_noise(folder, two_layers, measure, sizes):
    model = made_up(folder, two_layers, **sizes)
    asked = question(ways=sizes.get("ways", 2))
    released = loaded(model, folder)
    predictor = released.predictor(model.item_embeds, model.user_embeds, measure)
    found, noise = released_way(model, *asked)
    scores, _ = model.rank(found, asked[1], measure, pi=0)
    excluded = asked[1] if measure == "cos" else [items[:-1] for items in asked[1]]
    options = {"noise": noise, "excluded": excluded, "batch_padding": True}
    lists = predictor.predict(*asked, k=10, **options)
    assert lists.texts == found.texts and len(set(found.texts)) > 1
    assert relative_error(lists.vectors, found.vectors) < 1e-8
    scores = -scores if measure == "mse" else scores
    assert_lists(lists.scores, lists.ids, masked(scores, excluded))
    if measure != "mse":
        lists = predictor.predict(*asked, k=10, zero_excluded=True, **options)
        assert_lists(lists.scores, lists.ids, scores)


def test_by_default_a_response_is_padded_as_if_its_user_were_alone(folder):
    model, asked = made_up(folder), question(users=6)
    # Ends of texts, so that lengths differ.
    model.model.get_output_embeddings().weight.data[0] *= 4
    lists = loaded(model, folder).predictor(model.item_embeds, model.user_embeds)
    assert lists.responder.ends == [0]  # of the folder
    each = [released_way(model, *([part[row]] for part in asked)) for row in range(6)]
    noise = torch.cat([noise for _, noise in each], dim=1)
    found = lists.predict(*asked, noise=noise)
    assert found.texts == [own.texts[0] for own, _ in each]
    assert relative_error(found.vectors, torch.cat([own.vectors for own, _ in each])) < 1e-8
    together, noise = released_way(model, *asked)
    found = lists.predict(*asked, noise=noise, batch_padding=True)
    assert relative_error(found.vectors, together.vectors) < 1e-8


def test_float32_and_200_steps(folder):
    model = made_up(folder, timesteps=200, dim=64, dtype=torch.float32)
    asked = question()
    predictor = loaded(model, folder).predictor(model.item_embeds, model.user_embeds, "cos")
    found, noise = released_way(model, *asked)
    lists = predictor.predict(*asked, noise=noise, batch_padding=True)
    assert lists.texts == found.texts
    assert relative_error(lists.vectors, found.vectors) < 1e-4  # tables and times in float32 there
    scores, _ = model.rank(found, asked[1], "cos")
    assert_lists(lists.scores, lists.ids, masked(scores, asked[1]))


@pytest.mark.parametrize("ends", [None, 0, [3, 0, 5]])
def test_ends_of_texts_and_prompts_without_users(folder, ends):
    model, (prompts, histories, _) = made_up(folder), question(users=6)
    released = loaded(model, folder)
    for language_model in (model.model, released.language_model):
        language_model.generation_config.eos_token_id = ends
    model.model.get_output_embeddings().weight.data[[0, 3, 5]] *= 3
    released.language_model.get_output_embeddings().weight.data[[0, 3, 5]] *= 3
    prompts = [prompt.replace("<user_continuous_token_0>", "") for prompt in prompts]
    found, noise = released_way(model, prompts, histories, [])
    lists = released.predictor(model.item_embeds).predict(
        prompts, histories, noise=noise, batch_padding=True
    )
    assert lists.texts == found.texts
    assert relative_error(lists.vectors, found.vectors) < 1e-8


def test_a_users_list_depends_on_nobody_else(folder):
    model, asked = made_up(folder), question(users=6)
    predictor = loaded(model, folder).predictor(model.item_embeds, model.user_embeds, "inner")
    together = predictor.predict(*asked, seed=4)
    order = torch.randperm(6).tolist()
    for rows in (order, order[:1], [], order[2:4]):
        found = predictor.predict(*([part[row] for row in rows] for part in asked), seed=4)
        assert found.texts == [together.texts[row] for row in rows]
        assert found.ids.shape == (len(rows), 10) and found.vectors.shape == (len(rows), DIM)
        torch.testing.assert_close(found.vectors, together.vectors[rows], rtol=1e-8, atol=1e-8)
        assert torch.equal(found.ids, together.ids[rows])


def test_what_was_written_is_drafted(folder):
    model, asked = made_up(folder), question(users=6)
    predictor, passes = loaded(model, folder).predictor(model.item_embeds, model.user_embeds), []
    counters = predictor.responder.decoder.counters
    for _ in range(3):
        before = counters["passes"]
        texts = predictor.predict(*asked).texts
        passes.append(counters["passes"] - before)
    assert passes[0] > passes[2] and texts == released_way(model, *asked)[0].texts


def test_quirks_have_flags(folder):
    model = made_up(folder)
    with_noise, without = loaded(model, folder), loaded(model, folder, constant_noise=False)
    x = torch.randn(3, DIM).double()
    for name in ("item", "user"):
        encoder = getattr(model, f"{name}_encoder")
        with torch.no_grad():
            constant = encoder.sigma * encoder.epsilon
            tokens = encoder(x).transpose(0, 1)
            found = [getattr(r, f"{name}_tokenizer").encode(x) for r in (with_noise, without)]
        assert relative_error(found[0], tokens) < 1e-6  # drawn in float32 there
        assert relative_error(found[0] - found[1], constant.expand_as(found[0])) < 1e-6


@pytest.mark.parametrize("items, k", [(1, 1), (3, 3), (129, 7), (129, 129), (127, 30)])
@pytest.mark.parametrize("scale", [1e-3, 1, 40])
@pytest.mark.parametrize("measure", MEASURES)
def test_ranking_by_every_measure(measure, items, k, scale):
    vectors, rows = torch.randn(4, 5).double() * scale, torch.randn(items, 5).double() * scale
    rows = rows + torch.randn(5).double() * scale
    excluded = [torch.randperm(items)[:count].tolist() for count in (0, 1, items // 2, items)]
    model = ReleasedModel.__new__(ReleasedModel)
    nn.Module.__init__(model)
    model.item_embeds = rows
    found = Generated([], vectors, vectors @ rows.T)
    # The last is not excluded there by two of the measures.
    interacted = excluded if measure == "cos" else [[*own, 0] for own in excluded]
    expected, _ = model.rank(found, interacted, measure, pi=0)
    expected = (-expected if measure == "mse" else expected) / scale
    ranking = Ranking(rows, measure)
    lists = ranking(vectors, k, excluded, zero_excluded=False)
    if measure == "inner":
        expected = expected / scale
    unit = {"mse": scale, "inner": scale**2, "cos": 1}[measure]
    if measure == "cos":
        expected = expected * scale
    assert_rows(lists[0] / unit, lists[1], masked(expected, excluded))
    scores, ids = ranking(vectors, k, excluded, zero_excluded=measure != "mse")
    if measure != "mse":
        assert_rows(scores / unit, ids, expected)


def assert_rows(scores, ids, expected):
    for row in range(len(ids)):  # an excluded user's lists are all ties
        own = scores[row : row + 1], ids[row : row + 1], expected[row : row + 1]
        best = own[2].sort(dim=1, descending=True).values[:, : ids.shape[1]]
        if len(best.unique()) > ids.shape[1] // 2 and best.min() > -torch.inf:
            assert_lists(*own)
        else:
            torch.testing.assert_close(own[0].double(), best, rtol=1e-5, atol=GAP)


def test_one_error_names_what_does_not_fit_in_the_whole_checkpoint(folder):
    state = made_up(folder).state_dict()
    layer = "model.base_model.model.model.layers.0.mlp.up_proj"
    missing = [
        "diffusion_net.ln_1.bias",
        "item_encoder.pos.weight",
        f"{layer}.lora_A.default.weight",
    ]
    missing += [key for key in state if key.startswith("output_decoder.dim_block")]
    wrong = ["user_encoder.encoders.1.4.bias", f"{layer}.base_layer.weight"]
    state = {key: tensor for key, tensor in state.items() if key not in missing}
    state |= {key: torch.zeros(3, dtype=state[key].dtype) for key in wrong}
    state |= {"model.other": torch.zeros(1), "item_encoder.blocks.0": torch.zeros(1), "x": 3}
    with pytest.raises(ValueError) as caught:
        load_released_checkpoint(state, folder)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("source: expected the released keys; missing: ")
    found = dict(part.split(": ", 1) for part in line.split("; ")[1:])
    missing.remove("item_encoder.pos.weight")  # then it is a plain autoencoder
    assert found["missing"].split(", ") == sorted(missing)
    assert found["unexpected"] == "item_encoder.blocks.0, model.other, x"
    assert found["wrong"].count("expected") == 2
    for key in wrong:
        assert f"{key.replace('.base_layer', '')}: expected shape [" in found["wrong"]


def test_parts_that_do_not_go_together_are_refused(folder, tmp_path):
    model = made_up(folder)
    for other, part, message in (
        (
            made_up(folder, ways=3),
            "item_encoder",
            r"user_.* expected \(6, 3, 16\), got \(6, 2, 16\)",
        ),
        (
            made_up(folder, dim=4),
            "user_encoder",
            r"user_.* expected \(6, 2, 16\), got \(4, 2, 16\)",
        ),
    ):
        state = {k: t for k, t in model.state_dict().items() if not k.startswith(part)}
        state |= {k: t for k, t in other.state_dict().items() if k.startswith(part)}
        with pytest.raises(ValueError, match=f"^source: .*; wrong: .*{message}$"):
            load_released_checkpoint(state, folder)
    tables = [key for key in state if "embed_tokens" in key or "lm_head" in key]
    state = model.state_dict() | {k: torch.zeros(307, 16) for k in tables}
    with pytest.raises(ValueError, match="wrong: the embeddings' rows: expected 306, got 307$"):
        load_released_checkpoint(state, folder)
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("model.")}
    with pytest.raises(ValueError, match="missing: weights or adapters of a LlamaForCausalLM$"):
        load_released_checkpoint(state, folder)
    with refused(ValueError, tmp_path / "nothing"):
        load_released_checkpoint(model.checkpoint(), tmp_path / "nothing")


def test_bad_arguments_are_refused_in_one_line(folder):
    model = made_up(folder)
    released = loaded(model, folder)
    for name, arguments in {
        "item_vectors": (torch.zeros(3, DIM + 2),),
        "user_vectors": (model.item_embeds, torch.zeros(3, DIM + 2)),
        "measure": (model.item_embeds, None, "dot"),
        "vectors": (torch.zeros(3, DIM), None, "cos"),
    }.items():
        with refused(ValueError, name):
            released.predictor(*arguments)
    prompts, histories, users = question(users=3)
    predictor = released.predictor(model.item_embeds, model.user_embeds)
    for name, arguments in {
        "prompts": (prompts, [[*histories[0], 1], *histories[1:]], users),
        "histories": (prompts, histories[1:], users),
        "users": (prompts, histories, [0, 1, USERS]),
        "users, user_vectors": (prompts, histories),
        "excluded": (prompts, histories, users, 3, [[ITEMS], [], []]),
    }.items():
        with refused(ValueError, name):
            predictor.predict(*arguments)
    for k, kind in ((ITEMS + 1, ValueError), (0, ValueError), (-3, ValueError), (2.5, TypeError)):
        with refused(kind, "k"):
            predictor.predict(prompts, histories, users, k)
    with refused(ValueError, "histories"):
        predictor.predict(prompts, [[-1] * len(own) for own in histories], users)
    with refused(ValueError, "prompts"):
        predictor.predict([prompts[0] + " word" * 3000], histories[:1], users[:1])
