"""The reader: conditions and texts of ContRec's own methods, whatever the language model."""

import copy
import json
import operator
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from model_cases import (
    RESIDUAL,
    backbone_of,
    prompts_of,
    random_history,
    random_model,
    small_shop,
)
from ops_cases import refused
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from contrec_fast import ContRec
from contrec_fast.data.interactions import Items
from contrec_fast.data.prompts import Window
from contrec_fast.engine import reader as reader_module
from contrec_fast.engine.accelerate import histories_of
from contrec_fast.engine.decoding import Decoder, greedy
from contrec_fast.engine.drafts import CONTEXT, LONGEST, RECENT, Drafts
from contrec_fast.engine.prompting import PromptPacker
from contrec_fast.engine.reader import Reader

VARIANTS = [
    [],
    ["prompt.text=response"],
    ["prompt.text=none"],
    ["prompt.text=none", "prompt.user_token=true", "tokenizer.tokens=3"],
    ["prompt.user_token=true", "prompt.history=4", "head.bag=false"],
    ["head.source=response", "prompt.response_tokens=25"],
    ["head.space=tokenizer", "prompt.response_tokens=1"],
    [RESIDUAL, "prompt.user_token=true", "prompt.response_tokens=40"],
]
LENGTHS = [1, 3, 1, 20, 26, 2, 7, 19]


def same(reader, histories):
    """Compare with the model's own methods; returns the texts."""
    model, texts = reader.model, []
    batch = reader.prompts.inference_batch(histories)
    if model.config.prompt.text != "none":
        expected, texts = model.write(batch)
        found, written = reader.write(histories)
        assert written == texts
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if model.config.head.source == "hidden":
        torch.testing.assert_close(reader.read(histories), model.read(batch), rtol=1e-4, atol=1e-5)
    return texts


def test_readers_that_share_a_language_model_leave_it_as_it_is(monkeypatch):
    model, history = random_model(backbone_of("gpt2")), random_history(5)
    readers, base = [Reader(model, prompts_of(model)) for _ in range(2)], model.backbone.base_model
    honest, inside, over = base.forward, threading.Event(), threading.Event()

    def forward(*args, **kwargs):
        if threading.current_thread() is second:
            inside.set()
            over.wait(5)
        elif not second.ident:
            second.start()
            inside.wait(0.5)
        return honest(*args, **kwargs)

    second = threading.Thread(target=lambda: readers[1].read([history]))
    monkeypatch.setattr(base, "forward", forward)
    readers[0].read([history])
    over.set()
    second.join()
    assert model.backbone.config._attn_implementation == "sdpa"


def test_after_memory_ran_out_prompts_are_read_as_before(monkeypatch):
    model, histories = random_model(backbone_of("gpt2")), [random_history(n) for n in (1, 5)]
    reader = Reader(model, prompts_of(model))
    same(reader, histories)
    monkeypatch.setattr(reader.packed.cache.layers[-1], "lazy_initialization", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.read([random_history(20)])
    monkeypatch.undo()
    same(reader, histories)
    same(reader, [random_history(20)])


@pytest.mark.parametrize(
    "kind, overrides",
    [("tiny", overrides) for overrides in VARIANTS]
    + [(kind, VARIANTS[i]) for kind in ("llama", "gpt2") for i in (0, 4)],
)
def test_conditions_and_texts_are_those_of_the_model(kind, overrides, monkeypatch):
    monkeypatch.setitem(reader_module.BUDGET, "cpu", 300)
    model = random_model(*overrides, backbone_of(kind))
    reader = Reader(model, prompts_of(model))
    assert reader.packed.suits and reader.packed.narrows == (kind != "gpt2")
    for lengths in ([1], LENGTHS, np.random.randint(1, 30, 129), [5, 5, 5]):
        same(reader, [random_history(length) for length in lengths])


def test_what_was_written_before_is_written_in_fewer_passes():
    model = random_model("prompt.response_tokens=40")
    reader = Reader(model, prompts_of(model))
    histories = small_shop().histories
    counts, texts = [], None
    for _ in range(3):
        before = dict(reader.counters)
        found = same(reader, histories)
        assert texts in (None, found)
        texts = found
        counts.append({name: count - before[name] for name, count in reader.counters.items()})
    assert counts[0]["written"] == counts[2]["written"] > 20 * len(texts)
    assert 2 * counts[2]["passes"] < counts[0]["passes"] <= 40


def test_wrong_drafts_change_nothing(monkeypatch):
    model = random_model("prompt.response_tokens=17")
    reader = Reader(model, prompts_of(model))
    histories = [random_history(length) for length in LENGTHS]

    def propose(self, context, most):
        length = torch.randint(min(most, LONGEST) + 1, (len(context),))
        return torch.randint(300, (len(context), min(most, LONGEST))), length

    for _ in range(3):
        monkeypatch.setattr(Drafts, "propose", propose)
        same(reader, histories)
        monkeypatch.undo()
        same(reader, histories)


def test_a_text_ends_at_its_end_and_at_the_room():
    """A language model that counts: token t + 1 follows t, whatever was read."""
    vocabulary, room, end = 23, 9, 20

    class Packed:
        class cache:
            device, places, attention = torch.device("cpu"), 0, "layers"

        class backbone:
            get_input_embeddings = staticmethod(lambda: lambda ids: ids[:, None].float())
            get_output_embeddings = staticmethod(
                lambda: lambda x: torch.eye(vocabulary)[(x[..., 0].long() + 1) % vocabulary]
            )

        def __call__(self, embedded, packing):
            return embedded

    Packed.cache.dtype = torch.float32
    examples = np.array([[3, 4, 5, 6, 7, 8, 20], [4, 5, 6, 20, -1, -1, -1]])
    counters = {"passes": 0, "fed": 0, "replays": 0, "written": 0}
    decoder = Decoder(Packed(), Drafts(examples, end, "cpu"), end, room, counters)
    for _ in range(2):  # the second time with drafts of what was written
        opening = decoder.opening()
        first = torch.tensor([3, 17, 19, 20, 0, 11, 15])
        following = (opening + 1).expand(len(first), -1)
        best = torch.cat([first[:, None], following], dim=1)
        written = decoder.write(opening, best, torch.full((len(first),), 5))
        for start, line in zip(first.tolist(), written.tolist()):
            text = [(start + i) % vocabulary for i in range(room)]
            text = text[: text.index(end) + 1] if end in text else text
            assert line == text + [-1] * (room - len(text))
    assert counters["passes"] > 0 == counters["replays"]
    assert counters["written"] == 2 * int((written >= 0).sum())


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 300])
def test_greedy_is_the_first_of_the_largest(vocabulary):
    for count in (0, 1, 127, 513):
        hidden = torch.randint(-2, 3, (count, 5)).float()
        weight = torch.randint(-2, 3, (vocabulary, 5)).float()  # many ties, and exact
        assert torch.equal(greedy(hidden, weight), (hidden @ weight.T).argmax(1))


def test_titles_with_special_characters(monkeypatch):
    shop = small_shop().items
    odd = ["<diff>", " </diff> <eos>", "", "Ünï\u2028cødé 🦊", "(a) products, such as", "\t\n", "."]
    titles = [odd[i % len(odd)] for i in range(len(shop))]
    categories = [["", "<pad>", "A & B", "x"][i % 4] for i in range(len(shop))]
    model = random_model("prompt.response_tokens=12")
    reader = Reader(model, prompts_of(model, Items(shop.ids, titles, categories)))
    same(reader, [random_history(length) for length in LENGTHS])


def test_refuses_prompts_longer_than_the_language_model_reads():
    model = copy.deepcopy(random_model())
    histories = [random_history(20), random_history(2)]
    reader = Reader(model, prompts_of(model))
    longest = int(reader.prompts.inference_batch(histories).attention_mask.sum(1).max())
    model.backbone.config.max_position_embeddings = longest + model.config.prompt.response_tokens
    same(reader, histories)
    model.backbone.config.max_position_embeddings -= 1
    with refused(ValueError, "prompt.history"):
        reader.write(histories)
    reader.read(histories)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": -9.0},
        {"suppress_tokens": list(range(0, 400, 2))},
        {"do_sample": True, "temperature": 9.0},
    ],
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_folders_settings_of_generation_are_left_out(tmp_path, settings, file):
    model = random_model("prompt.response_tokens=17")
    batch = prompts_of(model).inference_batch([random_history(length) for length in LENGTHS])
    texts = model.write(batch)[1]
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "backbone" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    loaded = ContRec.from_pretrained(tmp_path / "model")
    histories = histories_of(batch, model.config.prompt.history)
    assert same(Reader(loaded, prompts_of(loaded)), histories) == texts
    settings.pop("do_sample", None)  # which `write` says itself
    loaded.backbone.generation_config = GenerationConfig(**settings)
    assert (loaded.write(batch)[1] != texts) == ("temperature" not in settings)


def test_the_model_is_left_as_it_is():
    model = random_model()
    config = copy.deepcopy(model.backbone.config)
    attention = config._attn_implementation
    reader = Reader(model, prompts_of(model))
    reader.write([random_history(3)])
    assert model.backbone.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in model.backbone.modules())


def test_a_sliding_window_is_read_by_the_model_itself():
    model = copy.deepcopy(random_model())
    model.backbone = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(model.text_tokenizer), hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
        )
    ).eval()  # fmt: skip
    reader = Reader(model, prompts_of(model))
    assert not reader.packed.suits
    same(reader, [random_history(length) for length in (1, 9, 4)])
    assert reader.counters["prompts"] == 0


def test_grouped_queries_are_packed():
    model = copy.deepcopy(random_model())
    model.backbone = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(model.text_tokenizer), hidden_size=16, intermediate_size=32,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=None,
        )
    ).eval()  # fmt: skip
    reader = Reader(model, prompts_of(model))
    assert reader.packed.suits and reader.packed.narrows
    same(reader, [random_history(length) for length in LENGTHS])


def test_bfloat16_is_near():
    model = random_model()
    before = model.backbone.dtype
    reader = Reader(model, prompts_of(model), torch.bfloat16)
    histories = [random_history(length) for length in LENGTHS]
    expected = model.read(reader.prompts.inference_batch(histories))
    found, texts = reader.write(histories)
    assert model.backbone.dtype == before and found.dtype == expected.dtype
    assert len(texts) == len(histories)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def prepared(device):
    """A reader with passes of fixed shapes, and histories of which it has seen longer ones."""
    model = copy.deepcopy(random_model("prompt.response_tokens=33")).to(device)
    reader = Reader(model, prompts_of(model))
    histories = [random_history(length) for length in [*np.random.randint(1, 25, 80), 20, 20]]
    reader.warm_up(histories)
    return reader, histories


def check_fixed(device):
    reader, histories = prepared(device)
    for *_, run in reader._decoder.fixed._passes.values():  # as before a capture
        with torch.inference_mode():
            run()
    for count in (1, 3, 64, 65, 80):
        before = dict(reader.counters)
        batch = reader.prompts.inference_batch(histories[:count]).to(device)
        expected, texts = reader.model.write(batch)
        found, written = reader.write(histories[:count])
        assert written == texts
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert reader.counters["replays"] > before["replays"]
        assert (reader.counters["passes"] == before["passes"]) == (
            count <= reader._decoder.fixed.largest
        )
    return reader


def test_passes_of_fixed_shapes():
    reader = check_fixed("cpu")
    assert reader.counters["captures"] == 0
    replays = reader.counters["replays"]
    same(reader, [random_history(3)] * 90)  # more than there were: the cache is allocated anew
    assert reader.counters["replays"] == replays


@pytest.mark.gpu
def test_graphs_are_captured_once():
    reader = check_fixed("cuda")
    assert reader.counters["captures"] == 10  # 1, 2, ..., 512


# Drafts


def drafted(drafts, context):
    padded = torch.full((1, CONTEXT), -1)
    context = torch.tensor([context], dtype=torch.int64)[:, -CONTEXT:]
    padded[:, CONTEXT - context.shape[1] :] = context
    tokens, length = drafts.propose(padded, LONGEST)
    return tokens[0, : int(length)].tolist()


def test_drafts_go_on_while_they_are_mostly_right():
    end = 9
    texts = np.full((12, 8), -1)
    texts[:, :4] = [1, 2, 3, 4]
    texts[:, 4] = [5] * 7 + [6] * 5
    texts[:, 5] = np.arange(12) + 20  # no guess is right often enough
    texts[:, 6] = end
    drafts = Drafts(texts, end, "cpu")
    assert drafted(drafts, []) == [1, 2, 3, 4, 5]
    assert drafted(drafts, [1, 2]) == [3, 4, 5]
    assert drafted(drafts, [2, 3, 4]) == [5]
    assert drafted(drafts, [4, 5, 22]) == []  # the end of the text is not drafted
    assert drafted(drafts, [1, 2, 4]) == drafted(drafts, [7]) == []


def test_drafts_learn_what_is_written_and_forget():
    drafts = Drafts(np.array([[8, 9]]), 9, "cpu")
    assert drafted(drafts, []) == [8] and drafted(drafts, [1]) == drafted(drafts, [8]) == []
    drafts.learn(torch.tensor([[1, 2, 3, 9, -1]]).repeat(3, 1))
    assert drafted(drafts, []) == [1, 2, 3]
    for _ in range(3):
        drafts.learn(torch.tensor([[4, 5, 6, 7, 9]]).repeat(RECENT, 1))
    assert drafted(drafts, []) == [4, 5, 6, 7] and drafted(drafts, [1]) == []
    assert sum(map(len, drafts._recent)) <= 2 * RECENT


@pytest.mark.parametrize("overrides", [[], ["prompt.text=none"]])
def test_items_are_encoded_in_any_thread_while_others_are_packed(overrides):
    prompts = prompts_of(random_model("prompt.user_token=true", *overrides))
    alone, shared = (PromptPacker(prompts, len(small_shop().items), "cpu") for _ in range(2))
    opening = None if overrides else np.arange(3)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            windows, others = (
                [
                    Window(random_history(n), max(0, n - 20))
                    for n in np.random.randint(1, most, number)
                ]
                for most, number in ((30, 3), (4, 8))
            )
            learning = threads.map(lambda window: shared.learn([window]), others)
            found, expected = (
                (packer.order(windows, [None] * 3), packer.pack(windows, [None] * 3, opening))
                for packer in (shared, alone)
            )
            np.testing.assert_array_equal(found[0][0], expected[0][0])
            assert found[0][1] == expected[0][1]
            for name, value in vars(expected[1]).items():
                same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
                assert same(getattr(found[1], name), value), name
            assert not any(learning)
