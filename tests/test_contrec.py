"""ContRec: what conditions see, losses, and what these train."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    RESIDUAL,
    Recorder,
    backbone_of,
    prompts_of,
    random_history,
    random_model,
    small_config,
    small_shop,
    trained_model,
    training_batch,
)
from ops_cases import relative_error

from contrec_fast import ops
from contrec_fast.data import Items
from contrec_fast.data.prompts import IGNORED, Window
from contrec_fast.training import train

FORMS = ("full", "response", "none")
ITEMS = len(small_shop().items)
ALL_LOSSES = [f"training.{name}_weight=1" for name in ("contrastive", "bpr")]


@torch.inference_mode()
def conditions(model, batch):
    return model.conditions(model.hidden_states(batch), batch)


# No leak: a condition is a function of the items up to its own


def retitled(items, which):
    """The catalog with other titles and categories for some of its items."""
    titles, categories = items.titles.copy(), items.categories.copy()
    for item in which:
        titles[item], categories[item] = f"Another thing {item}", "Elsewhere"
    return Items(items.ids, titles, categories)


def with_vectors_changed(model, which):
    model = copy.deepcopy(model)
    model.item_vectors.data[which] += 1
    model.collaborative[which] += 1
    model.update_tokens()
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_a_condition_sees_nothing_of_what_follows(form, kind):
    model = random_model(backbone_of(kind), f"prompt.text={form}", "prompt.user_token=true")
    prompts, start, shown = prompts_of(model), 3, 5
    history, company = random_history(start + shown + 1), Window(random_history(9), 0)

    def read(history, model=model, prompts=prompts):
        """Conditions [shown, D] at the items of the window, in company of a longer prompt."""
        batch = prompts.training_batch([Window(history, start), company])
        return conditions(model, batch)[:shown]

    before = read(history)
    for position in range(shown):
        following = slice(start + position + 1, None)  # the last of which is the answer
        later = history[following]
        others = np.setdiff1d(np.arange(ITEMS), [*history, *company.history])
        exchanged, shorter = history.copy(), history[: start + position + 2]
        exchanged[following] = np.random.permutation(others)[: len(later)]
        after = {
            "items": read(exchanged),
            "length": conditions(model, prompts.training_batch([Window(shorter, start)])),
            "titles": read(history, prompts=prompts_of(model, retitled(small_shop().items, later))),
            "vectors": read(
                history, with_vectors_changed(model, np.setdiff1d(later, company.history))
            ),
        }
        for name, found in after.items():
            torch.testing.assert_close(
                found[: position + 1], before[: position + 1], rtol=1e-5, atol=1e-5, msg=name
            )
        # And later ones do read what was exchanged: the comparison can fail.
        differences = (after["items"] - before)[position + 1 :].abs().amax(1)
        assert len(differences) == shown - position - 1 and (differences > 1e-3).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_training_conditions_are_those_of_inference_on_what_came_before(form, kind):
    model = random_model(
        backbone_of(kind), f"prompt.text={form}", "prompt.user_token=true", "prompt.history=7"
    )
    prompts, history = prompts_of(model), random_history(13)
    first = conditions(model, prompts.training_batch([Window(history, 0)]))[:7]
    latest = conditions(model, prompts.training_batch([Window(history, 5)]))[-1:]
    expected = torch.cat([first, latest])  # with 7 items shown, the older 5 are summarised
    truncated = [history[: length + 1] for length in range(7)] + [history[:12]]
    for order in (range(8), range(7, -1, -1), [3], [0, 6]):
        batch = prompts.inference_batch([truncated[i] for i in order])
        ways = [model.read(batch)] + ([model.write(batch)[0]] if form != "none" else [])
        for found in ways:
            torch.testing.assert_close(found, expected[list(order)], rtol=1e-4, atol=1e-5)


def test_conditions_read_older_items_by_user_token_and_bag():
    for bag in ("true", "false"):
        for user_token in ("true", "false"):
            model = random_model(
                f"head.bag={bag}", f"prompt.user_token={user_token}", "prompt.text=none"
            )
            history = random_history(9)
            other = history.copy()
            other[:4] = history[:4] + 1 - 2 * (history[:4] % 2)
            found = [
                conditions(model, prompts_of(model).training_batch([Window(h, 4)]))
                for h in (history, other)
            ]
            assert torch.equal(*found) == (bag == user_token == "false")


def test_summaries_are_naive_sums_over_roots_of_counts():
    model = random_model("prompt.user_token=true")
    histories = [random_history(length) for length in (2, 9, 5, 12, 3)]
    histories[2][:] = histories[2][0]  # the same item again and again
    starts = [0, 4, 0, 9, 1]
    batch = prompts_of(model).training_batch(list(map(Window, histories, starts)))
    before, upto = (part.detach() for part in model.summaries(batch))
    assert before.shape == (5, 16) and upto.shape == (5, 4, 16)

    def summary(items):
        total = sum((model.item_vectors[item].detach() for item in items), torch.zeros(16))
        return total / math.sqrt(max(len(items), 1))

    for line, (history, start) in enumerate(zip(histories, starts)):
        torch.testing.assert_close(before[line], summary(history[:start]))
        for place in range(len(history) - 1 - start):
            expected = summary(history[: start + place + 1])
            torch.testing.assert_close(upto[line, place], expected)
    none_older = prompts_of(model).inference_batch(histories)
    assert not none_older.older.numel() and not model.summaries(none_older)[0].any()


def test_training_leaves_whole_items_out_of_summaries():
    model, draws = copy.deepcopy(random_model()), 2000
    batch, rate = training_batch(model, 2, 9, 7), model.config.training.dropout
    whole = [part.detach() for part in model.summaries(batch)]
    model.train()
    drawn = [[part.detach() for part in model.summaries(batch)] for _ in range(draws)]
    for found, expected in zip(map(torch.stack, zip(*drawn)), whole, strict=True):
        error = 6 * found.std(0) / math.sqrt(draws) + 1e-5
        assert ((found.mean(0) - expected).abs() < error).all()
    single = torch.stack([upto[0, 0] for _, upto in drawn])  # of one item: all of it or nothing
    kept = single.any(1)
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.06)
    expected = whole[1][0, 0] / (1 - rate)
    torch.testing.assert_close(single[kept], expected.expand(int(kept.sum()), -1))


@pytest.mark.parametrize("user_token", ["true", "false"])
def test_continuous_tokens_enter_where_the_rows_say(user_token):
    model = random_model(f"prompt.user_token={user_token}")
    batch = training_batch(model, 5, 8)
    embedded, tokens = model.embed(batch).detach(), model.item_tokens[batch.items]
    if user_token == "true":
        summaries = model.summaries(batch)[0].detach()
        tokens = torch.cat([tokens, model.encode(summaries).detach()])
    at = batch.rows >= 0
    torch.testing.assert_close(embedded[at], tokens.flatten(0, 1)[batch.rows[at]])
    text = model.backbone.get_input_embeddings().weight[batch.token_ids[~at]].detach()
    torch.testing.assert_close(embedded[~at], text)
    assert relative_error(tokens.square().mean().sqrt(), model.text_rms) < 0.5
    swapped = copy.copy(batch)
    swapped.rows = torch.where(at, (batch.rows + 2) % len(tokens.flatten(0, 1)), -1)
    assert relative_error(conditions(model, swapped), conditions(model, batch)) > 1e-4


# Losses


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], {"diffusion", "dispersive", "ranking", "text"}),
        (ALL_LOSSES, {"diffusion", "dispersive", "contrastive", "ranking", "bpr", "text"}),
        (["training.diffusion_weight=0"], {"dispersive", "ranking", "text"}),
        (["training.dispersive_weight=0"], {"diffusion", "ranking", "text"}),
        (["training.ranking_weight=0"], {"diffusion", "dispersive", "text"}),
        (["training.text_weight=0"], {"diffusion", "dispersive", "ranking"}),
        (["prompt.text=none"], {"diffusion", "dispersive", "ranking"}),
        (["head.diffusion=false", *ALL_LOSSES], {"ranking", "bpr", "text"}),
        (["head.source=response"], {"diffusion", "dispersive", "ranking", "text"}),
    ],
)
def test_losses_of_weight_0_are_left_out(overrides, expected):
    model = random_model(*overrides)
    losses = model(training_batch(model, 3, 8, 4))
    assert set(losses) == expected
    for name, loss in losses.items():
        assert loss.shape == () and loss.isfinite() and loss.requires_grad, name


@torch.no_grad()
def test_losses_are_those_of_the_parts():
    model = random_model(*ALL_LOSSES, "training.ranking_temperature=0.3")
    batch, training = training_batch(model, 3, 8, 4), model.config.training
    torch.manual_seed(1)
    losses = model(batch)
    output = model.backbone(inputs_embeds=model.embed(batch), attention_mask=batch.attention_mask)
    scores, total, count = output.logits.log_softmax(-1), 0.0, 0
    for line, column in (batch.labels != IGNORED).nonzero().tolist():
        total -= float(scores[line, column - 1, batch.labels[line, column]])
        count += 1
    assert float(losses["text"]) == pytest.approx(total / count, rel=1e-4)

    condition, items, vectors = conditions(model, batch), batch.next_items, model.item_vectors
    torch.manual_seed(1)
    negatives = torch.randint(ITEMS, items.shape)
    head = model.head.losses(condition, vectors[items], vectors[negatives], training)
    cosine = F.cosine_similarity(model.head.unroll(condition)[:, None], vectors[None], dim=-1) / 0.3
    rows = torch.arange(len(items))
    margin = cosine[rows, items] - cosine[rows, negatives]
    head |= {"ranking": F.cross_entropy(cosine, items), "bpr": -F.logsigmoid(margin).mean()}
    for name, value in head.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-3), name


@pytest.mark.parametrize("train_items", ["true", "false"])
@pytest.mark.parametrize("train_tokens", ["true", "false"])
@pytest.mark.parametrize("kind", ["tokenizer.kind=sigma-vae", RESIDUAL])
def test_gradients_reach_what_is_to_be_trained(train_items, train_tokens, kind):
    model = copy.deepcopy(
        random_model(
            f"training.train_items={train_items}", f"training.train_tokens={train_tokens}", kind
        )
    ).train()
    losses = model(training_batch(model, 3, 8, 4))

    def reached(loss):
        model.zero_grad()
        loss.backward(retain_graph=True)
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    everything = reached(sum(losses.values()))
    assert ("item_vectors" in everything) == (train_items == "true")
    assert any(name.startswith("tokenizer.") for name in everything) == (train_tokens == "true")
    assert {"condition.weight", "bag.weight"} <= everything
    for part in ("head.denoiser.", "backbone.model.layers."):
        assert any(name.startswith(part) for name in everything)
    # What the diffusion loss is to predict does not give way to it; inputs do.
    if kind != RESIDUAL:
        for loss in ("diffusion", "text"):
            tokens = reached(losses[loss])
            assert ("tokenizer.position" in tokens) == (train_tokens == "true")
    model.zero_grad()
    losses["ranking"].backward()
    if train_items == "true":
        assert model.item_vectors.grad.any(1).all()  # the whole catalog


def test_training_mode_leaves_the_tokenizer_alone():
    model = copy.deepcopy(random_model())
    model.train()
    assert model.training and model.backbone.training and model.dropout.training
    assert not any(module.training for module in model.tokenizer.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_codes_stay_and_their_embedding_learns():
    start = train(small_shop(), small_config(RESIDUAL, epochs=0), Recorder())
    model = trained_model(RESIDUAL)
    assert torch.equal(model.tokenizer.centroids, start.tokenizer.centroids)
    assert torch.equal(model.collaborative, start.collaborative)
    assert not torch.equal(model.item_vectors, start.item_vectors)
    assert not torch.equal(model.tokenizer.embedding, start.tokenizer.embedding)
    codes = model.tokenizer.codes_of(start.collaborative)
    scale = model.text_rms / model.token_rms
    expected = torch.stack([model.tokenizer.embedding[k, codes[:, k]] for k in range(2)], 1) * scale
    torch.testing.assert_close(model.item_tokens, expected.detach())


@torch.no_grad()
def test_factored_tokens_are_the_tokens():
    model = random_model()
    table = model.tokenizer.factored(model.item_vectors, model.text_rms / model.token_rms)
    torch.testing.assert_close(table.whole(), model.item_tokens.flatten(0, 1))
    batch = prompts_of(model).inference_batch([random_history(5), random_history(3)])
    tokens = batch.items[:, None] * 2 + torch.arange(2)
    rows = torch.where(batch.rows < 0, -1, tokens.flatten()[batch.rows])
    words = model.backbone.get_input_embeddings().weight
    found = ops.gather_tokens(batch.token_ids, rows, words, table)
    torch.testing.assert_close(found, model.embed(batch))


def test_tokens_follow_the_vectors_that_are_retrieved():
    model = trained_model()
    assert not torch.equal(model.item_vectors, model.collaborative)
    with torch.no_grad():
        torch.testing.assert_close(model.item_tokens, model.encode(model.item_vectors))


def test_the_text_loss_alone_trains_the_tokenizer_and_lists_see_it():
    alone = {"diffusion_weight": 0.0, "dispersive_weight": 0.0, "ranking_weight": 0.0}
    start = train(small_shop(), small_config(epochs=0, **alone), Recorder())
    model = train(small_shop(), small_config(epochs=1, **alone), Recorder())
    frozen = train(
        small_shop(), small_config(epochs=1, train_tokens=False, **alone), Recorder()
    ).tokenizer.state_dict()
    for name, before in start.tokenizer.state_dict().items():
        after = model.tokenizer.state_dict()[name]
        learns = name.startswith("encoders.") and name.endswith("weight") or name == "position"
        assert not (learns and torch.equal(before, after)), name
        assert torch.equal(before, frozen[name]), name
    batch = prompts_of(model).inference_batch([random_history(5), random_history(3)])
    continuous = batch.rows >= 0
    with torch.no_grad():
        read = model.embed(batch)[continuous]
        tokens = model.encode(model.item_vectors[batch.items]).flatten(0, 1)
    torch.testing.assert_close(read, tokens[batch.rows[continuous]])
    assert not torch.allclose(
        read, start.item_tokens[batch.items].flatten(0, 1)[batch.rows[continuous]]
    )
