"""Released language models, merged: against peft, which made the adapters, and in plain numbers."""

import copy
import json
import struct

import pytest
import released_cases
import torch
from model_cases import write_backbone
from ops_cases import refused
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from contrec_fast.compat import load_released, load_released_backbone
from contrec_fast.compat.backbone import dequantize

RELEASED = ["up_proj", "down_proj", "gate_proj", "k_proj", "q_proj", "v_proj", "o_proj"]
LAYER = "model.base_model.model.model.layers.0.self_attn.q_proj"
# Quantiles of the standard normal distribution (QLoRA, arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    write_backbone(path, "llama")
    return path


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder, rank=4, rows=7, targets=RELEASED):
    """A base whose vocabulary grew, in peft, with adapters that do something."""
    base = load(folder)
    base.resize_token_embeddings(base.config.vocab_size + rows)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=32, target_modules=targets))
    released_cases.randomize_language_model(model)
    return model.eval()


def lightning(model, prefix="model."):
    """The state dict of a Lightning module around it, in memory of its own."""
    state = {f"{prefix}{key}": t.clone() for key, t in model.state_dict().items()}
    return state | {"diffusion_net.ln_1.bias": torch.ones(3)} if prefix else state


def assert_same(found, expected):
    tokens = torch.randint(expected.config.vocab_size, (2, 9))
    with torch.no_grad():
        # In float64, so that the weights alone make a difference.
        logits = [copy.deepcopy(model).double()(tokens).logits for model in (found, expected)]
    assert logits[0].abs().max() > 0.1
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_adapters_are_merged(folder, tmp_path, rank):
    model = adapted(folder, rank)
    torch.save({"state_dict": lightning(model), "epoch": 3}, tmp_path / "last.ckpt")
    found = load_released_backbone(tmp_path / "last.ckpt", folder)
    assert not found.training and not any("lora" in name for name in found.state_dict())
    assert_same(found, model)
    base = load(folder)
    assert load_released_backbone(lightning(model), base) is base
    assert_same(base, model)
    halved = load_released_backbone(lightning(model), folder, lora_alpha=16)
    with model.disable_adapter():
        before = model.base_model.model.model.layers[0].mlp.up_proj.weight
        for share, other in ((1, found), (0.5, halved)):
            update = other.model.layers[0].mlp.up_proj.weight - before
            layer = model.base_model.model.model.layers[0].mlp.up_proj
            expected = layer.get_delta_weight("default") * share
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_one_checkpoint_holds_the_language_model_and_the_rest(folder, tmp_path):
    model, rest = adapted(folder), released_cases.lightning(timesteps=9)
    state = {k: t for k, t in rest["state_dict"].items() if not k.startswith("model.")}
    state |= {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save(rest | {"state_dict": state}, tmp_path / "last.ckpt")
    assert_same(load_released_backbone(tmp_path / "last.ckpt", folder), model)
    found, expected = load_released(tmp_path / "last.ckpt"), load_released(rest)
    assert found.settings == expected.settings
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_other_names_of_the_same_model(folder, prefix):
    model = adapted(folder)
    assert_same(load_released_backbone(lightning(model, prefix), folder), model)
    plain = model.merge_and_unload()
    assert_same(load_released_backbone(lightning(plain, prefix), folder), plain)


def test_adapters_alone_stand_beside_the_bases_weights(folder, tmp_path):
    model = adapted(folder, rows=0, targets=["q_proj", "down_proj"])
    base = model.base_model.model
    original = load(folder).state_dict()
    for name, tensor in base.state_dict().items():  # those that peft saves nothing of
        if "lora" not in name:
            tensor.copy_(original[name.replace(".base_layer", "")])
    model.save_pretrained(tmp_path)
    assert_same(load_released_backbone(tmp_path / "adapter_model.safetensors", folder), model)


@pytest.mark.parametrize("given", ["both", "embeddings", "head"])
def test_tied_tables_may_come_once_or_twice(tmp_path, given):
    write_backbone(tmp_path, "gpt2")
    base = load(tmp_path)
    base.resize_token_embeddings(base.config.vocab_size + 3)
    state = lightning(base)
    left_out = {"embeddings": "model.lm_head.weight", "head": "model.transformer.wte.weight"}
    state.pop(left_out.get(given), None)
    assert_same(load_released_backbone(state, tmp_path), base)
    if given == "both":
        state["model.lm_head.weight"] = state["model.lm_head.weight"] + 1
        with refused(ValueError, "source"):
            load_released_backbone(state, tmp_path)


def quantized(weight, block=64, outer=4, nested=True, dtype="float16"):
    """bitsandbytes' tensors of a weight (random codes), and its values in plain numbers."""
    count = weight.numel()
    codes = torch.randint(16, (count + count % 2,)).tolist()
    blocks = -(-count // block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
    packed = [16 * high + low for high, low in zip(codes[::2], codes[1::2])]
    parts = {"quant_map": torch.tensor(NF4)}
    if nested:
        levels, table = torch.randint(256, (blocks,)), torch.rand(256)
        scales, offset = torch.rand(-(-blocks // outer)), 0.37
        state |= {"nested_blocksize": outer, "nested_offset": offset, "nested_dtype": "float32"}
        parts |= {"absmax": levels.byte(), "nested_absmax": scales, "nested_quant_map": table}
        scale = [
            float(table[level] * scales[i // outer]) + offset for i, level in enumerate(levels)
        ]
    else:
        parts["absmax"] = torch.rand(blocks)
        scale = parts["absmax"].tolist()
    blob = json.dumps(state).encode()
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(
        struct.unpack(f"{len(blob)}B", blob)
    ).byte()
    values = [NF4[codes[i]] * scale[i // block] for i in range(count)]
    return torch.tensor(packed).byte()[:, None], parts, torch.tensor(values).reshape(weight.shape)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (16, 32), (127, 5)])
def test_weights_of_four_bits(shape, nested):
    packed, parts, expected = quantized(torch.empty(shape), nested=nested)
    found = dequantize(packed, parts)
    assert found.dtype == torch.float16 and found.shape == shape
    torch.testing.assert_close(found.float(), expected, rtol=2**-10, atol=2**-24)


def test_adapters_beside_weights_of_four_bits(folder):
    model = adapted(folder)
    state = lightning(model)
    for key in [key for key in state if key.endswith("base_layer.weight")]:
        packed, parts, values = quantized(state[key], dtype="float32")
        model.state_dict()[key.removeprefix("model.")].copy_(values)
        state |= {key: packed} | {f"{key}.{name}": part for name, part in parts.items()}
    assert_same(load_released_backbone(state, folder), model)
    for part in ("absmax", "nested_quant_map", "quant_map"):
        broken = {k: t for k, t in state.items() if k != f"{LAYER}.base_layer.weight.{part}"}
        with pytest.raises(ValueError, match=f"wrong: {LAYER}.weight: expected a weight of four"):
            load_released_backbone(broken, folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({f"{LAYER}.base_layer.weight": None}, f"missing: {LAYER}.weight"),
        ({f"{LAYER}.lora_A.default.weight": None}, f"missing: {LAYER}.lora_A.default"),
        (
            {
                "x.y": torch.ones(1),
                "model.z": torch.ones(1),
                f"{LAYER}.lora_B.default.weight": None,
            },
            f"missing: {LAYER}.lora_B.default.weight; unexpected: model.z, x.y",
        ),
        (
            {f"{LAYER}.lora_magnitude_vector.default.weight": torch.ones(16)},
            "unexpected",
        ),
        (
            {f"{LAYER}.lora_B.default.weight": torch.ones(16, 9)},
            "shape [16, 4], got [16",
        ),
        (
            {f"{LAYER}.lora_A.default.weight": torch.ones(4, 9)},
            "shape [rank, 16], got [4",
        ),
        (
            {f"{LAYER}.base_layer.weight": torch.ones(9, 9)},
            "q_proj.weight: expected sh",
        ),
        ({f"{LAYER}.base_layer.weight": torch.ones(16, 16).byte()}, "got uint8"),
        ({f"{LAYER}.base_layer.weight": "x"}, "expected a tensor, got str"),
        (
            {"model.base_model.model.lm_head.weight": torch.ones(3, 16)},
            "lm_head.weight: exp",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(folder, changes, message):
    state = lightning(adapted(folder)) | changes
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    base, before = load(folder), load(folder).state_dict()
    with pytest.raises(ValueError) as caught:
        load_released_backbone(state, base)
    line = str(caught.value)
    assert line.startswith("source: ") and "\n" not in line
    assert message in line
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_other_arguments_are_refused_in_one_line(folder, tmp_path):
    model = adapted(folder)
    with refused(ValueError, tmp_path):
        load_released_backbone(lightning(model), tmp_path)
    with refused(TypeError, "base"):
        load_released_backbone(lightning(model), 3)
    with refused(ValueError, "source"):
        load_released_backbone({"diffusion_net.ln_1.bias": torch.ones(3)}, folder)
    with refused(TypeError, "source"):
        load_released_backbone(3, folder)
    many = lightning(model) | {f"model.x{i}": torch.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match="model.x0, .* and 6 more$"):
        load_released_backbone(many, folder)
    write_backbone(tmp_path, "gpt2")
    other = lightning(get_peft_model(load(tmp_path), LoraConfig(target_modules=["c_attn"])))
    with pytest.raises(ValueError, match="c_attn: expected no adapter but of linear layers"):
        load_released_backbone(other, tmp_path)
