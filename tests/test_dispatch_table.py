"""bench/dispatch_table.py: rows of a run, and their way into the table."""

import json
import sys
from pathlib import Path

import pytest

from contrec_fast.ops import dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import dispatch_table  # noqa: E402

SAMPLE, TOPK = (
    {
        "operation": operation,
        "backend": "triton",
        "architecture": "sm_90",
        "bucket": "a",
        "source": dispatch.source_hash(*dispatch._implementations[operation]["triton"].sources),
        "speedup": 2.5,
    }
    for operation in ("sample", "cosine_topk")
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """files(table, *runs) writes them: the arguments of `main` for the runs."""
    monkeypatch.setattr(dispatch, "TABLE", tmp_path / "measured.json")

    def write(table, *runs):
        dispatch.TABLE.write_text(json.dumps(table))
        paths = [tmp_path / f"run-{number}.json" for number in range(len(runs))]
        for path, rows in zip(paths, runs):
            path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return [str(path) for path in paths]

    yield write
    assert not list(tmp_path.glob("*.partial"))


def stored():
    return json.loads(dispatch.TABLE.read_text())


def test_later_rows_replace_earlier_ones_and_the_order_is_stable(files, capsys):
    slower, other = SAMPLE | {"speedup": 0.9}, SAMPLE | {"bucket": "b"}
    paths = files([other, SAMPLE], [TOPK, SAMPLE | {"speedup": 7}], [slower])
    assert dispatch_table.main(*paths) == 0
    assert stored() == [TOPK, slower, other]
    assert capsys.readouterr().out == "3 rows in measured.json, 0 left out\n"
    written = dispatch.TABLE.read_bytes()
    assert dispatch_table.main(paths[1], paths[1]) == 0
    assert dispatch.TABLE.read_bytes() == written
    assert written.count(b"\n") == 5  # a row a line


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"source": "0" * 64}, "measured with another source"),
        ({"architecture": "interpreter"}, "measured on no GPU"),
        ({"backend": "reference"}, "there is no such kernel"),
        ({"operation": "none"}, "there is no such kernel"),
    ],
)
def test_rows_that_say_nothing_of_these_kernels_are_left_out(files, capsys, change, reason):
    """Those that the table had, too."""
    useless = SAMPLE | change
    assert dispatch_table.main(*files([useless], [TOPK, useless])) == 1
    assert stored() == [TOPK]
    key = " | ".join(useless[name] for name in dispatch_table.KEY)
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"left out: {key}: {reason}"] * 2
    assert "1 rows" in said.out


@pytest.mark.parametrize(
    "text, place",
    [
        ("[", "expected a JSON list"),
        ("{}", "expected a JSON list of rows, got dict"),
        (json.dumps([SAMPLE, {}]), "row 2: expected strings operation"),
        (json.dumps([SAMPLE | {"speedup": "2"}]), "row 1: expected strings"),
        (json.dumps([SAMPLE | {"speedup": -1}]), "row 1: expected strings"),
        (json.dumps([SAMPLE | {"speedup": float("nan")}]), "row 1: expected strings"),
        (json.dumps([SAMPLE | {"bucket": 3}]), "row 1: expected strings"),
        (json.dumps([SAMPLE | {"extra": "x"}]), "row 1: expected strings"),
    ],
)
def test_files_that_are_no_rows(files, capsys, text, place):
    """One line, and the table stays as it was."""
    (path,) = files([SAMPLE], text)
    assert dispatch_table.main(path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: {place}") and said.count("\n") == 1
    assert stored() == [SAMPLE]


def test_no_file_and_a_missing_one(files, capsys):
    files([])
    assert dispatch_table.main() == 2 and dispatch_table.main("none.json") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("ROWS: expected at least one file") and "none.json" in second


def test_rows_of_a_run_are_worst_cases_of_whole_buckets(files, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch_table, "architecture", lambda: "sm_90")
    path = tmp_path / "rows.json"
    rows = dispatch_table.Rows(path, "sample", "triton", ["a", "b", "a", "c", "c"])
    found = [json.loads(path.read_text())]
    for bucket, speedup in [("a", 3.0), ("b", 0.7), ("a", 2.5), ("c", 9.0)]:
        rows.add(bucket, speedup)
        found.append(json.loads(path.read_text()))
    slow = SAMPLE | {"bucket": "b", "speedup": 0.7}
    assert found == [[], [], [slow], [SAMPLE, slow], [SAMPLE, slow]]
    rows.add("c", 0.0)  # not right
    wrong = SAMPLE | {"bucket": "c", "speedup": 0.0}
    assert json.loads(path.read_text()) == [SAMPLE, slow, wrong]
    files([])
    assert dispatch_table.main(str(path)) == 0 and stored() == [SAMPLE, slow, wrong]
