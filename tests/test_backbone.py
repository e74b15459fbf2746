"""Language models: tiny ones, those of others, what is refused, and low-rank adapters."""

import copy
import json

import numpy as np
import pytest
import torch
from model_cases import (
    Recorder,
    small_config,
    small_shop,
    trained_model,
    write_backbone,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from contrec_fast.config import BackboneConfig
from contrec_fast.data.prompts import CLOSE, OPEN, Prompts, Window
from contrec_fast.models.backbone import load_backbone, make_tiny_backbone
from contrec_fast.training.build import build

WORDS = ["kettle", "tent", "lens", "saga", "front light", "chain"]


def test_tiny_backbone_is_a_folder_like_any_other(tmp_path):
    config = BackboneConfig(hidden=16, layers=2, heads=2, vocabulary=300)
    for part in make_tiny_backbone(WORDS, config):
        part.save_pretrained(tmp_path)
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


def test_tiny_backbone_is_reproducible():
    config = BackboneConfig(hidden=8, layers=1, heads=2, vocabulary=300)
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(make_tiny_backbone(WORDS, config)[0].state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("spare_rows", [0, 1, 5])
def test_a_backbone_learns_the_marks_it_lacks(tmp_path, kind, spare_rows):
    write_backbone(tmp_path, kind, spare_rows=spare_rows)
    backbone, tokenizer = load_backbone(tmp_path)
    before = len(tokenizer) - 2
    marks = tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
    assert marks == [before, before + 1]
    assert tokenizer.tokenize(f"tent{OPEN}lens").count(OPEN) == 1
    rows = max(before + 2, before + spare_rows)
    assert backbone.get_input_embeddings().num_embeddings == rows
    assert backbone.get_output_embeddings().out_features == rows
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_backbones_are_loaded_in_float32(tmp_path):
    write_backbone(tmp_path, "llama", torch.bfloat16)
    backbone, _ = load_backbone(tmp_path)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def without_norm(path):
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("config.json", lambda path: path.unlink(), "found no config.json"),
        ("config.json", lambda path: path.write_text("{"), "config.json"),
        ("model.safetensors", lambda path: path.unlink(), "no file named model.safetensors"),
        ("model.safetensors", lambda path: path.write_bytes(b"garbage" * 9), "header"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:3000]), "covered"),
        ("model.safetensors", without_norm, "found no model.norm.weight"),
        ("tokenizer.json", lambda path: path.unlink(), "tokenizer"),
    ],
)
def test_refuses_a_damaged_folder_in_one_line(tmp_path, name, damage, words):
    write_backbone(tmp_path, "llama")
    damage(tmp_path / name)
    with pytest.raises(ValueError) as caught:
        load_backbone(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: expected ") and "\n" not in message
    assert words in message, message


def test_refuses_a_tokenizer_that_cannot_end_a_text(tmp_path):
    write_backbone(tmp_path, "llama", eos=None)
    with pytest.raises(ValueError, match="end-of-text token"):
        load_backbone(tmp_path)


def logits(backbone, ids):
    with torch.no_grad():
        return backbone.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["tiny", "llama"])  # tied to the output layer, and not
def test_adapters_train_themselves_and_the_two_marks(tmp_path, kind):
    config = small_config("backbone.lora_rank=2")
    if kind != "tiny":
        write_backbone(tmp_path, kind)
        config.backbone.path = str(tmp_path)
    model, adapters = build(small_shop(), config, Recorder(), pretrain=False)
    torch.nn.init.normal_(model.item_vectors)
    model.collaborative.copy_(model.item_vectors)
    model.calibrate()
    prompts = Prompts(small_shop().items, model.text_tokenizer, 2, config.prompt)
    batch = prompts.training_batch([Window(history, 0) for history in small_shop().histories[:4]])
    table = model.backbone.get_input_embeddings().weight.detach().clone()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
    changed = {
        name for name, tensor in model.backbone.state_dict().items()
        if not torch.equal(tensor, before[name])
    }  # fmt: skip
    adapted = {name for name in before if "lora_" in name or "trainable_tokens_delta" in name}
    assert changed == adapted and len(changed) > 10
    after = model.backbone.get_input_embeddings().weight.detach()
    marks = model.text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
    assert (after != table).any(1).nonzero()[:, 0].tolist() == sorted(marks)

    ids = torch.randint(len(table), (2, 9))
    expected = logits(model.backbone, ids)
    merged = adapters.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name or "token_adapter" in name for name in merged.state_dict())


def test_a_model_trained_with_adapters_is_saved_without_them(tmp_path):
    model = trained_model("backbone.lora_rank=2", "training.epochs=1")
    start, _ = build(small_shop(), small_config(), Recorder(), pretrain=False)
    frozen, state = start.backbone.state_dict(), model.backbone.state_dict()
    assert type(model.backbone) is type(start.backbone) and state.keys() == frozen.keys()
    for name, tensor in state.items():
        linear = "_proj." in name
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = (tensor != frozen[name]).any(1).nonzero()[:, 0].tolist()
            assert rows == model.text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
        else:
            assert torch.equal(tensor, frozen[name]) != linear, name
    model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("adapter*"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "backbone")
    ids = torch.from_numpy(np.random.randint(400, size=(2, 9)))
    assert torch.equal(logits(plain, ids), logits(model.backbone, ids))
