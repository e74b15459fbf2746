"""Interrupted runs go on to the same bits, in one process and in two; what is refused."""

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from model_cases import (
    Log,
    Recorder,
    assert_same_weights,
    small_config,
    small_shop,
)
from ops_cases import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from contrec_fast.data import Dataset, Items
from contrec_fast.training import loop, train
from contrec_fast.training.checkpoint import Checkpoints
from contrec_fast.training.report import TrainingLog

SEARCH = ("training.epochs=3", "training.patience=1")
ADAPTERS = ("backbone.lora_rank=2", "training.epochs=3")


class Interrupter(Recorder):
    """Ends the run in a step of the n-th time that the model is trained; steps count from 1."""

    def __init__(self, training, step, how=lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
        super().__init__()
        self.training, self.step, self.how = training, step, how

    def stage(self, name, total, unit, done=0):
        record = super().stage(name, total, unit, done)
        self.training -= unit == "steps"

        def advance(**figures):
            record(**figures)
            if (unit, self.training, len(self.figures[name])) == ("steps", 0, self.step):
                self.how()

        return advance


@functools.cache
def whole_run(*overrides):
    """The model of a run that nothing interrupts, and the figures of its epochs."""
    log = Log()
    return train(small_shop(), small_config(*overrides), Recorder(), log=log), log.lines.values()


def without_speed(figures):
    return {name: value for name, value in figures.items() if name != "rate"}


@pytest.mark.parametrize(
    "overrides, training, step, epoch",
    [
        ((), 1, 2, 0),  # in the first of two epochs of four steps
        ((), 1, 4, 0),  # its last step
        ((), 1, 7, 1),
        (SEARCH, 1, 6, 1),  # in the search
        (SEARCH, 2, 2, 0),  # in the training anew
        (ADAPTERS, 1, 10, 2),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, overrides, training, step, epoch):
    config, folder = small_config(*overrides), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        log = TrainingLog(tmp_path)
        train(small_shop(), config, Interrupter(training, step), folder, log)
    assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
    torch.seed(), np.random.seed()  # another program
    recorder, log = Recorder(), TrainingLog(tmp_path)
    model = train(small_shop(), config, recorder, folder, log)
    assert_same_weights(model, whole_run(*overrides)[0])
    search = overrides == SEARCH and training == 1
    of = " of the search for the best epoch" * search
    assert recorder.lines[0] == f"going on after epoch {epoch}{of}"
    assert ("LightGCN" in recorder.totals) == search  # for the training anew
    assert ("ContRec, held out" in recorder.totals) == search
    lines = [{k: v for k, v in line.items() if k != "epoch"} for line in log.epochs]
    assert list(map(without_speed, lines)) == list(map(without_speed, whole_run(*overrides)[1]))


@pytest.mark.parametrize("overrides", [(), SEARCH])
def test_a_run_that_ends_after_its_last_epoch_goes_on(tmp_path, monkeypatch, overrides):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "fit_text_map", lambda *_: 1 / 0)
        train(small_shop(), small_config(*overrides), Recorder(), tmp_path)
    recorder = Recorder()
    model = train(small_shop(), small_config(*overrides), recorder, tmp_path)
    assert_same_weights(model, whole_run(*overrides)[0])
    assert len(recorder.totals) == 1 and recorder.figures == {"ContRec": []}


def test_a_run_that_ends_between_search_and_training_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop._Run, "final", lambda *_: 1 / 0)
        train(small_shop(), small_config(*SEARCH), Recorder(), tmp_path)
    model = train(small_shop(), small_config(*SEARCH), Recorder(), tmp_path)
    assert_same_weights(model, whole_run(*SEARCH)[0])


def test_a_killed_process_leaves_what_another_goes_on_from(tmp_path):
    code = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from model_cases import small_config, small_shop
from test_checkpoints import Interrupter
from contrec_fast.training import train
torch.set_num_threads(1)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
train(small_shop(), small_config(), Interrupter(1, 6, kill), Path(sys.argv[1]))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    recorder = Recorder()
    model = train(small_shop(), small_config(), recorder, tmp_path)
    assert recorder.lines[0] == "going on after epoch 1"
    assert_same_weights(model, whole_run()[0])


def test_a_checkpoint_holds_what_is_trained_and_no_frozen_language_model(tmp_path):
    config = small_config("backbone.lora_rank=2", "training.epochs=1")
    train(small_shop(), config, Recorder(), tmp_path)
    saved = load_file(tmp_path / "checkpoint.safetensors")
    backbone = {name for name in saved if name.startswith("backbone.")}
    assert backbone and all("lora_" in name or "trainable_tokens" in name for name in backbone)
    assert all(f"exp_avg:{name}" in saved for name in backbone)
    assert {"item_vectors", "exp_avg_sq:item_vectors", "step:item_vectors"} <= set(saved)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoint of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    train(small_shop(), small_config("training.epochs=1"), Recorder(), folder)
    return folder


def other_titles(shop):
    return Items(shop.items.ids, ["Other", *shop.items.titles[1:]], shop.items.categories)


OTHERS = {
    "setting": lambda shop: (shop, small_config("training.epochs=1", "training.dropout=0.2")),
    "seed": lambda shop: (shop, small_config("training.epochs=1", "seed=4")),
    "users": lambda shop: (shop.of_users(np.arange(29)), small_config("training.epochs=1")),
    "titles": lambda shop: (
        Dataset(other_titles(shop), shop.user_ids, shop.histories, shop.targets),
        small_config("training.epochs=1"),
    ),
    "histories": lambda shop: (
        Dataset(shop.items, shop.user_ids, shop.histories[::-1], shop.targets),
        small_config("training.epochs=1"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_checkpoints_of_another_run(finished, name):
    recorder = Recorder()
    with refused(ValueError, str(finished)):
        train(*OTHERS[name](small_shop()), recorder, finished)
    assert not recorder.totals


def test_other_targets_are_no_other_run(finished):
    """They are not looked at, so they may come to be known."""
    shop = small_shop()
    other = Dataset(shop.items, shop.user_ids, shop.histories, shop.targets[::-1].copy())
    train(other, small_config("training.epochs=1"), Recorder(), finished)


@pytest.mark.parametrize("processes", [1, 3])
def test_refuses_the_checkpoint_of_another_number_of_processes(tmp_path, processes):
    config = small_config("training.epochs=1")
    written = Checkpoints(tmp_path, small_shop(), config)
    written.join(processes, writes=True)
    written.save({"phase": "final", "epoch": 0, "searched": 0})
    recorder = Recorder()
    if processes == 1:
        train(small_shop(), config, recorder, tmp_path)
        return
    with refused(ValueError, str(tmp_path)):
        train(small_shop(), config, recorder, tmp_path)
    assert not recorder.totals


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    for name in (".checkpoint.safetensors.0a1b", "notes"):
        (tmp_path / name).write_text("half")
    Checkpoints(tmp_path, small_shop(), small_config())
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("content", ["empty", "garbage", "half", "strange", "state"])
def test_refuses_a_damaged_checkpoint(finished, tmp_path, content):
    path = tmp_path / "checkpoint.safetensors"
    whole = (finished / path.name).read_bytes()
    if content == "strange":
        save_file({"x": torch.zeros(3)}, path)
    elif content == "state":
        save_file({"x": torch.zeros(3)}, path, {"state": "{"})
    else:
        texts = {"empty": b"", "garbage": b"garbage" * 9, "half": whole[: len(whole) // 2]}
        path.write_bytes(texts[content])
    with refused(ValueError, str(path)):
        train(small_shop(), small_config("training.epochs=1"), Recorder(), tmp_path)


SCRIPT = """
import os, sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch
from safetensors.torch import save_file
from model_cases import Recorder, small_config, small_shop
from test_checkpoints import Interrupter
from contrec_fast.training import checkpoint, train
torch.set_num_threads(1)
rank, out, written = os.environ["RANK"], Path({out!r}), []
honest = checkpoint.save_file
checkpoint.save_file = lambda *arguments: written.append(1) or honest(*arguments)
config = small_config(*{overrides!r})
try:
    train(small_shop(), config, Interrupter(2, 2), out / "state")
except KeyboardInterrupt:
    pass
model = train(small_shop(), config, Recorder(), out / "state")
tensors = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
save_file(tensors, out / f"{{rank}}.safetensors", {{"written": str(len(written))}})
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """Interrupted after the search, gone on with; only the main process writes checkpoints."""
    script = tmp_path / "script.py"
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    script.write_text(SCRIPT.format(path=path, out=str(tmp_path), overrides=SEARCH))
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in "01"]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    # Twice as many users to a step, so other weights than those of one process.
    assert not torch.equal(states[0]["item_vectors"], whole_run(*SEARCH)[0].item_vectors)
    counts = []
    for rank in "01":
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as file:
            counts.append(int(file.metadata()["written"]))
    assert counts[0] > 3 and counts[1] == 0
    with safe_open(tmp_path / "state" / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["phase"] == "final"
