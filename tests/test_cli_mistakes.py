"""The command `contrec` when something is wrong: one line, at once where that can be."""

import cli_cases
import pytest
from cli_cases import contrec, names, refused

from contrec_fast.engine import Recommender

run, world = cli_cases.run, cli_cases.world


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to\nallocate"), "out of memory: Unable to allocate"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: DefaultCPU"),
    ],
)
def test_too_little_memory_is_one_line(run, monkeypatch, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Recommender, "recommend", fail)
    assert refused("recommend", run).startswith(f"contrec: {line}")


def test_other_errors_are_no_refusals(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Recommender, "recommend", fail)
    result = contrec("recommend", run)
    assert str(result.exception) == "a defect" and "contrec:" not in result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "absent", "--out", "run"], "absent: expected a file or folder"),
        (["train", "here", "--out", "here"], "out: expected a folder that does not exist yet"),
        (["train", "here", "--out", "run", "head.stepz=3"], "'head.steps', got 'head.stepz'"),
        (["train", "here", "--out", "run", "head.steps=999"], "head.steps: expected at most"),
        (["train", "here", "--out", "run", "backbone.path=absent"], "backbone.path: expected"),
        (["train", "here", "--out", "run", "--config", "absent"], "absent: expected a readable"),
        (["train", "here", "--out", "run", "--preset", "papr"], "preset: expected one of"),
        (["demo", "--out", "here"], "out: expected a folder that does not exist yet"),
        (["recommend", "here", "--k", "0"], "k: expected at least 1, got 0"),
        (["recommend", "here", "--users", "a", "--users-file", "b"], "users: expected one of"),
        (["recommend", "absent"], "absent: expected the folder of a trained model"),
        (["recommend", "here", "--out", "x.txt"], "out: expected -, a .csv or a .parquet"),
        (["evaluate", "absent"], "absent: expected the folder of a trained model"),
        (["evaluate", "here", "--baselines", "some"], "baselines: expected one of"),
        (["add-items", "here", "x.csv", "--out", "here"], "out: expected a folder that does not"),
    ],
)
def test_mistakes_do_not_wait_for_torch(tmp_path, run_python, arguments, words):
    (tmp_path / "here").mkdir()
    code = f"""
import sys
from contrec_fast.cli import app
sys.argv = ["contrec", *{arguments!r}]
try:
    app()
except SystemExit as end:
    assert end.code == 1
    assert "torch" not in sys.modules
else:
    raise AssertionError
"""
    (line,) = run_python(code, folder=tmp_path).stderr.splitlines()
    assert line.startswith("contrec: ") and words in line
    assert names(tmp_path) == {"here"}
