"""The language model and ContRec: causality, training and inference agree, save and load."""

import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch
from model_cases import (
    Recorder,
    one_thread,  # noqa: F401
    small_config,
    small_shop,
    trained_model,
)
from ops_cases import relative_error
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from contrec_fast.config import BackboneConfig
from contrec_fast.data.prompts import CLOSE, IGNORED, OPEN, Prompts
from contrec_fast.engine import Recommender
from contrec_fast.models.backbone import load_backbone, make_tiny_backbone
from contrec_fast.models.contrec import ContRec
from contrec_fast.training import train

WORDS = ["kettle", "tent", "lens", "saga", "front light", "chain"]


def write_backbone(path, kind, dtype=torch.float32, eos="<|end|>", spare_rows=0):
    """A folder as others publish them: neither <diff> nor a padding token."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(WORDS * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=eos)
    vocabulary = len(tokenizer) + spare_rows
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=1024,
            bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module")
def model():
    return trained_model()


@pytest.fixture(scope="module")
def prompts(model):
    config = model.config
    return Prompts(small_shop().items, model.text_tokenizer, config.tokenizer.tokens, config.prompt)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """foreign(kind): ContRec trained on a backbone of another make, once each."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            write_backbone(folder, kind)
            config = small_config(epochs=1)
            config.backbone.path = str(folder)
            made[kind] = train(small_shop(), config, Recorder())
        return made[kind]

    return make


def random_windows(*lengths):
    rng = np.random.default_rng(random.randrange(2**32))
    return [rng.integers(0, len(small_shop().items), length) for length in lengths]


def conditions(model, batch):
    with torch.inference_mode():
        return model.conditions(model.hidden_states(batch), batch)


def test_tiny_backbone_is_a_folder_like_any_other(tmp_path):
    make_tiny_backbone(
        WORDS, BackboneConfig(hidden=16, layers=2, heads=2, vocabulary=300), tmp_path
    )
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    backbone, tokenizer = load_backbone(tmp_path)
    sizes = backbone.config
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads) == (16, 2, 2)
    assert len(tokenizer) == backbone.get_input_embeddings().num_embeddings
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for mark in (OPEN, CLOSE):
        ids = tokenizer(mark, add_special_tokens=False).input_ids
        assert ids == [tokenizer.convert_tokens_to_ids(mark)]
    text = f" front light{OPEN}{CLOSE} Ünïcode 茶"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == " front light Ünïcode 茶"


def test_tiny_backbone_is_reproducible_and_refuses_heads_of_odd_width(tmp_path):
    config = BackboneConfig(hidden=8, layers=1, heads=2, vocabulary=300)
    states = []
    for name in ("a", "b"):
        torch.manual_seed(5)
        make_tiny_backbone(WORDS, config, tmp_path / name)
        states.append(load_backbone(tmp_path / name)[0].state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    config.hidden = 6
    with pytest.raises(ValueError, match="^backbone.hidden: expected a multiple of .*, got 6$"):
        make_tiny_backbone(WORDS, config, tmp_path / "c")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("spare_rows", [0, 1, 5])
def test_a_backbone_learns_the_marks_it_lacks(tmp_path, kind, spare_rows):
    write_backbone(tmp_path, kind, spare_rows=spare_rows)
    backbone, tokenizer = load_backbone(tmp_path)
    before = len(tokenizer) - 2
    marks = tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
    assert marks == [before, before + 1]
    assert tokenizer.tokenize(f"tent{OPEN}lens")[1:2] == [OPEN]
    rows = max(before + 2, before + spare_rows)
    assert backbone.get_input_embeddings().num_embeddings == rows
    assert backbone.get_output_embeddings().out_features == rows
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_backbones_are_loaded_in_float32(tmp_path):
    write_backbone(tmp_path, "llama", torch.bfloat16)
    backbone, _ = load_backbone(tmp_path)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_refuses_what_is_no_backbone(tmp_path):
    with pytest.raises(ValueError, match="config.json") as caught:
        load_backbone(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value) and "\n" not in str(caught.value)
    write_backbone(tmp_path, "llama", eos=None)
    with pytest.raises(ValueError, match="end-of-text token"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_conditions_do_not_look_ahead(model, foreign, kind):
    model = model if kind == "tiny" else foreign(kind)
    prompts = Prompts(small_shop().items, model.text_tokenizer, 2, model.config.prompt)
    (window,) = random_windows(12)
    other = window.copy()
    other[5:] = (window[5:] + 1 + np.random.randint(50)) % 60
    first = conditions(model, prompts.training_batch([window]))
    second = conditions(model, prompts.training_batch([other]))
    torch.testing.assert_close(first[:5], second[:5], rtol=0, atol=1e-6)
    assert (first[5:] - second[5:]).abs().amax(1).min() > 1e-5  # but they read their own item


@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_inference_conditions_are_those_of_training(model, foreign, kind):
    model = model if kind == "tiny" else foreign(kind)
    prompts = Prompts(small_shop().items, model.text_tokenizer, 2, model.config.prompt)
    (window,) = random_windows(21)
    expected = conditions(model, prompts.training_batch([window]))
    histories = [window[:length] for length in (1, 2, 9, 20)]
    for batch in (histories, histories[::-1], histories[1:3], [histories[0]]):
        got, texts = model.write(prompts.inference_batch(batch), 3)
        assert got.shape == (len(batch), 16) and len(texts) == len(batch)
        want = expected[[len(history) - 1 for history in batch]]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_continuous_tokens_are_read(model, prompts):
    """Items with the same title differ by their continuous tokens alone."""
    (window,) = random_windows(5)
    batch = prompts.training_batch([window])
    swapped = copy.copy(batch)
    swapped.rows = torch.where(batch.rows >= 0, (batch.rows + 2) % len(model.item_tokens), -1)
    assert relative_error(conditions(model, swapped), conditions(model, batch)) > 1e-4
    embedded = model.embed(batch)
    at = batch.rows >= 0
    torch.testing.assert_close(embedded[at], model.item_tokens[batch.rows[at]])
    text = model.backbone.get_input_embeddings().weight[batch.token_ids[~at]]
    torch.testing.assert_close(embedded[~at], text)


def test_losses_are_those_of_the_parts(model, prompts):
    batch = prompts.training_batch(random_windows(3, 8, 2))
    with torch.no_grad():
        torch.manual_seed(1)
        losses = model.losses(batch)
        assert set(losses) == {"diffusion", "dispersive", "ranking", "text"}
        output = model.backbone(
            inputs_embeds=model.embed(batch), attention_mask=batch.attention_mask
        )
        scores, total, count = output.logits.log_softmax(-1), 0.0, 0
        for line, column in (batch.labels != IGNORED).nonzero().tolist():
            total -= float(scores[line, column - 1, batch.labels[line, column]])
            count += 1
        assert float(losses["text"]) == pytest.approx(total / count, rel=1e-4)
        read = conditions(model, batch)
        torch.manual_seed(1)
        head = model.head.losses(read, batch.next_items, model.item_vectors, model.config.training)
        for name, value in head.items():
            assert float(losses[name]) == pytest.approx(float(value), rel=1e-4), name


def test_training_mode_leaves_the_tokenizer_alone():
    model = copy.deepcopy(trained_model())
    model.train()
    assert model.training and model.backbone.training and model.dropout.training
    assert not any(module.training for module in model.tokenizer.modules())
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    assert model.item_vectors.requires_grad and not model.item_tokens.requires_grad
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "deep" / "model"
    model.save_pretrained(folder)
    return folder


def assert_same_model(first, second):
    assert first.config == second.config
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def recommendations(model):
    lists = Recommender(model, small_shop()).recommend(range(7), 10)
    return [lists.ids.tolist(), lists.scores.tolist(), lists.matched.tolist(), lists.texts]


def test_saves_and_loads(model, saved):
    loaded = ContRec.from_pretrained(saved)
    assert not loaded.training
    assert_same_model(model, loaded)
    assert recommendations(loaded) == recommendations(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_backbones_train_save_and_load(foreign, kind, tmp_path):
    model = foreign(kind)
    model.save_pretrained(tmp_path / "model")
    loaded = ContRec.from_pretrained(tmp_path / "model")
    assert_same_model(model, loaded)
    assert recommendations(loaded) == recommendations(model)


def test_nothing_is_pickled(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".yaml", ".json", ".safetensors", ".jinja", ".txt"}
    assert {"config.yaml", "model.safetensors", "backbone"} == {p.name for p in saved.iterdir()}
    pickles = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert not [path for path in files if path.read_bytes().startswith(pickles)]


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        ContRec.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message, message
    return message


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "backbone"])
def test_names_a_missing_file(saved, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns(name))
    assert refusal(folder).endswith(f"found no {name}")


def test_names_an_unfit_file(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (b"", b"garbage" * 9, whole[: len(whole) // 2]):
        weights.write_bytes(broken)
        assert "model.safetensors" in refusal(folder)
    weights.write_bytes(whole)
    settings = (folder / "config.yaml").read_text()
    for old, new in (("denoiser: adaln", "denoiser: mlp"), ("tokens: 2", "tokens: 7")):
        assert old in settings
        (folder / "config.yaml").write_text(settings.replace(old, new))
        assert "model.safetensors" in refusal(folder)
    assert "config.json" in refusal_without(folder / "backbone" / "config.json", folder, settings)


def refusal_without(path, folder, settings):
    (folder / "config.yaml").write_text(settings)
    path.unlink()
    return refusal(folder)
