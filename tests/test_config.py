"""The configuration file: round trips, defaults, and every refusal in one line."""

import dataclasses
import random

import pytest
import yaml

from contrec_fast.config import (
    NAMES,
    Config,
    apply_overrides,
    load_config,
    save_config,
    settings,
)
from contrec_fast.presets import PRESETS, demo_config, preset


def leaves(tree, prefix=()):
    """(path, value) of every setting of a configuration as nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def load(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path)


def refusal(tmp_path, text):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.yaml'}: ") and "\n" not in message, message
    return message


def every_setting_changed():
    """{dotted name: a legal value that is not the default}."""
    changed = {}
    for path, value in leaves(dataclasses.asdict(Config())):
        other = {bool: not value, int: 7, float: 1.25e-7, str: "ü: # no"}[type(value)]
        if path[-1] in NAMES:
            other = random.choice([name for name in NAMES[path[-1]] if name != value])
        assert other != value
        changed[".".join(path)] = other
    return changed


def get(config, name):
    for key in name.split("."):
        config = getattr(config, key)
    return config


def test_every_setting_can_be_overridden_and_survives_the_file(tmp_path):
    changed = every_setting_changed()
    assert settings() == list(changed)
    config = apply_overrides(
        Config(), [f"{key}={yaml.safe_dump(value)}" for key, value in changed.items()]
    )
    assert {key: get(config, key) for key in changed} == changed
    save_config(config, tmp_path / "all.yaml")
    assert load_config(tmp_path / "all.yaml") == config


@pytest.mark.parametrize("make", [*PRESETS.values(), demo_config])
def test_presets_survive_the_file_and_are_new_each_time(tmp_path, make):
    save_config(make(), tmp_path / "preset.yaml")
    assert load_config(tmp_path / "preset.yaml") == make()
    make().training.epochs += 1
    assert make() == load_config(tmp_path / "preset.yaml")


def test_presets_are_known_by_name():
    assert preset("default") == Config()
    assert len({str(make()) for make in PRESETS.values()}) == len(PRESETS)
    with pytest.raises(ValueError, match="preset: expected one of default, .*, got 'papr'$"):
        preset("papr")


def test_preset_then_file_then_overrides(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("head: {steps: 50}\ntraining: {epochs: 7}")
    base = preset("contrec")
    config = load_config(path, base)
    assert (config.head.steps, config.head.method, config.training.epochs) == (50, "ddpm", 7)
    assert base == preset("contrec")
    changed = apply_overrides(config, ["head.steps=4", "seed=2", "head.steps=9"])
    assert (changed.head.steps, changed.seed, changed.training.epochs) == (9, 2, 7)
    assert config == load_config(path, base)


@pytest.mark.parametrize(
    "override, words",
    [
        ("head.step=3", ["'head.steps', got 'head.step'"]),
        ("steps=3", ["'head.steps', got 'steps'"]),
        ("training.steps=3", ["'head.steps', got 'training.steps'"]),
        ("trainning.epochs=3", ["such as 'training.epochs', got"]),
        ("epochs=3", ["'lightgcn.epochs', 'tokenizer.epochs', 'training.epochs', got 'epochs'"]),
        ("lightgnc.dimm=3", ["'lightgcn.dim', got"]),
        ("head={steps: 3}", ["'head.space', 'head.source'", "got 'head'"]),
        ("head.steps.x=3", ["'head.steps', got 'head.steps.x'"]),
        ("sede=3", ["'seed', got 'sede'"]),
        ("=3", ["'seed', 'data'", "got ''"]),
        ("head.steps", ["KEY=VALUE such as head.steps=5, got 'head.steps'"]),
        ("head.steps=[1", ["head.steps: expected YAML"]),
        ("head.steps=", ["head.steps: expected int, got None"]),
    ],
)
def test_refuses_overrides(override, words):
    before = Config()
    with pytest.raises(ValueError) as caught:
        apply_overrides(before, ["seed=5", override])
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert before == Config()


@pytest.mark.parametrize(
    "override",
    ["head.steps=0", "head.steps=x", "training.dropout=1", "head.method=dmdp", "seed=-1",
     "head.bag=1", "training.learning_rate=.nan", "data.items=7"],
)  # fmt: skip
def test_a_value_is_checked_as_in_a_file(tmp_path, override):
    with pytest.raises(ValueError) as caught:
        apply_overrides(Config(), [override])
    key, value = override.split("=")
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    assert str(caught.value).startswith(f"{key}: expected ")
    assert refusal(tmp_path, value) == f"{tmp_path / 'config.yaml'}: {caught.value}"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_is_the_default(tmp_path, text):
    assert load(tmp_path, text) == Config()


def test_what_a_file_leaves_out_keeps_its_default(tmp_path):
    config = load(tmp_path, "training: {epochs: 3}\nhead:\n  steps: 2\n")
    expected = Config()
    expected.training.epochs, expected.head.steps = 3, 2
    assert config == expected


def test_whole_numbers_and_exponents_are_floats_too(tmp_path):
    config = load(tmp_path, "training: {learning_rate: 1e-3, weight_decay: 0, clip_norm: 2}")
    t = config.training
    assert (t.learning_rate, t.weight_decay, t.clip_norm) == (0.001, 0.0, 2.0)
    assert {type(v) for v in (t.learning_rate, t.weight_decay, t.clip_norm)} == {float}


def test_instances_share_nothing():
    first, second = Config(), Config()
    first.training.epochs += 1
    assert second.training.epochs == first.training.epochs - 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("trainning: {}", ["'training'", "'trainning'"]),
        (
            "training: {learning_rat: 1.0}",
            ["'training.learning_rate', got 'training.learning_rat'"],
        ),
        ("head: {stepz: 3}", ["'head.steps', got 'head.stepz'"]),
        ("3: 4", ["known setting", "'3'"]),
        ("steps: 4", ["'head.steps', got 'steps'"]),
        ("qqq: 1", ["'seed', 'data', 'lightgcn'", "'retrieval'", "'qqq'"]),  # nothing near
        ("training: {epochs: many}", ["training.epochs:", "int", "'many'"]),
        ("training: {epochs: 2.0}", ["training.epochs:", "int", "2.0"]),
        ("training: {epochs: true}", ["training.epochs:", "int", "True"]),
        ("training: {learning_rate: fast}", ["training.learning_rate:", "float", "'fast'"]),
        ("training: {learning_rate: true}", ["training.learning_rate:", "float", "True"]),
        ("head: {separable: 1}", ["head.separable:", "bool", "1"]),
        ("head: {schedule: null}", ["head.schedule:", "str", "None"]),
        ("head: {denoiser: mpl}", ["head.denoiser:", "linear, mlp, adaln", "'mpl'"]),
        ("head: {schedule: exq}", ["head.schedule:", "exp", "'exq'"]),
        ("head: {method: dmdp}", ["head.method:", "ddpm, ddim", "'dmdp'"]),
        ("training: 5", ["training", "mapping", "5"]),
        ("training:", ["training", "mapping", "None"]),
        ("- 1\n- 2", ["mapping", "[1, 2]"]),
        ("training: {epochs: [\n\n", ["YAML"]),
        ("a: b: c", ["YAML"]),
    ],
)
def test_refuses(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, words",
    [
        ("seed: -1", ["seed", "0", "-1"]),
        ("tokenizer: {tokens: 0}", ["tokenizer.tokens:", "1", "0"]),
        ("prompt: {history: 0}", ["prompt.history:", "1", "0"]),
        ("training: {batch_size: -3}", ["training.batch_size:", "1", "-3"]),
        ("training: {epochs: -1}", ["training.epochs:", "0", "-1"]),
        ("training: {learning_rate: -0.1}", ["training.learning_rate:", "0", "-0.1"]),
        ("training: {learning_rate: .nan}", ["training.learning_rate:", "nan"]),
        ("training: {learning_rate: .inf}", ["training.learning_rate:", "inf"]),
        ("training: {dropout: 1.0}", ["training.dropout:", "below 1", "1.0"]),
        ("training: {batch_size: 2147483648}", ["training.batch_size:", "at most 2147483647"]),
        ("seed: 9223372036854775808", ["seed:", "at most 9223372036854775807"]),
        (f"training: {{clip_norm: 1{'0' * 400}}}", ["training.clip_norm:", "float"]),
    ],
)
def test_refuses_numbers_out_of_range(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


def test_zero_is_legal_where_it_means_none(tmp_path):
    text = "training: {epochs: 0, warmup_steps: 0, dropout: 0.0}\nlightgcn: {epochs: 0, layers: 0}"
    config = load(tmp_path, text)
    assert (config.training.epochs, config.lightgcn.layers) == (0, 0)


def test_refuses_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ValueError, match="readable YAML file") as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00 not text")
    with pytest.raises(ValueError, match="config.yaml: expected UTF-8 text"):
        load_config(path)
    with pytest.raises(ValueError, match="readable YAML file"):
        load_config(tmp_path)


def test_a_long_file_that_is_no_mapping_is_shown_in_part(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n" + "a,b\n" * 1000)
    with pytest.raises(ValueError, match="expected a mapping, got 'user_id,item_id") as error:
        load_config(path)
    assert len(str(error.value)) < len(str(path)) + 100
