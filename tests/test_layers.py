"""Decoder layers in C++: their kernels against PyTorch in float64, and which models they serve."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import backbone_of, prompts_of, random_history, random_model
from ops_cases import needs_extension, refused, relative_error
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from contrec_fast import native_layers
from contrec_fast.engine.layers import Layers
from contrec_fast.engine.packed import PackedModel, Packing
from contrec_fast.engine.reader import Reader

SETS = native_layers.layer_instruction_sets()
EPS = 1e-6
pytestmark = needs_extension


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def turned(x, cosines, sines):
    low, high = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-high, low], dim=-1) * sines


def poisoned(*shape):
    return torch.full(shape, torch.nan)


def near(found, expected):
    assert found.shape == expected.shape
    if expected.numel():
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tokens, width", [(0, 3), (1, 1), (3, 127), (129, 64), (127, 1030)])
def test_norm_and_gate(isa, tokens, width, threads):
    x, added, up = torch.randn(3, tokens, width)
    weight = torch.randn(width)
    out, total = poisoned(tokens, width), x + added
    expected = rms(total.double(), weight.double())
    assert native_layers.layer_norm(x, added, weight, EPS, out, isa) is out
    near(out, expected)
    assert torch.equal(x, total)
    near(native_layers.layer_norm(x, None, weight, EPS, poisoned(tokens, width), isa), expected)
    x[:, :1] *= 1e4  # beyond what exp holds
    expected = F.silu(x.double()) * up.double()
    found = native_layers.layer_gate(x, up, isa).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def packed_case(counts, heads, key_heads, dim, reach):
    """Packed queries, and a cache that holds no number behind a sequence's last place."""
    counts = torch.tensor(counts)
    rows = torch.randperm(len(counts) + 2)[: len(counts)].repeat_interleave(counts)
    positions = torch.cat([torch.randperm(reach)[:count].sort().values for count in counts])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    stored = torch.randn(2, len(counts) + 2, key_heads, reach, dim).unbind()
    for row in range(len(counts) + 2):
        own = positions[rows == row]
        for part in stored:
            part[row, :, int(own.max()) + 1 if len(own) else 0 :] = torch.nan
    return torch.randn(len(rows), heads * dim), stored, positions, rows, starts


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    "counts, heads, key_heads, dim, reach",
    [
        ([1], 1, 1, 2, 1),
        ([0, 3, 0, 1], 2, 2, 32, 3),
        ([5, 127, 1, 13], 4, 2, 12, 129),
        ([33, 2], 3, 1, 80, 65),
        ([12, 12], 2, 2, 128, 16),
    ],
)
def test_attention(isa, counts, heads, key_heads, dim, reach, threads):
    queries, stored, positions, rows, starts = packed_case(counts, heads, key_heads, dim, reach)
    scale = dim**-0.5
    found = native_layers.layer_attention(queries, stored, positions, rows, starts, scale, isa)
    expected = []
    for query, position, row in zip(queries.double().unflatten(1, (heads, dim)), positions, rows):
        keys, values = (
            x[row, :, : position + 1].double().repeat_interleave(heads // key_heads, 0)
            for x in stored
        )
        weights = torch.softmax(scale * keys @ query[:, :, None], dim=1)
        expected.append((weights * values).sum(1).flatten())
    near(found, torch.stack(expected))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "tokens, heads, key_heads, dim", [(1, 1, 1, 2), (129, 4, 2, 32), (3, 3, 3, 20)]
)
def test_rotary(isa, normed, tokens, heads, key_heads, dim, threads):
    places, count = 131, 5
    queries, keys = torch.randn(tokens, heads * dim), torch.randn(tokens, key_heads * dim)
    values, turns = torch.randn(tokens, key_heads * dim), torch.randn(2, places, dim).unbind()
    norms = torch.randn(2, dim).unbind() if normed else (None, None)
    slots = torch.randperm(places * count)[:tokens]
    rows, positions = slots // places, slots % places
    stored = poisoned(2, count, key_heads, places, dim).unbind()
    expected = []
    for x, norm in zip((queries, keys), norms):
        x = x.double().unflatten(1, (-1, dim))
        x = x if norm is None else rms(x, norm.double())
        expected.append(turned(x, *(turn[positions, None].double() for turn in turns)))
    gaps = torch.stack([positions, rows], dim=1)
    where = turns, gaps[:, 0], gaps[:, 1], stored
    native_layers.layer_rotary(None, keys, values, norms, EPS, *where, isa)
    before = [part.clone() for part in stored]
    native_layers.layer_rotary(queries, None, None, norms, EPS, *where, isa)
    for part, old in zip(stored, before):
        assert torch.equal(part.isnan(), old.isnan())
        assert int((~part.isnan()).sum()) == tokens * key_heads * dim
    near(queries, expected[0].flatten(1))
    near(stored[0][rows, :, positions], expected[1])
    assert torch.equal(stored[1][rows, :, positions], values.unflatten(1, (-1, dim)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("words", [1, 31, 32, 33, 300])
def test_choice_is_the_first_of_the_largest(isa, words, threads):
    for tokens, width in ((0, 5), (1, 64), (127, 5), (1030, 17)):
        hidden = torch.randint(-2, 3, (tokens, width)).float()
        weight = torch.randint(-2, 3, (words, width)).float()  # many ties, and exact
        found = native_layers.choose_tokens(hidden, weight, isa)
        assert torch.equal(found, (hidden @ weight.T).argmax(1))
        found = native_layers.choose_tokens(hidden, -weight.abs(), isa)
        assert torch.equal(found, (hidden @ -weight.abs().T).argmax(1))


SIZES = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, use_sliding_window=False,
    sliding_window=None, tie_word_embeddings=True,
)  # fmt: skip
SERVED = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama with biases": (
        LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True},
    ),
    "llama 3's positions": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
    }}),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}  # fmt: skip
NOT_SERVED = {
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
    "gelu": (LlamaForCausalLM, LlamaConfig, {"hidden_act": "gelu"}),
}


def lm_of(kind, **changes):
    model, config, own = (SERVED | NOT_SERVED)[kind]
    model = model(config(**SIZES | own | changes)).eval()
    for parameter in model.parameters():  # biases are zero, norms are one
        torch.nn.init.normal_(parameter, mean=parameter.detach().mean(), std=0.3)
    return model


@pytest.mark.parametrize("kind", [*SERVED, *NOT_SERVED])
@torch.inference_mode()
def test_layers_are_those_of_the_model(kind):
    model = lm_of(kind)
    packed = PackedModel(model)
    assert packed.suits and (packed.layers is not None) == (kind in SERVED), packed.compiled
    assert packed.compiled.startswith("layers: " + ("C++" if kind in SERVED else "transformers"))
    counts = [1, 3, 29, 127]
    x = torch.randn(sum(counts), 24)
    expected = torch.cat([
        model.base_model(inputs_embeds=part[None]).last_hidden_state[0] for part in x.split(counts)
    ])  # fmt: skip
    packed.cache.reserve(len(counts), max(counts))
    positions = torch.cat([torch.arange(count) for count in counts])
    given = x.clone()
    whole = Packing.of(torch.tensor(counts), positions, packed.cache)
    torch.testing.assert_close(packed(x, whole), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, given)
    # All but the last token of each; then that one, and only every second state is wanted.
    behind = torch.tensor(counts).cumsum(0) - 1
    first = torch.ones(len(x), dtype=torch.bool).index_fill_(0, behind, False)
    part = Packing.of(torch.tensor(counts) - 1, positions[first], packed.cache)
    torch.testing.assert_close(packed(x[first], part), expected[first], rtol=1e-4, atol=1e-4)
    part = Packing.of(torch.ones(4, dtype=torch.int64), positions[behind], packed.cache)
    kept = Packing.of(torch.tensor([0, 1, 0, 1]), positions[behind[1::2]], packed.cache)
    found = packed(x[behind], part, torch.tensor([1, 3]), kept)
    torch.testing.assert_close(found, expected[behind[1::2]], rtol=1e-4, atol=1e-4)


def test_layers_of_other_widths_are_refused():
    model = lm_of("llama")
    packed = PackedModel(model)
    packed.cache.reserve(1, 3)
    turn = packed.layers.rotary
    packed.layers.rotary = lambda *positions: [part[..., :4] for part in turn(*positions)]
    with refused(ValueError, "rotary"):
        packed(torch.randn(3, 24), Packing.of(torch.tensor([3]), torch.arange(3), packed.cache))
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(24, 8)
    assert isinstance(Layers.of(model.base_model), str)


def test_places_beyond_the_cache_are_refused():
    packed = PackedModel(lm_of("llama"))
    packed.cache.reserve(3, 6)
    for rows, places in ((3, 7), (4, 6)):
        counts, positions = torch.ones(rows, dtype=torch.int64), torch.full((rows,), places - 1)
        with refused(IndexError, "packing"):
            packed(torch.randn(rows, 24), Packing.of(counts, positions, packed.cache))


@torch.inference_mode()
def test_autocast_does_not_reach_the_kernels():
    packed = PackedModel(lm_of("llama"))
    packed.cache.reserve(1, 29)
    x, packing = torch.randn(29, 24), Packing.of(torch.tensor([29]), torch.arange(29), packed.cache)
    expected = packed(x, packing)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x, packing), expected)


def test_what_looks_like_llama_but_is_not_is_left_alone():
    model = lm_of("llama")
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, *args, **options: 1.5 * forward(x, *args, **options)
    packed = PackedModel(model)
    assert packed.suits and packed.layers is None and "something else" in packed.compiled


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda model: model.bfloat16(), "bfloat16"),
        (lambda model: model.model.layers[2].input_layernorm.bfloat16(), "bfloat16"),
        (lambda model: setattr(model.model.layers[2].mlp, "act_fn", torch.nn.Tanh()), "Llama"),
    ],
)
def test_the_reason_is_told(change, reason):
    model = lm_of("llama")
    change(model)
    packed = PackedModel(model)
    assert packed.suits and packed.layers is None and reason in packed.compiled


@pytest.mark.parametrize("kind", ["tiny", "llama"])
def test_without_them_transformers_own_layers_read_the_same(kind, monkeypatch):
    model = random_model("prompt.response_tokens=17", backbone_of(kind))
    histories = [random_history(length) for length in (1, 20, 3, 7, 19, 26)]
    with monkeypatch.context() as without:
        without.setattr(Layers, "of", classmethod(lambda cls, base: "none are wanted"))
        plain = Reader(model, prompts_of(model))
    assert plain.packed.compiled == "layers: transformers' own (none are wanted)"
    reader = Reader(model, prompts_of(model))
    assert reader.packed.layers is not None and plain.packed.layers is None
    conditions, texts = plain.write(histories)
    found, written = reader.write(histories)
    assert written == texts
    torch.testing.assert_close(found, conditions, rtol=1e-4, atol=1e-5)
