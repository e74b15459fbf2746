"""Released checkpoints in our modules, against the released arithmetic restated step by step."""

import math
import os
import random
from argparse import Namespace

import pytest
import torch
from ops_cases import refused, relative_error
from released_cases import (
    FLOAT,
    diffusion_state,
    lightning,
    linear,
    naive_condition,
    naive_perceptron,
    naive_sample,
    part,
    tokenizer_state,
)
from safetensors.torch import save_file
from torch import nn

from contrec_fast.compat import fold_batch_norms, load_released, load_released_tokenizer
from contrec_fast.models import LinearDenoiser, MLPDenoiser
from contrec_fast.names import MAX_STEPS

BAD = "item_encoder.encoders.0.5.running_var"
NULL = "diffusion_net.none_embedding.weight"


def refusal(error, source, start="source"):
    """The one line with which `source` is refused, which has to begin with `start`."""
    with pytest.raises(error) as caught:
        load_released(source)
    line = str(caught.value)
    assert line.startswith(f"{start}: ") and "\n" not in line, line
    return line


@pytest.mark.parametrize("two_layers", [False, True])
@pytest.mark.parametrize("users, dim", [(1, 4), (3, 6), (2, 34)])
def test_the_plan_follows_the_released_sampler(two_layers, users, dim):
    state = diffusion_state(dim, two_layers=two_layers)
    released = load_released(state)
    assert type(released.denoiser) is (MLPDenoiser if two_layers else LinearDenoiser)
    condition, noise = torch.randn(users, dim).double(), torch.randn(200, users, dim).double()
    found = released.plan()(condition, noise=noise)
    for user in range(users):
        expected = naive_sample(state, condition[user], noise[:, user])
        assert relative_error(found[user], expected) < 1e-9
    expected = naive_sample(state, condition[0], noise[:7, 0], guidance=0.5)
    plan = released.plan(timesteps=7, guidance=0.5)
    assert relative_error(plan(condition, noise=noise[:7])[0], expected) < 1e-9


@pytest.mark.parametrize("dim, positions", [(4, 1), (6, 3), (34, 9)])
@pytest.mark.parametrize("idle_query", [False, True])
def test_the_condition_encoder_is_the_released_one(dim, positions, idle_query):
    state = diffusion_state(dim, positions)
    # Whole numbers, of which sums are exact in any order.
    state["positional_embeddings.weight"] = embeddings = torch.randint(9, (positions, dim)).double()
    if idle_query:  # its sum is zero
        state["ln_1.weight"] = torch.zeros(dim, dtype=FLOAT)
        state["ln_1.bias"] = torch.tensor([3.0, -3.0], dtype=FLOAT).repeat(dim // 2)
    x = torch.randint(-5, 9, (5, positions, dim)).double()
    x[..., -1] = 1 - x[..., :-1].sum(-1)
    masked = torch.rand(5, positions) < 0.5
    masked[0], masked[1], masked[2, -1], masked[3, 0] = False, True, True, True
    x[..., -1] -= masked.double()
    x[3, 0] = 0
    encoder = load_released(state).condition_encoder
    found = encoder(x - embeddings)
    assert found.shape == (5, dim)
    for user in range(5):
        expected = naive_condition(state, x[user] - embeddings)
        assert relative_error(found[user], expected) < 1e-10
    assert encoder(x[:0]).shape == (0, dim)
    with refused(ValueError, "states"):
        encoder(torch.zeros(2, positions + 1, dim, dtype=FLOAT))
    with refused(TypeError, "states"):
        encoder(x.float())


@pytest.mark.parametrize("position, noise", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dim, hidden, ways", [(1, 3, 1), (6, 33, 2), (7, 16, 3)])
def test_tokenizers_encode_and_decode_as_released(position, noise, dim, hidden, ways):
    state = tokenizer_state(dim, hidden, ways, position)
    with torch.random.fork_rng([]):
        torch.manual_seed(42)
        constant = torch.randn(1, hidden)[0].double()
        constant = constant * torch.normal(0, 0.1, size=(1,)) * (position and noise)
    tolerance = 1e-6 if position and noise else 1e-12  # the constant is drawn in float32
    tokenizer = load_released_tokenizer(state, constant_noise=noise)
    x = torch.randn(3, dim).double()
    tokens = tokenizer.encode(x)
    assert tokens.shape == (3, ways, hidden)
    decoded = tokenizer.decode(tokens)
    for row in range(3):
        codes = [naive_perceptron(state, f"encoders.{k}", x[row]) + constant for k in range(ways)]
        assert relative_error(tokens[row], torch.stack(codes)) < tolerance
        mean = sum(codes) / ways
        assert relative_error(decoded[row], naive_perceptron(state, "decoder", mean)) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("count, dim, ways", [(0, 6, 2), (1, 1, 1), (129, 7, 3)])
def test_folded_tokenizers_are_the_same_in_eval_mode(count, dim, ways, dtype, tolerance):
    tokenizer = load_released_tokenizer(tokenizer_state(dim, 33, ways, dtype=dtype))
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    folded = fold_batch_norms(tokenizer.train())
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.Dropout)) for m in folded.modules())
    tokenizer.eval()
    x, tokens = torch.randn(count, dim, dtype=dtype), torch.randn(count, ways, 33, dtype=dtype)
    for found, expected in (
        (folded.encode(x), tokenizer.encode(x)),
        (folded.decode(tokens), tokenizer.decode(tokens)),
    ):
        assert found.shape == expected.shape and found.dtype == dtype
        assert (found - expected).norm() <= tolerance * (1 + expected.norm())
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.fill_(torch.nan)
    for name, tensor in tokenizer.state_dict().items():  # a copy was folded
        assert torch.equal(tensor, before[name])


def test_a_lightning_checkpoint_holds_everything():
    checkpoint = lightning(timesteps=9, w=1, beta_sche="exp", lr=1e-5)
    released = load_released(checkpoint)
    assert released.settings | {"timesteps": 9, "guidance": 1} == released.settings
    embeddings, noise = torch.randn(2, 7, 5).double(), torch.randn(9, 2, 6).double()
    states = released.output_decoder(embeddings)
    condition = released.condition_encoder(states)
    found = released.plan()(condition, noise=noise)
    state, decoder = part(checkpoint, "diffusion_net"), part(checkpoint, "output_decoder")
    for user in range(2):
        rows = [linear(decoder, "dim_block.2", e.clamp(min=0)) for e in embeddings[user]]
        columns = torch.stack(rows).clamp(min=0).T  # [D, L]
        columns = [linear(decoder, "length_block.0.layers.2", c.clamp(min=0)) + c for c in columns]
        columns = [linear(decoder, "length_block.3", c.clamp(min=0)).clamp(min=0) for c in columns]
        expected = torch.stack(columns).T
        assert relative_error(states[user], expected) < 1e-10
        expected = naive_condition(state, expected)
        assert relative_error(condition[user], expected) < 1e-10
        expected = naive_sample(state, expected, noise[:, user], guidance=1)
        assert relative_error(found[user], expected) < 1e-9
    x = torch.randn(3, 6).double()
    for name in ("item", "user"):
        alone = load_released_tokenizer(part(checkpoint, f"{name}_encoder"))
        tokenizer = getattr(released, f"{name}_tokenizer")
        torch.testing.assert_close(tokenizer.encode(x), alone.encode(x), rtol=0, atol=0)
        assert not tokenizer.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])
def test_files_give_what_the_state_dict_gives(suffix, dtype, tmp_path):
    checkpoint = lightning(dtype=dtype)
    state = checkpoint["state_dict"]
    path = tmp_path / f"released{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(checkpoint if suffix == ".ckpt" else state, path)
    random = torch.get_rng_state()
    released, expected = load_released(str(path)), load_released(state)
    assert torch.equal(torch.get_rng_state(), random)
    path.unlink()
    for tensor in state.values():
        tensor.zero_()  # copies were taken
    found = released.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert tensor.dtype in (dtype, torch.int64)
    assert expected.denoiser.null_condition.any() and expected.denoiser.output.weight.any()
    torch.save(tokenizer_state(dtype=dtype), tmp_path / "items.pth")
    assert load_released_tokenizer(tmp_path / "items.pth").position.dtype == dtype


def test_tokenizers_of_the_first_version_are_left_out():
    checkpoint = lightning()
    state = checkpoint["state_dict"]
    for key in [key for key in state if key.startswith("item_encoder.encoders.")]:
        state[key.replace("encoders.", "blocks.")] = state.pop(key)
    for key in [key for key in state if key.startswith("item_encoder.decoder.")]:
        del state[key]
    released = load_released(state)
    assert released.item_tokenizer is None and released.user_tokenizer is not None


class Code:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped, tmp_path):
    path, trace = tmp_path / "code.pt", tmp_path / "trace"
    content = diffusion_state() | {"x": Code(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert refusal(ValueError, path, path).endswith("(torch.load, weights_only), got posix.mkdir")
    assert not trace.exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.pt", b"", "expected tensors and plain values"),
        ("x.ckpt", b"PK\x03\x04 and so on", "expected tensors and plain values"),
        ("x.safetensors", b"{}", "expected a safetensors file"),
        ("x.bin", b"", "expected .pt, .pth, .ckpt or .safetensors, got '.bin'"),
        ("x.pt", None, "expected a file, got nothing"),
        ("x.pt", [1, 2], "expected a state dict, got list"),
        ("x.pt", {}, "expected the released keys; missing: diffuser.0.bias, diffuser.0.weight, "),
        ("x.pt", {1: 2}, " and 2 more; unexpected: 1"),
    ],
)
def test_bad_files_are_refused_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert message in refusal(ValueError, path, path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("diffusion_net.ln_2.bias", None, "missing: diffusion_net.ln_2.bias"),
        (NULL, None, f"missing: {NULL}"),
        (BAD, None, f"missing: {BAD}"),
        ("diffusion_net.x", torch.zeros(1), "unexpected: diffusion_net.x"),
        ("other.x", torch.zeros(1), "unexpected: other.x"),
        (BAD, torch.zeros(3).double(), f"wrong: {BAD}: expected shape [256], got [3]"),
        ("diffusion_net.ln_2.bias", torch.zeros(6), "bias: expected dtype float64, got float32"),
        ("diffusion_net.ln_2.bias", 3, "diffusion_net.ln_2.bias: expected a tensor, got int"),
        (NULL, torch.zeros(6).double(), "shape [1, 6], got [6]"),
        (NULL, torch.zeros(1, 7).double(), "[1, 6], got [1, 7]"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_in_one_line(key, value, message):
    state = lightning()["state_dict"] | {key: value}
    if value is None:
        del state[key]
    line = refusal(ValueError, state)
    assert line.startswith("source: expected the released keys; ") and line.endswith(message)


def test_one_error_names_all_keys_that_do_not_fit():
    state = lightning()["state_dict"]
    missing = sorted(random.sample([k for k in state if not k.startswith("model.")], 9))
    state = {key: tensor for key, tensor in state.items() if key not in missing}
    wrong = sorted(random.sample([k for k in state if k.endswith("bias") and "_mlp" not in k], 3))
    state |= {key: torch.zeros(77).double() for key in wrong}
    state |= {f"diffusion_net.x{i}": torch.zeros(1) for i in range(30)}
    line = refusal(ValueError, state)
    found = dict(part.split(": ", 1) for part in line.split("; ")[1:])
    unused = ("diffusion_net.emb_mlp", "diffusion_net.diff_mlp")
    assert found["missing"].split(", ") == [k for k in missing if not k.startswith(unused)]
    assert found["unexpected"].endswith("diffusion_net.x3 and 6 more")
    positions = [found["wrong"].index(f"{key}: expected shape [") for key in wrong]
    assert positions == sorted(positions) and found["wrong"].count("expected") == 3


def test_other_architectures_are_refused_in_one_line():
    state = diffusion_state()
    line = refusal(ValueError, state | {"c_remap.2.weight": torch.zeros(1)})
    assert line.endswith("expected ContRec's diffusion network, got DeftRec's")
    assert "expected an even width of at least 4" in refusal(ValueError, diffusion_state(dim=7))


def test_other_arguments_are_refused_in_one_line():
    assert refusal(TypeError, 3).endswith("expected a path or a state dict, got int")
    line = refusal(ValueError, lightning(beta_sche="linear"))
    assert line.endswith("hyper_parameters: beta_sche: expected exp or sqrt, got 'linear'")
    with refused(ValueError, "source"):
        load_released_tokenizer(diffusion_state())


@pytest.mark.parametrize("value", [Namespace(w=1), 0, 7, [], ["w"], "w", True])
def test_hyper_parameters_are_a_mapping(value):
    line = refusal(TypeError, lightning() | {"hyper_parameters": value})
    assert line.endswith(f"hyper_parameters: expected a mapping, got {type(value).__name__}")
    without = load_released(lightning() | {"hyper_parameters": None})
    assert without.settings == load_released(lightning()).settings


@pytest.mark.parametrize(
    "key, values, expected",
    [
        ("w", ("2", None, math.nan, [2]), "a finite number"),
        ("timesteps", (None, "9", 9.0, 0, MAX_STEPS), f"1 to {MAX_STEPS - 1}"),
        ("beta_sche", ("cosine", None, ["exp"]), "exp or sqrt"),
    ],
)
def test_hyper_parameters_are_refused_with_file_and_key(tmp_path, key, values, expected):
    path = tmp_path / "x.ckpt"
    for value in values:
        torch.save(lightning(**{key: value}), path)
        line = refusal(ValueError, path, path)
        assert line.endswith(f": hyper_parameters: {key}: expected {expected}, got {value!r}")
