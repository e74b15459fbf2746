"""Attention over runs: what it computes is what the blocks do.

torch's kernel runs on GPUs only. Elsewhere a stand-in takes its place that does what the
documentation of `torch.nn.attention.varlen.varlen_attn` says, and checks what it is given.
"""

import copy

import numpy as np
import pytest
import torch
from model_cases import backbone_of, prompts_of, random_history, random_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import MistralConfig, MistralForCausalLM

from contrec_fast.engine import varlen
from contrec_fast.engine.reader import Reader


def plain(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
          window_size=(-1, -1), enable_gqa=False, from_the_end=True):  # fmt: skip
    """Each query sees the keys of its sequence up to its own place, counted from the end."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and len(key) == len(value)
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_q, max_k)
    assert enable_gqa or query.shape[1] == key.shape[1]
    found = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys)):
        mask = torch.ones(len(q), len(k), dtype=torch.bool)
        mask = mask.tril(len(k) - len(q) if from_the_end else 0)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        found.append(
            scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
        )
    return torch.cat(found, dim=1).transpose(0, 1)


def from_the_start(*args, **options):
    """Right for whole sequences, wrong for those that go on from what the cache holds."""
    return plain(*args, **options, from_the_end=False)


def of_another_release(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    raise AssertionError("not reached: other arguments")


def grouped(model):
    model = copy.deepcopy(model)
    model.backbone = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(model.text_tokenizer), hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=None,
        )
    ).eval()  # fmt: skip
    return model


@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2", "grouped"])
def test_runs_give_what_blocks_do(kind, monkeypatch):
    """Prompts, decoding with drafts, and users who come back."""
    overrides = ["prompt.history=5", "prompt.user_token=true", "prompt.response_tokens=17"]
    model = random_model(*overrides, *([] if kind == "grouped" else [backbone_of(kind)]))
    model = grouped(model) if kind == "grouped" else model
    blocks = Reader(model, prompts_of(model), remembered=2**24)
    monkeypatch.setattr(varlen, "wanted", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "varlen_attn", plain)
    runs = Reader(model, prompts_of(model), remembered=2**24)
    assert blocks.packed.cache.attention != runs.packed.cache.attention == "runs"
    assert runs.packed.narrows == blocks.packed.narrows == (kind != "gpt2")
    histories = [random_history(length) for length in [1, 12, 4, *np.random.randint(1, 9, 30)]]
    for _ in range(3):
        expected, texts = blocks.write(histories, range(33))
        found, written = runs.write(histories, range(33))
        assert written == texts
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(runs.read(histories), expected, rtol=1e-4, atol=1e-5)
        histories = [np.append(history, random_history(1)) for history in histories]
    assert runs.counters["saved"] == blocks.counters["saved"] > 0


@pytest.mark.parametrize("kernel", [from_the_start, of_another_release])
def test_a_kernel_that_does_something_else_is_not_used(kernel, monkeypatch):
    monkeypatch.setattr(varlen, "wanted", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    model = random_model()
    reader = Reader(model, prompts_of(model))
    assert reader.packed.suits and reader.packed.narrows
    assert reader.packed.cache.attention != "runs"


@pytest.mark.parametrize("count", [1, 3, 127])
def test_runs_are_consecutive_positions_of_a_sequence(count):
    rows = np.sort(np.random.randint(1 + count // 3, size=count))
    positions = np.random.randint(1, 3, count).cumsum() % 40
    for row in np.unique(rows):
        positions[rows == row] = np.sort(np.random.permutation(200)[: (rows == row).sum()])
    runs = varlen.Runs.of(rows, positions, "cpu")
    queries, keys = runs.queries.tolist(), runs.keys.tolist()
    assert (queries[0], queries[-1], keys[0], keys[-1]) == (0, count, 0, len(runs.places))
    assert runs.longest == (max(np.diff(queries)), max(np.diff(keys)))
    for i in range(len(queries) - 1):
        begin, end = queries[i], queries[i + 1]
        assert len(set(rows[begin:end])) == 1
        assert (np.diff(positions[begin:end]) == 1).all()
        if end < count:  # it is as long as it can be
            assert rows[end] != rows[begin] or positions[end] != positions[end - 1] + 1
        seen = slice(keys[i], keys[i + 1])
        assert (runs.rows[seen] == rows[begin]).all()
        assert runs.places[seen].tolist() == list(range(positions[end - 1] + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_agrees_with_blocks(dtype, monkeypatch):
    model = copy.deepcopy(random_model("prompt.history=5")).to("cuda")
    runs = Reader(model, prompts_of(model), dtype, remembered=2**24)
    monkeypatch.setattr(varlen, "wanted", lambda device, dtype: False)
    blocks = Reader(model, prompts_of(model), dtype, remembered=2**24)
    assert blocks.packed.cache.attention != runs.packed.cache.attention == "runs"
    histories = [random_history(length) for length in [2, 12, 4, *np.random.randint(2, 9, 60)]]
    batch = runs.prompts.inference_batch(histories, runs.windows(histories))
    exact, error = model.read(batch.to("cuda")), []
    for reader in (runs, blocks):
        reader.write([history[:-1] for history in histories], range(63))
        error.append((reader.write(histories, range(63))[0] - exact).norm())
        assert reader.counters["hits"] > 30
    assert error[0] < 2 * error[1] + 1e-3 * exact.norm()
