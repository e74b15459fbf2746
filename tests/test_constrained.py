"""Constrained decoding: greedy among the catalog's responses, as transformers' masks do it."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from model_cases import (
    backbone_of,
    prompts_of,
    random_history,
    random_model,
    small_shop,
    trained_model,
)
from ops_cases import refused
from transformers import MistralConfig, MistralForCausalLM

from contrec_fast.engine.constrained import ResponseTrie
from contrec_fast.engine.drafts import LONGEST, Drafts
from contrec_fast.engine.reader import Reader

LENGTHS = [1, 3, 1, 20, 26, 2, 7]


def allowed_after(responses, written):
    """Token ids that go on with a response, by looking at all of them."""
    n = len(written)
    return sorted({row[n] for row in responses if len(row) > n and row[:n] == list(written)})


def responses_of(reader):
    room = reader.model.config.prompt.response_tokens
    rows = reader.prompts.responses(reader.packer.items)[:, :room]
    return [row[row >= 0].tolist() for row in rows]


def same(reader, histories, users=None):
    """Compare with `generate`, to which the allowed tokens are given; returns the texts."""
    model, responses = reader.model, responses_of(reader)
    batch = reader.prompts.inference_batch(histories, reader.windows(histories))
    end = model.text_tokenizer.eos_token_id
    with torch.inference_mode():
        written = model.backbone.generate(
            inputs_embeds=model.embed(batch),
            attention_mask=batch.attention_mask,
            max_new_tokens=model.config.prompt.response_tokens,
            do_sample=False,
            pad_token_id=model.text_tokenizer.pad_token_id,
            eos_token_id=end,
            prefix_allowed_tokens_fn=lambda _, ids: allowed_after(responses, ids.tolist()) or [end],
        )
        texts = model.text_tokenizer.batch_decode(written, skip_special_tokens=True)
        conditions, found = reader.write(histories, users)
        expected = model.read(batch)
    assert found == [text.strip() for text in texts]
    known = model.text_tokenizer.batch_decode(responses, skip_special_tokens=True)
    assert set(found) <= {text.strip() for text in known}
    torch.testing.assert_close(conditions, expected, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("room", [1, 3, 40])
@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_texts_are_those_of_masked_greedy_decoding(kind, room):
    model = random_model(backbone_of(kind), f"prompt.response_tokens={room}")
    reader = Reader(model, prompts_of(model), constrained=True)
    for lengths in ([1], LENGTHS, np.random.randint(1, 25, 33)):
        same(reader, [random_history(length) for length in lengths])


def test_a_trained_model_names_what_exists_in_few_passes():
    model = trained_model("prompt.response_tokens=40")
    histories, counters = small_shop().histories, {}
    for constrained in (False, True):
        reader = Reader(model, prompts_of(model), constrained=constrained)
        reader.write(histories)
        counters[constrained] = reader.counters
    texts = same(reader, histories)
    assert len(set(texts)) > 1
    items = small_shop().items
    for text in texts:
        assert any(f"({c}) products, such as {t}" in text for c, t in
                   zip(items.categories, items.titles))  # fmt: skip
    assert counters[True]["passes"] < counters[False]["passes"]


def test_wrong_drafts_change_nothing(monkeypatch):
    model = random_model("prompt.response_tokens=17")
    reader = Reader(model, prompts_of(model), constrained=True)

    def propose(self, context, most):
        length = torch.randint(min(most, LONGEST) + 1, (len(context),))
        return torch.randint(300, (len(context), min(most, LONGEST))), length

    monkeypatch.setattr(Drafts, "propose", propose)
    for _ in range(3):
        same(reader, [random_history(length) for length in LENGTHS])


def check_fixed(device):
    """Passes of fixed shapes, with users who come back."""
    model = copy.deepcopy(random_model("prompt.response_tokens=33")).to(device)
    reader = Reader(model, prompts_of(model), remembered=2**24, constrained=True)
    plain = Reader(model, prompts_of(model), constrained=True)
    histories = [random_history(length) for length in np.random.randint(1, 20, 80)]
    reader.warm_up(histories)
    for count in (1, 3, 64, 80, 80):
        found, texts = reader.write(histories[:count], range(count))
        expected, written = plain.write(histories[:count])
        assert texts == written
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert reader.counters["replays"] > 0 and reader.counters["hits"] >= 80


def test_passes_of_fixed_shapes_and_returning_users():
    check_fixed("cpu")


@pytest.mark.gpu
def test_graphs():
    check_fixed("cuda")


@pytest.mark.parametrize("count", [1, 2, 60])
def test_odd_catalogs(count):
    """Titles with special characters, equal ones, no category, and a single different response."""
    shop = small_shop().items
    odd = ["<diff>", " </diff> <eos>", "", "Ünï\u2028cødé 🦊", "(a) products, such as", "a", "a b"]
    titles = [odd[i % len(odd)] if i < count else "a" for i in range(len(shop))]
    categories = [["", "<pad>", "A & B", "x"][i % 4] if i < count else "" for i in range(len(shop))]
    items = dataclasses.replace(shop, titles=titles, categories=categories)
    model = random_model("prompt.response_tokens=25")
    reader = Reader(model, prompts_of(model, items), constrained=True)
    same(reader, [random_history(length) for length in LENGTHS])


def test_conditions_from_the_response_are_those_of_what_is_written():
    model = random_model("head.source=response", "prompt.response_tokens=40")
    reader = Reader(model, prompts_of(model), constrained=True)
    histories = [random_history(length) for length in LENGTHS]
    conditions, texts = reader.write(histories)
    rows = {model.text_tokenizer.decode(row, skip_special_tokens=True).strip(): row
            for row in responses_of(reader)}  # fmt: skip
    for condition, text in zip(conditions, texts):
        with torch.inference_mode():
            expected = model.response_conditions(torch.tensor([rows[text]]))[0]
        torch.testing.assert_close(condition, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, tokens, length", [(1, 3, 4), (30, 2, 6), (129, 5, 3), (127, 40, 9)])
def test_the_trie_allows_what_goes_on_with_a_response(rows, tokens, length):
    end, room = tokens, length + 1
    texts = np.full((rows, room), -1)
    for row in texts:
        n = np.random.randint(1, length + 1)
        row[:n], row[n] = np.random.randint(tokens, size=n), end
    room = np.random.randint(1, room + 3)
    trie = ResponseTrie(texts, room, tokens + 1, end, "cpu")
    responses = [row[row >= 0].tolist() for row in texts[:, :room]]
    assert trie.responses.shape[1] == room
    for row in responses:
        node = torch.zeros(1, dtype=torch.int64)
        for n in range(len(row)):
            allowed = allowed_after(responses, row[:n])
            logits = torch.randint(3, (5, tokens + 1)).float()  # many ties
            found = trie.choose(logits, node.expand(5), lambda hidden: hidden)
            assert found.tolist() == [allowed[i] for i in logits[:, allowed].argmax(1).tolist()]
            children = trie.child(node.expand(tokens + 1), torch.arange(tokens + 1))
            assert (children >= 0).nonzero()[:, 0].tolist() == allowed
            node = trie.child(node, torch.tensor(row[n : n + 1]))
            left = {tuple(other) for other in responses if other[: n + 1] == row[: n + 1]}
            lone = int(trie.lone[node])
            assert (lone >= 0) == (len(left) == 1)
            if lone >= 0:
                assert trie.responses[lone].tolist() == row + [-1] * (room - len(row))
                break
    none = torch.tensor([-1])
    assert trie.choose(torch.zeros(1, tokens + 1), none, None).tolist() == [end]
    assert trie.child(none, torch.tensor([0])).tolist() == [-1] == trie.lone[none].tolist()


def test_drafts_are_put_right_and_go_on_where_there_is_no_choice():
    responses = np.array([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 7, 7, 9, -1]])
    trie = ResponseTrie(responses, 5, 10, 9, "cpu")
    draft = torch.tensor([[6, 2, 6, 6], [1, 7, 7, 9], [1, 6, 3, 4], [1, 2, 3, 4]])
    drafted, most = torch.tensor([2, 4, 4, 4]), torch.tensor([4, 4, 4, 1])
    found, length, path = trie.follow(torch.zeros(4, dtype=torch.int64), draft, drafted, most)
    assert length.tolist() == [3, 1, 1, 1]  # behind [1, 7] one response is left
    assert found[0, :3].tolist() == [1, 2, 3] and (found[:, 0] == 1).all()
    assert path[:, 0].tolist() == [0] * 4 and (path[2, 2:] == -1).all()


def test_refuses_a_sliding_window():
    model = copy.deepcopy(random_model())
    model.backbone = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(model.text_tokenizer), hidden_size=16, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
        )
    ).eval()  # fmt: skip
    with refused(ValueError, "constrained"):
        Reader(model, prompts_of(model), constrained=True)
