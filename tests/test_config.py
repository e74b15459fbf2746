"""The configuration file: round trips, defaults, and every refusal in one line."""

import dataclasses

import pytest

from contrec_fast.config import NAMES, Config, demo_config, load_config, save_config


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


def test_round_trip_of_every_setting(tmp_path):
    config = Config()
    tree = dataclasses.asdict(config)
    for path, value in leaves(tree):
        part = config
        for key in path[:-1]:
            part = getattr(part, key)
        other = {bool: True, int: 7, float: 1.25e-7, str: "ü: # no"}[type(value)]
        other = NAMES[path[-1]][0] if path[-1] in NAMES else other
        assert other != value or path[-1] == "schedule"  # of which there is one
        setattr(part, path[-1], other)
    save_config(config, tmp_path / "all.yaml")
    assert load_config(tmp_path / "all.yaml") == config
    assert config != Config()


def test_demo_and_default_configurations_survive_the_file(tmp_path):
    for number, config in enumerate((Config(), demo_config())):
        save_config(config, tmp_path / f"{number}.yaml")
        assert load_config(tmp_path / f"{number}.yaml") == config


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
        ("training: {learning_rat: 1.0}", ["training", "'learning_rate'", "'learning_rat'"]),
        ("head: {stepz: 3}", ["head", "'steps'", "'stepz'"]),
        ("3: 4", ["known key", "3"]),
        ("qqq: 1", ["'seed', 'lightgcn', 'tokenizer'", "'retrieval'", "'qqq'"]),  # nothing near
        ("training: {epochs: many}", ["training: epochs", "int", "'many'"]),
        ("training: {epochs: 2.0}", ["training: epochs", "int", "2.0"]),
        ("training: {epochs: true}", ["training: epochs", "int", "True"]),
        ("training: {learning_rate: fast}", ["training: learning_rate", "float", "'fast'"]),
        ("training: {learning_rate: true}", ["training: learning_rate", "float", "True"]),
        ("head: {separable: 1}", ["head: separable", "bool", "1"]),
        ("head: {schedule: null}", ["head: schedule", "str", "None"]),
        ("head: {denoiser: mpl}", ["head: denoiser", "linear, mlp, adaln", "'mpl'"]),
        ("head: {schedule: exq}", ["head: schedule", "exp", "'exq'"]),
        ("head: {method: dmdp}", ["head: method", "ddpm, ddim", "'dmdp'"]),
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
        ("tokenizer: {tokens: 0}", ["tokenizer: tokens", "1", "0"]),
        ("prompt: {history: 0}", ["prompt: history", "1", "0"]),
        ("training: {batch_size: -3}", ["training: batch_size", "1", "-3"]),
        ("training: {epochs: -1}", ["training: epochs", "0", "-1"]),
        ("training: {learning_rate: -0.1}", ["training: learning_rate", "0", "-0.1"]),
        ("training: {learning_rate: .nan}", ["training: learning_rate", "nan"]),
        ("training: {learning_rate: .inf}", ["training: learning_rate", "inf"]),
        ("training: {dropout: 1.0}", ["training: dropout", "below 1", "1.0"]),
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
