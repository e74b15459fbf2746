"""The command `contrec`: a whole run, its files, and every refusal in one line."""

import json
import os
import shutil
import signal
import stat
import time

import cli_cases
import pytest
import yaml
from cli_cases import contrec, names, refused, succeeded
from model_cases import (
    small_config,
    small_shop,
)

import contrec_fast
from contrec_fast import cli, data, training
from contrec_fast.config import load_config
from contrec_fast.data import load_dataset
from contrec_fast.models.contrec import ContRec
from contrec_fast.training.report import TrainingLog

run, train_arguments, world = cli_cases.run, cli_cases.train_arguments, cli_cases.world

METRICS = {"hr@10", "ndcg@10", "hr@20", "ndcg@20"}
QUICK = {"popularity", "itemknn", "markov"}
FILES = {"backbone", "config.yaml", "model.safetensors", "data", "curves.png", "log.jsonl",
         "tensorboard"}  # fmt: skip


def test_a_run_is_complete_and_nothing_is_left_beside_it(world, run):
    assert names(world / "deep") == {"run"}
    assert names(run) >= FILES and names(run) - FILES <= {"metrics.json", "metrics.png"}
    assert load_config(run / "config.yaml") == small_config()
    again, shop = load_dataset(run / "data"), small_shop()
    assert (again.items, again.user_ids) == (shop.items, shop.user_ids)
    assert again.targets.tolist() == shop.targets.tolist()
    (world / "plain").mkdir()
    assert stat.S_IMODE(run.stat().st_mode) == stat.S_IMODE((world / "plain").stat().st_mode)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"diffusion", "ranking", "text", "rate", "learning_rate"} <= lines[0].keys()


def test_evaluate_prints_and_writes_the_same_again(run):
    result = succeeded("evaluate", run, "--baselines", "quick")
    text = (run / "metrics.json").read_text()
    metrics = json.loads(text)
    assert set(metrics["model"]) == METRICS and set(metrics["baselines"]) == QUICK
    for words in ("history excluded", "ContRec", "Popularity", "Markov", "30 targets", *METRICS):
        assert words in result.stdout
    assert f"{metrics['model']['hr@10']:.4f}" in result.stdout
    best = metrics["against"]["ndcg@10"]
    (line,) = (line for line in result.stdout.splitlines() if "95 %" in line)
    assert f"ndcg@10 {best['difference']:+.4f} [{best['low']:+.4f}, {best['high']:+.4f}]" in line
    assert "Evaluation" in result.stderr and "Evaluation" not in result.stdout
    assert (run / "metrics.png").read_bytes().startswith(b"\x89PNG")
    (run / "metrics.json").unlink()
    succeeded("evaluate", run, "--baselines", "quick")
    assert (run / "metrics.json").read_text() == text


def test_evaluate_says_that_seen_items_are_included(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    tree = yaml.safe_load((other / "config.yaml").read_text())
    tree["retrieval"]["filter_seen"] = False
    (other / "config.yaml").write_text(yaml.safe_dump(tree))
    out = " ".join(succeeded("evaluate", other, "--baselines", "none").stdout.split())
    assert "history included" in out and "95 %" not in out and "Markov" not in out
    assert "in the user's own history;" in out and "out of reach" not in out


def test_evaluate_keeps_baselines_that_it_is_not_asked_for(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    succeeded("evaluate", other, "--baselines", "quick")
    text = (other / "metrics.json").read_text()
    out = succeeded("evaluate", other, "--baselines", "none").stdout
    assert (other / "metrics.json").read_text() == text and "Markov" in out and "95 %" in out
    (other / "metrics.json").write_text(text[:-9])
    line = refused("evaluate", other, "--baselines", "none")
    assert f"{other / 'metrics.json'}: expected JSON" in line
    (other / "metrics.json").write_text('{"model": 1}')
    line = refused("evaluate", other, "--baselines", "none")
    assert f"{other / 'metrics.json'}: expected metrics as `evaluate` writes them" in line


def test_a_failed_evaluation_keeps_the_metrics_of_before(run, monkeypatch):
    succeeded("evaluate", run, "--baselines", "none")
    before = (run / "metrics.json").read_text()
    monkeypatch.setattr(cli.json, "dumps", lambda *_, **__: 1 / 0)
    assert contrec("evaluate", run, "--baselines", "none").exit_code == 1
    assert (run / "metrics.json").read_text() == before
    assert not [name for name in names(run) if name.startswith(".")]


def test_evaluate_refuses_unknown_baselines(run):
    line = refused("evaluate", run, "--baselines", "some")
    assert "baselines: expected one of all, quick, none, got 'some'" in line


def test_overrides_beat_the_file_which_beats_the_preset(train_arguments, tmp_path):
    succeeded(*train_arguments, "--preset", "contrec", "seed=9", "training.epochs=1",
              "data.holdout=validation")  # fmt: skip
    config = small_config()
    config.seed, config.training.epochs, config.data.holdout = 9, 1, "validation"
    assert load_config(tmp_path / "run" / "config.yaml") == config
    held_out = load_dataset(tmp_path / "run" / "data").targets.tolist()
    assert held_out == [int(history[-1]) for history in small_shop().histories]


@pytest.mark.parametrize("preset", ["deftrec", "tokens"])
def test_presets_train_evaluate_and_recommend(world, tmp_path, preset):
    sizes = ["lightgcn.epochs=1", "lightgcn.dim=8", "tokenizer.epochs=1", "backbone.hidden=8",
             "backbone.vocabulary=300", "head.width=8", "head.depth=1", "head.timesteps=20",
             "prompt.response_tokens=4", "training.epochs=1"]  # fmt: skip
    run = tmp_path / "run"
    succeeded("train", world / "shop", *sizes, "--out", run, "--preset", preset)
    succeeded("evaluate", run, "--baselines", "none")
    assert len(succeeded("recommend", run, "--k", 2).stdout.splitlines()) == 1 + 2 * 30


def test_a_run_that_holds_nothing_out_serves_but_is_not_judged(train_arguments, tmp_path):
    run, shop = tmp_path / "run", small_shop()
    succeeded(*train_arguments, "data.holdout=none", "training.patience=1")
    kept = load_dataset(run / "data")
    assert (kept.targets == -1).all()
    for history, known, target in zip(kept.histories, shop.histories, shop.targets, strict=True):
        assert history.tolist() == [*known, target]
    before = names(run)
    line = refused("evaluate", run)
    assert "expected users with a held-out item" in line and "data.holdout=test or valid" in line
    assert names(run) == before
    lists = succeeded("recommend", run, "--users", "user-0003", "--k", 60).stdout
    assert len(lists.splitlines()) == 1 + 60 - len(set(kept.histories[2].tolist()))


def test_no_epochs_give_a_run_without_curves(train_arguments, tmp_path):
    succeeded(*train_arguments, "training.epochs=0")
    assert names(tmp_path / "run") == FILES - {"curves.png", "log.jsonl", "tensorboard"}


def test_train_reads_a_table_of_interactions(train_arguments, tmp_path):
    shop = small_shop()
    rows = ["user_id,item_id,timestamp"]
    for user, history, target in zip(shop.user_ids, shop.histories, shop.targets):
        rows += [f"{user},{shop.items.ids[i]},{at}" for at, i in enumerate([*history, target])]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    train_arguments[1] = tmp_path / "log.csv"
    result = succeeded(*train_arguments, "training.epochs=0")
    assert "30 users" in result.stderr
    assert load_dataset(tmp_path / "run" / "data").user_ids == sorted(shop.user_ids)


def test_train_refuses_an_existing_folder(train_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    (tmp_path / "run").mkdir()
    assert f"out: expected a folder that does not exist yet, got {tmp_path / 'run'}" in refused(
        *train_arguments
    )
    assert names(tmp_path) == {"run"} and names(tmp_path / "run") == set()


def test_train_refuses_places_that_it_cannot_have_before_it_reads(
    train_arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "read_data", None)
    (tmp_path / "file").write_text("mine")
    train_arguments[3] = tmp_path / "file" / "run"
    assert str(tmp_path / "file" / "run.checkpoint") in refused(*train_arguments)
    (tmp_path / "run.checkpoint").mkdir()
    (tmp_path / "run.checkpoint" / "notes").write_text("mine")
    train_arguments[3] = tmp_path / "run"
    assert "run.checkpoint: expected an interrupted run, got something" in refused(*train_arguments)
    assert names(tmp_path / "run.checkpoint") == {"notes"}


def test_what_a_killed_process_left_is_cleaned_up(train_arguments, tmp_path):
    """Killed during the first checkpoint and, another one, while saving the run."""
    place, code = tmp_path / "run.checkpoint", "0123456789abcdef" * 2
    place.mkdir()
    (place / f".checkpoint.safetensors.{code}").write_text("half")
    for name in (f".run.{code}", f"..run.{code}.{code}", f".my-run.{code}", ".run.notes"):
        (tmp_path / name).mkdir()
    succeeded(*train_arguments, "training.epochs=0")
    assert names(tmp_path) == {"run", f".my-run.{code}", ".run.notes"}


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
    result = contrec(*train_arguments[:-1], path)
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and all(word in line for word in words), line
    assert "LightGCN" not in result.stderr  # nothing was trained before it
    assert names(tmp_path) == {"wrong.yaml"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["steps=3"], ["'head.steps'", "'steps'"]),
        (["training.epochs=-1"], ["training.epochs", "0", "-1"]),
        (["data.holdout=all"], ["data.holdout", "test, validation, none", "'all'"]),
        (["head.steps"], ["KEY=VALUE", "'head.steps'"]),
        (["--preset", "papr"], ["preset", "contrec", "'papr'"]),
    ],
)
def test_train_refuses_settings(train_arguments, tmp_path, arguments, words):
    line = refused(*train_arguments, *arguments)
    assert all(word in line for word in words), line
    assert names(tmp_path) == set()


def test_train_refuses_data_that_is_not_there(train_arguments, tmp_path):
    train_arguments[1] = tmp_path / "absent"
    assert f"{tmp_path / 'absent'}: expected a file or folder" in refused(*train_arguments)
    (tmp_path / "empty").mkdir()
    train_arguments[1] = tmp_path / "empty"
    assert "train.txt" in refused(*train_arguments)
    train_arguments[-1] = tmp_path / "no.yaml"
    assert "no.yaml" in refused(*train_arguments)
    assert names(tmp_path) == {"empty"}


@pytest.fixture
def handlers():
    """Those of a program in the foreground: one in the background may ignore SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(signal_number):
    os.kill(os.getpid(), signal_number)
    time.sleep(60)  # which the signal interrupts


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    run, train_arguments, tmp_path, monkeypatch, handlers, number, status
):
    record = TrainingLog.epoch

    def epoch(log, at, **figures):
        if at == 2:
            interrupt(number)
        record(log, at, **figures)

    place = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "epoch", epoch)
        result = contrec(*train_arguments)
    assert result.exit_code == status and result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        f"contrec: interrupted; the same command goes on from {place}"
    )
    assert names(tmp_path) == {"run.checkpoint"}

    other = contrec(*train_arguments, "seed=8")
    assert other.exit_code == 1
    assert f"{place}: expected checkpoints of the same data" in other.stderr.splitlines()[-1]
    assert names(tmp_path) == {"run.checkpoint"}

    assert "going on after epoch 1" in succeeded(*train_arguments).stderr
    assert names(tmp_path) == {"run"} and names(tmp_path / "run") == FILES
    for name in ("model.safetensors", "backbone/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_an_interruption_before_there_is_a_checkpoint_leaves_nothing(
    train_arguments, tmp_path, monkeypatch, handlers
):
    monkeypatch.setattr(data, "read_data", lambda *_: interrupt(signal.SIGINT))
    result = contrec(*train_arguments)
    assert result.exit_code == 130 and result.stderr == "contrec: interrupted\n"
    assert names(tmp_path) == set()


def test_a_failure_while_saving_leaves_only_the_checkpoint(train_arguments, tmp_path, monkeypatch):
    def fail(model, path):
        (path / "config.yaml").write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ContRec, "save_pretrained", fail)
        result = contrec(*train_arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "contrec: disk full"
    assert names(tmp_path) == {"run.checkpoint"}
    assert "ContRec 1/" not in succeeded(*train_arguments).stderr  # nothing is trained again
    assert names(tmp_path / "run") == FILES


def test_a_loss_that_is_not_finite_leaves_nothing(train_arguments, tmp_path):
    result = contrec(*train_arguments, "training.text_weight=1e38", "training.learning_rate=1e30")
    assert result.exit_code == 1 and result.stdout == ""
    assert "expected a finite" in result.stderr.splitlines()[-1]
    assert names(tmp_path) == set()


@pytest.fixture
def small_demo(monkeypatch):
    import contrec_fast.presets

    monkeypatch.setattr(contrec_fast.presets, "demo_config", small_config)
    monkeypatch.setattr(data, "synthetic_shop", lambda seed: small_shop())


def test_demo_trains_evaluates_and_shows_users(small_demo, tmp_path):
    result = succeeded("demo", "--out", tmp_path / "kept", "--seed", 4)
    out = result.stdout
    for words in ("ContRec", "Popularity", "Markov", "hr@10", "30 targets"):
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
    for words in ("contrec-fast", contrec_fast.__version__, "torch", "CPU", "GPU", "Triton"):
        assert words in out
    for operation in contrec_fast.ops.backends():
        assert f"ops.{operation}" in out


def test_help_names_every_command_and_version_is_that_of_the_package():
    out = succeeded("--help").stdout
    for command in ("demo", "train", "evaluate", "recommend", "add-items", "info"):
        assert command in out
    assert succeeded("--version").stdout == f"contrec {contrec_fast.__version__}\n"
