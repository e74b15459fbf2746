"""The command `contrec`: a whole run, its files, and every refusal in one line."""

import csv
import io
import json
import math
import os
import shutil
import signal
import stat
import time

import pytest
import yaml
from model_cases import (
    one_thread,  # noqa: F401
    small_config,
    small_shop,
)
from typer.testing import CliRunner

import contrec_fast
from contrec_fast import cli, data, training
from contrec_fast.config import load_config, save_config
from contrec_fast.data import read_folder, write_folder
from contrec_fast.models.contrec import ContRec

METRICS = {"hr@10", "ndcg@10", "hr@20", "ndcg@20"}
COLUMNS = ["user_id", "item_id", "title", "score", "rank", "matched", "text"]


def contrec(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeeded(*arguments):
    result = contrec(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*arguments):
    """The one line that a command ends with; it has printed nothing else."""
    result = contrec(*arguments)
    assert result.exit_code == 1 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("contrec: ")
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the data `shop`, `config.yaml`, and the run `deep/run` trained on them."""
    folder = tmp_path_factory.mktemp("world")
    write_folder(small_shop(), folder / "shop")
    save_config(small_config(), folder / "config.yaml")
    result = succeeded(
        "train", folder / "shop", "--out", folder / "deep" / "run", "--config",
        folder / "config.yaml",
    )  # fmt: skip
    assert result.stdout == "" and "ContRec" in result.stderr
    succeeded("evaluate", folder / "deep" / "run")
    return folder


@pytest.fixture
def train_arguments(world, tmp_path):
    return ["train", world / "shop", "--out", tmp_path / "run", "--config", world / "config.yaml"]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_is_complete_and_nothing_is_left_beside_it(world):
    run = world / "deep" / "run"
    assert names(world / "deep") == {"run"}
    assert names(run) == {"backbone", "config.yaml", "model.safetensors", "data", "metrics.json"}
    assert load_config(run / "config.yaml") == small_config()
    again, shop = read_folder(run / "data"), small_shop()
    assert (again.items, again.user_ids) == (shop.items, shop.user_ids)
    assert again.targets.tolist() == shop.targets.tolist()
    plain = world / "plain"
    plain.mkdir()
    assert stat.S_IMODE(run.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1


def test_metrics_are_those_of_the_protocol(world):
    metrics = json.loads((world / "deep" / "run" / "metrics.json").read_text())
    assert set(metrics) == {"model", "baselines", "targets"}
    assert set(metrics["baselines"]) == {"popularity", "markov"}
    for values in (metrics["model"], *metrics["baselines"].values()):
        assert set(values) == METRICS
        assert all(0 <= value <= 1 for value in values.values())
        assert values["ndcg@10"] <= values["hr@10"] <= values["hr@20"]
    assert set(metrics["targets"]) == {"total", "in_history", "unseen"}
    assert metrics["targets"]["total"] == 30 and metrics["targets"]["in_history"] == 0


def test_evaluate_prints_and_writes_the_same_again(world):
    path = world / "deep" / "run" / "metrics.json"
    before = path.read_text()
    path.unlink()
    result = succeeded("evaluate", world / "deep" / "run")
    assert path.read_text() == before
    metrics = json.loads(before)
    for words in ("ContRec", "popularity", "markov", "30 targets", *METRICS):
        assert words in result.stdout
    assert f"{metrics['model']['hr@10']:.4f}" in result.stdout
    assert "Evaluation" in result.stderr and "Evaluation" not in result.stdout


def test_recommend_prints_a_table_that_parses(world):
    run, shop = world / "deep" / "run", small_shop()
    result = succeeded(
        "recommend", run, "--users", "user-0003,user-0001", "--users", "user-0030", "--k", 4
    )
    assert "\r" not in result.stdout and result.stderr == ""
    header, *rows = csv.reader(io.StringIO(result.stdout))
    assert header == COLUMNS and len(rows) == 12
    users = ["user-0003"] * 4 + ["user-0001"] * 4 + ["user-0030"] * 4
    assert [row[0] for row in rows] == users
    assert [row[4] for row in rows] == ["1", "2", "3", "4"] * 3
    index = {item: number for number, item in enumerate(shop.items.ids)}
    for user, item, title, score, _, matched, _ in rows:
        assert shop.items.titles[index[item]] == title
        assert index[item] not in shop.histories[shop.user_ids.index(user)]
        assert math.isfinite(float(score)) and matched in ("True", "False")
    for start in (0, 4, 8):
        scores = [float(row[3]) for row in rows[start : start + 4]]
        assert scores == sorted(scores, reverse=True)
    alone = succeeded("recommend", run, "--users", "user-0030", "--k", 4)
    assert alone.stdout.splitlines()[1:] == result.stdout.splitlines()[9:]


def test_lists_are_as_long_as_there_are_items(world):
    result = succeeded("recommend", world / "deep" / "run", "--users", "user-0001", "--k", 60)
    unseen = 60 - len(set(small_shop().histories[0].tolist()))
    assert len(result.stdout.splitlines()) == 1 + unseen


def test_recommend_as_a_process_keeps_standard_output_clean(world, run_python):
    process = run_python(
        f"""
import sys
from contrec_fast.cli import app
sys.argv = ["contrec", "recommend", {str(world / "deep" / "run")!r}, "--users", "user-0002"]
app()
""",
        OMP_NUM_THREADS="1",
    )
    header, *rows = csv.reader(io.StringIO(process.stdout))
    assert header == COLUMNS and len(rows) == 10
    assert {row[0] for row in rows} == {"user-0002"}


def test_a_user_id_may_hold_a_comma(world, tmp_path):
    run = shutil.copytree(world / "deep" / "run", tmp_path / "run")
    users = (run / "data" / "user_list.txt").read_text()
    assert "user-0002" in users
    (run / "data" / "user_list.txt").write_text(users.replace("user-0002", "a,b"))
    result = succeeded(
        "recommend", run, "--users", "a,b", "--users", "user-0001,user-0003", "--k", 1
    )
    _, *rows = csv.reader(io.StringIO(result.stdout))
    assert [row[0] for row in rows] == ["a,b", "user-0001", "user-0003"]


def test_recommend_ends_quietly_when_its_output_is_closed(world, run_python):
    process = run_python(
        f"""
import os, sys
from contrec_fast.cli import app
read, write = os.pipe()
os.close(read)
os.dup2(write, sys.stdout.fileno())
sys.argv = ["contrec", "recommend", {str(world / "deep" / "run")!r}, "--users", " user-0002 "]
app()
""",
        OMP_NUM_THREADS="1",
    )
    assert process.stderr == ""


def test_the_command_line_overrides_the_file(train_arguments, tmp_path):
    succeeded(*train_arguments, "seed=9", "training.epochs=1", "data.holdout=validation")
    config = small_config()
    config.seed, config.training.epochs, config.data.holdout = 9, 1, "validation"
    assert load_config(tmp_path / "run" / "config.yaml") == config
    held_out = read_folder(tmp_path / "run" / "data").targets.tolist()
    assert held_out == [int(history[-1]) for history in small_shop().histories]


def test_users_without_a_target_are_left_out(train_arguments, tmp_path):
    shop = small_shop()
    histories = [
        history[:1] if user < 5 else history for user, history in enumerate(shop.histories)
    ]
    other = data.Dataset(shop.items, shop.user_ids, histories, shop.targets)
    write_folder(other, tmp_path / "shop")
    train_arguments[1] = tmp_path / "shop"
    succeeded(*train_arguments, "training.epochs=0", "data.holdout=validation")
    assert read_folder(tmp_path / "run" / "data").user_ids == shop.user_ids[5:]


def test_train_refuses_an_existing_folder(train_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    (tmp_path / "run").mkdir()
    assert f"out: expected a folder that does not exist yet, got {tmp_path / 'run'}" in refused(
        *train_arguments
    )
    assert names(tmp_path / "run") == set()


@pytest.mark.parametrize(
    "text, words",
    [
        ("training: {epoch: 3}", ["'training.epochs'", "'training.epoch'"]),
        ("head: {denoiser: unet}", ["head.denoiser", "'unet'"]),
        ("head: {schedule: cubic}", ["schedule", "'cubic'"]),
        ("backbone: {path: /no/such/model}", ["/no/such/model", "config.json"]),
        ("head: {timesteps: 5, steps: 6}", ["steps", "5", "6"]),
        ("- a", ["mapping"]),
    ],
)
def test_train_refuses_a_bad_configuration(world, train_arguments, tmp_path, text, words):
    tree = yaml.safe_load((world / "config.yaml").read_text())
    wrong = yaml.safe_load(text)
    if isinstance(wrong, dict):
        for part, values in wrong.items():
            tree[part] |= values
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(tree if isinstance(wrong, dict) else wrong))
    line = refused(*train_arguments[:-1], path)  # one line: nothing was trained before it
    assert all(word in line for word in words), line
    assert names(tmp_path) == {"wrong.yaml"}


def test_train_refuses_data_that_is_not_there(train_arguments, tmp_path):
    train_arguments[1] = tmp_path / "absent"
    assert f"{tmp_path / 'absent'}: expected a folder" in refused(*train_arguments)
    (tmp_path / "empty").mkdir()
    train_arguments[1] = tmp_path / "empty"
    assert "train.txt" in refused(*train_arguments)
    train_arguments[-1] = tmp_path / "no.yaml"
    assert "no.yaml" in refused(*train_arguments)
    assert names(tmp_path) == {"empty"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["steps=3"], ["'head.steps'", "'steps'"]),
        (["training.epochs=-1"], ["training.epochs", "0", "-1"]),
        (["data.holdout=all"], ["data.holdout", "test, validation", "'all'"]),
        (["head.steps"], ["KEY=VALUE", "'head.steps'"]),
        (["--preset", "papr"], ["preset", "contrec", "'papr'"]),
    ],
)
def test_train_refuses_settings(train_arguments, tmp_path, arguments, words):
    line = refused(*train_arguments, *arguments)
    assert all(word in line for word in words), line
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--users", "nobody"], ["users", "'nobody'"]),
        (["--users", "user-0001,,user-0002"], ["users", "''"]),
        (["--users", "user-0001", "--k", 0], ["k:", "60", "0"]),
        (["--users", "user-0001", "--k", -2], ["k:", "60", "-2"]),
        (["--users", "user-0001", "--k", 61], ["k:", "60", "61"]),
    ],
)
def test_recommend_refuses(world, arguments, words):
    line = refused("recommend", world / "deep" / "run", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_refuses_what_is_no_run(world, tmp_path, command):
    rest = ["--users", "user-0001"] if command == "recommend" else []
    assert str(tmp_path / "absent") in refused(command, tmp_path / "absent", *rest)
    for name in ("config.yaml", "model.safetensors", "data", "backbone"):
        folder = tmp_path / name
        shutil.copytree(
            world / "deep" / "run", folder,
            ignore=lambda at, _, name=name: [name] if at == str(world / "deep" / "run") else [],
        )  # fmt: skip
        line = refused(command, folder, *rest)
        assert str(folder) in line and name in line


def failing(error, part):
    """Something that writes `part` and then fails."""

    def fail(model, path):
        path.mkdir(parents=True, exist_ok=True)
        (path / part).write_text("half")
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad")])
def test_a_failure_while_saving_leaves_nothing(train_arguments, tmp_path, monkeypatch, error):
    monkeypatch.setattr(ContRec, "save_pretrained", failing(error, "config.yaml"))
    result = contrec(*train_arguments, "training.epochs=0")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"contrec: {error}"
    assert names(tmp_path) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interruption_while_saving_leaves_nothing(train_arguments, tmp_path, monkeypatch, error):
    def fail(dataset, path):
        assert path.parent.parent == tmp_path and names(path.parent)  # the model is there already
        raise error

    monkeypatch.setattr(data, "write_folder", fail)
    assert contrec(*train_arguments, "training.epochs=0").exit_code != 0
    assert names(tmp_path) == set()


def test_a_run_that_is_ended_from_outside_leaves_nothing(train_arguments, tmp_path, monkeypatch):
    def end(dataset, path):
        assert names(path.parent)  # the model is there already
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # which the signal interrupts

    monkeypatch.setattr(data, "write_folder", end)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert contrec(*train_arguments, "training.epochs=0").exit_code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert names(tmp_path) == set()


def test_a_failure_in_training_leaves_nothing(world, train_arguments, tmp_path):
    config = small_config(text_weight=1e38, learning_rate=1e30)
    save_config(config, tmp_path / "wild.yaml")
    train_arguments[-1] = tmp_path / "wild.yaml"
    result = contrec(*train_arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert "expected a finite loss" in result.stderr.splitlines()[-1]
    assert names(tmp_path) == {"wild.yaml"}


def test_a_failed_evaluation_keeps_the_metrics_of_before(world, monkeypatch):
    path = world / "deep" / "run" / "metrics.json"
    before = path.read_text()
    monkeypatch.setattr(cli.json, "dumps", lambda *_, **__: 1 / 0)
    assert contrec("evaluate", world / "deep" / "run").exit_code == 1
    assert path.read_text() == before


@pytest.fixture
def small_demo(monkeypatch):
    import contrec_fast.presets

    monkeypatch.setattr(contrec_fast.presets, "demo_config", small_config)
    monkeypatch.setattr(data, "synthetic_shop", lambda seed: small_shop())


def test_demo_trains_evaluates_and_shows_users(small_demo, tmp_path):
    result = succeeded("demo", "--out", tmp_path / "kept", "--seed", 4)
    out = result.stdout
    for words in ("ContRec", "popularity", "markov", "hr@10", "30 targets"):
        assert words in out
    shop = small_shop()
    for row in (0, 14, 29):
        assert f"User {shop.user_ids[row]} chose" in out
        assert shop.items.titles[shop.histories[row][-1]] in " ".join(out.split())
    assert out.count("The model writes:") == 3 and out.count("recommended") == 3
    assert f"The run is in {tmp_path / 'kept'}" in out
    assert load_config(tmp_path / "kept" / "config.yaml").seed == 4
    metrics = json.loads((tmp_path / "kept" / "metrics.json").read_text())
    assert set(metrics["model"]) == METRICS
    assert f"{metrics['model']['hr@10']:.4f}" in out
    assert "LightGCN 3/3" in result.stderr and "LightGCN 3/3" not in out


def test_demo_keeps_nothing_unless_asked(small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    assert "--out FOLDER" in succeeded("demo").stdout
    assert names(tmp_path) == set()
    (tmp_path / "there").mkdir()
    assert "out: expected a folder that does not exist yet" in refused(
        "demo", "--out", tmp_path / "there"
    )


def test_info_says_what_can_run():
    out = succeeded("info").stdout
    for words in (
        "contrec-fast",
        contrec_fast.__version__,
        "torch",
        "CPU",
        "GPU",
        "Triton kernels",
    ):
        assert words in out
    for operation in contrec_fast.ops.backends():
        assert f"ops.{operation}" in out


def test_help_names_every_command():
    out = succeeded("--help").stdout
    for command in ("demo", "train", "evaluate", "recommend", "info"):
        assert command in out
