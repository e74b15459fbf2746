"""`contrec recommend` and `contrec add-items`: for whom, from what, into which file."""

import io
import shutil

import cli_cases
import numpy as np
import pandas as pd
import pytest
from cli_cases import COLUMNS, names, refused, succeeded
from model_cases import (
    small_shop,
)

from contrec_fast import cli_files
from contrec_fast.models.contrec import ContRec

run, world = cli_cases.run, cli_cases.world


def table(text):
    return pd.read_csv(io.StringIO(text), keep_default_na=False)


def seen_by(user):
    shop = small_shop()
    history = shop.complete().histories[shop.user_ids.index(user)]
    return {shop.items.ids[item] for item in history}


def test_lists_are_complete_ordered_and_without_the_history(run):
    result = succeeded(
        "recommend", run, "--users", "user-0003,user-0001", "--users", " user-0030 ", "--k", 4
    )
    assert "\r" not in result.stdout and "Users 1/1" in result.stderr
    lists, shop = table(result.stdout), small_shop()
    assert list(lists.columns) == COLUMNS
    assert list(lists.user_id) == ["user-0003"] * 4 + ["user-0001"] * 4 + ["user-0030"] * 4
    assert list(lists["rank"]) == [1, 2, 3, 4] * 3
    assert list(lists.title) == [shop.items.titles[shop.items.ids.index(i)] for i in lists.item_id]
    assert np.isfinite(lists.score).all() and lists.matched.dtype == bool
    for user, rows in lists.groupby("user_id"):
        assert not seen_by(user) & set(rows.item_id) and rows.score.is_monotonic_decreasing


def test_everybody_by_default_and_lists_as_long_as_there_are_items(run):
    lists = table(succeeded("recommend", run, "--k", 60).stdout)
    shop = small_shop()
    assert list(lists.user_id.unique()) == shop.user_ids
    for user, rows in lists.groupby("user_id"):
        assert set(rows.item_id) == set(shop.items.ids) - seen_by(user)


def test_users_from_a_file_give_the_same_lists(run, tmp_path):
    path = tmp_path / "users.txt"
    path.write_bytes(b"user-0002\r\n\nuser-0009\n")
    assert (
        succeeded("recommend", run, "--users-file", path).stdout
        == succeeded("recommend", run, "--users", "user-0002,user-0009").stdout
    )


@pytest.mark.parametrize("user", ["a,b", " A,1", " c ", "\u2028d\x85", "e\t"])
def test_a_user_id_may_hold_commas_and_blanks(run, tmp_path, user):
    other = shutil.copytree(run, tmp_path / "run")
    users = pd.read_parquet(other / "data" / "users.parquet")
    users.loc[users.user_id == "user-0002", "user_id"] = user
    users.to_parquet(other / "data" / "users.parquet")
    arguments = ("--users", user, "--users", "user-0001, user-0003", "--k", 1)
    lists = table(succeeded("recommend", other, *arguments).stdout)
    assert list(lists.user_id) == [user, "user-0001", "user-0003"]
    (tmp_path / "users.txt").write_text(f"user-0001\n{user}\n", encoding="utf-8")
    arguments = ("--users-file", tmp_path / "users.txt", "--k", 1)
    lists = table(succeeded("recommend", other, *arguments).stdout)
    assert list(lists.user_id) == ["user-0001", user]


def test_new_users_with_histories_get_lists_like_known_ones(run, tmp_path):
    shop = small_shop()
    rows, chosen = ["item_id,user_id,when"], shop.complete().histories
    for row in (4, 7):  # interleaved with another user's
        rows += [f"{shop.items.ids[item]},{shop.user_ids[row]},1" for item in chosen[row]]
        rows.append(f"{shop.items.ids[row]},NA,2")
    path = tmp_path / "histories.csv"
    path.write_text("\n".join(rows))
    lists = table(succeeded("recommend", run, "--histories", path, "--k", 3).stdout)
    assert list(lists.user_id.unique()) == [shop.user_ids[4], "NA", shop.user_ids[7]]
    new = lists[lists.user_id == "NA"]
    assert len(new) == 3 and not {shop.items.ids[4], shop.items.ids[7]} & set(new.item_id)
    known = table(succeeded("recommend", run, "--users", "user-0005,user-0008", "--k", 3).stdout)
    assert shop.user_ids[4] == "user-0005" and shop.user_ids[7] == "user-0008"
    # The same history and id is the same user.
    same = lists[lists.user_id != "NA"].reset_index(drop=True)
    assert list(same.item_id) == list(known.item_id)
    assert np.allclose(same.score, known.score, atol=1e-4)


def test_files_hold_what_standard_output_shows(run, tmp_path):
    arguments = ("recommend", run, "--users", "user-0001,user-0002")
    shown = succeeded(*arguments).stdout
    (tmp_path / "recs.csv").write_text("of before")
    for name in ("recs.csv", "recs.parquet"):
        assert succeeded(*arguments, "--out", tmp_path / name).stdout == ""
    assert (tmp_path / "recs.csv").read_text() == shown
    kept = pd.read_parquet(tmp_path / "recs.parquet")
    assert kept.to_csv(index=False, float_format="%.6f") == shown
    assert names(tmp_path) == {"recs.csv", "recs.parquet"}


def test_a_failed_write_keeps_the_file_of_before(run, tmp_path, monkeypatch):
    def fail(table, path, **_):
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / "recs.csv").write_text("of before")
    monkeypatch.setattr(cli_files.pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError):
        cli_files.write_table(pd.DataFrame({"a": [1]}), tmp_path / "recs.csv")
    assert (tmp_path / "recs.csv").read_text() == "of before"
    assert names(tmp_path) == {"recs.csv"}


@pytest.mark.parametrize("out", ["recs.txt", "recs", "absent/recs.csv", "folder.csv"])
def test_places_that_cannot_be_written_are_refused_before_work(run, tmp_path, monkeypatch, out):
    monkeypatch.setattr(ContRec, "from_pretrained", None)
    (tmp_path / "folder.csv").mkdir()
    line = refused("recommend", run, "--users", "user-0001", "--out", tmp_path / out)
    assert line.startswith("contrec: out: expected ") and line.endswith(f"got {tmp_path / out}")


def test_output_as_a_process_is_clean_and_may_be_closed(run, run_python):
    code = f"""
import os, sys
from contrec_fast.cli import app
if "closed" in os.environ:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, sys.stdout.fileno())
sys.argv = ["contrec", "recommend", {str(run)!r}, "--users", "user-0002"]
app()
"""
    lists = table(run_python(code, OMP_NUM_THREADS="1").stdout)
    assert list(lists.columns) == COLUMNS and list(lists.user_id) == ["user-0002"] * 10
    assert run_python(code, OMP_NUM_THREADS="1", closed="1").stderr == "Users 1/1 batches\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--users", "nobody"], ["users", "'nobody'"]),
        (["--users", "user-0001,,user-0002"], ["users", "''"]),
        (["--users", "user-0001", "--k", 0], ["k: expected at least 1, got 0"]),
        (["--users", "user-0001", "--k", 61], ["k:", "60", "61"]),
        (["--users", "user-0001", "--users-file", "any"], ["--users, --users-file", "got 2"]),
        (["--users", "user-0001", "--histories", "any"], ["--users, --histories", "got 2"]),
        (["--users-file", "FOLDER/none"], ["FOLDER/none: expected a file, got nothing"]),
        (["--users-file", "FOLDER/empty.csv"], ["users", "none"]),
        (["--histories", "FOLDER/none.csv"], ["FOLDER/none.csv: expected a file"]),
        (["--histories", "FOLDER/empty.csv"], ["FOLDER/empty.csv", "user_id, item_id"]),
        (["--histories", "FOLDER/columns.csv"], ["columns.csv, line 1", "user_id, item_id"]),
        (["--histories", "FOLDER/short.csv"], ["short.csv, line 3", "2 columns, got 1"]),
        (["--histories", "FOLDER/strange.csv"], ["user 'me'", "'SKU-9999'"]),
    ],
)  # fmt: skip
def test_recommend_refuses(run, tmp_path, arguments, words):
    for name, text in {
        "empty.csv": "",
        "columns.csv": "user,item\na,b\n",
        "short.csv": "user_id,item_id\na,SKU-0001\na\n",
        "strange.csv": "user_id,item_id\nme,SKU-9999\n",
    }.items():
        (tmp_path / name).write_text(text)
    arguments = [str(argument).replace("FOLDER", str(tmp_path)) for argument in arguments]
    line = refused("recommend", run, *arguments)
    assert all(word.replace("FOLDER", str(tmp_path)) in line for word in words), line


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_refuses_what_is_no_run(run, tmp_path, command):
    assert str(tmp_path / "absent") in refused(command, tmp_path / "absent")
    for name in ("config.yaml", "model.safetensors", "data", "backbone"):
        folder = tmp_path / name
        shutil.copytree(run, folder, ignore=lambda at, _, n=name: [n] if at == str(run) else [])
        line = refused(command, folder)
        assert str(folder) in line and name in line


def test_added_items_are_recommended_by_a_copy_of_the_run(run, tmp_path):
    items, out = tmp_path / "items.csv", tmp_path / "deep" / "run2"
    items.write_text('title,item_id,category\n"Tent, for ""two""",NEW-1,Camping\nTripod,NEW-2,\n')
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    succeeded("add-items", run, items, "--out", out)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert names(tmp_path / "deep") == {"run2"}
    lists = table(succeeded("recommend", out, "--users", "user-0001", "--k", 62).stdout)
    added = lists[lists.item_id.str.startswith("NEW")].set_index("item_id").title
    assert added.to_dict() == {"NEW-1": 'Tent, for "two"', "NEW-2": "Tripod"}
    assert set(lists.item_id) == {"NEW-1", "NEW-2", *small_shop().items.ids} - seen_by("user-0001")


@pytest.mark.parametrize(
    "text, words",
    [
        ("item_id,title\nSKU-0001,Tent\n", ["'SKU-0001'"]),
        ("item_id,title\n,Tent\n", ["items.csv, line 2", "item_id"]),
        ("item_id,category\nN,Tent\n", ["items.csv, line 1", "item_id, title"]),
        ("item_id,title\nN,\n", ["'N'"]),
    ],
)
def test_add_items_refuses_and_leaves_nothing(run, tmp_path, text, words):
    (tmp_path / "items.csv").write_text(text)
    line = refused("add-items", run, tmp_path / "items.csv", "--out", tmp_path / "run2")
    assert all(word in line for word in words), line
    assert names(tmp_path) == {"items.csv"}
    again = refused("add-items", run, tmp_path / "items.csv", "--out", tmp_path)
    assert "out: expected a folder that does not exist yet" in again
