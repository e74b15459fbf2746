"""The record of a training run: what is kept, what a resume forgets, and the curves."""

import json
import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrec_fast.training import report
from contrec_fast.training.report import TrainingLog


def figures(epoch, metric=True):
    """Random figures as training records them; the metric comes at even epochs only."""
    values = {"diffusion": random.random() + 0.1, "dispersive": random.random() - 2}
    if metric and epoch % 2 == 0:
        values["ndcg@10"] = random.random()
    return values | {"rate": 100 * random.random(), "learning_rate": 1e-3 / epoch}


def record(folder, epochs, **kind):
    """A closed log with these epochs, and what it was told, by epoch."""
    log = TrainingLog(folder)
    told = {number: figures(number, **kind) for number in epochs}
    for number, values in told.items():
        log.epoch(number, **values)
    log.close()
    return log, told


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder):
    """{name: {epoch: value}} as TensorBoard shows them."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        name: {event.step: event.value for event in accumulator.Scalars(name)}
        for name in accumulator.Tags()["scalars"]
    }


def drawn(log, path, monkeypatch):
    """The panels of a log's figure: {title: (scale, {curve: its points})}."""
    kept = []
    save = report.Figure.savefig
    monkeypatch.setattr(
        report.Figure, "savefig", lambda self, *a, **b: kept.append(self) or save(self, *a, **b)
    )
    log.save_curves(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return {
        axes.get_title(): (
            axes.get_yscale(),
            {line.get_label(): dict(zip(*line.get_data())) for line in axes.get_lines()},
        )
        for axes in kept[0].axes
    }


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    _, first = record(tmp_path, range(1, 6))
    assert lines(tmp_path) == [{"epoch": number} | first[number] for number in first]
    log, second = record(tmp_path, range(4, 8))  # as after a checkpoint of epoch 3
    told = {number: first[number] for number in (1, 2, 3)} | second
    assert lines(tmp_path) == [{"epoch": number} | told[number] for number in range(1, 8)]
    assert log.epochs == lines(tmp_path)
    shown = events(tmp_path)
    assert set(shown) == {"diffusion", "dispersive", "ndcg@10", "rate", "learning_rate"}
    for name, curve in shown.items():
        expected = {number: told[number][name] for number in told if name in told[number]}
        assert curve == pytest.approx(expected, rel=1e-6), name
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "tensorboard"}


def test_a_failed_write_keeps_what_was_recorded(tmp_path, monkeypatch):
    log, _ = record(tmp_path, range(1, 3))
    before = lines(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        log.epoch(3, diffusion=1.0)
    assert lines(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "tensorboard"}


def test_curves_have_the_panels_that_their_values_need(tmp_path, monkeypatch):
    log, told = record(tmp_path, range(1, 8))
    panels = drawn(log, tmp_path / "curves.png", monkeypatch)
    for title, scale, name in (
        ("Losses", "log", "diffusion"),
        ("Losses that may be negative", "linear", "dispersive"),
        ("Validation", "linear", "ndcg@10"),
    ):
        points = {number: told[number][name] for number in told if name in told[number]}
        assert panels.pop(title) == (scale, {name: points})
    assert not panels


def test_curves_of_a_single_epoch_without_validation(tmp_path, monkeypatch):
    log, _ = record(tmp_path, [1], metric=False)
    assert set(drawn(log, tmp_path / "one.png", monkeypatch)) == {
        "Losses", "Losses that may be negative",
    }  # fmt: skip


def test_without_epochs_there_is_nothing_to_draw(tmp_path):
    TrainingLog(tmp_path / "none").save_curves(tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
