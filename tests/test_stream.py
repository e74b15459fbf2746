"""Lists in chunks: the same rows as all at once, and jobs that go on where they stopped."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from model_cases import Recorder, trained_model
from ops_cases import refused

from contrec_fast.engine import Engine, Recommender

USERS, CHUNK = 30, 7


@pytest.fixture(scope="module")
def recommender():
    return Recommender(trained_model())


@pytest.fixture
def served(monkeypatch):
    """Rows of the chunks that were computed; `served.stop_after` chunks, an interruption."""

    class Served(list):
        stop_after = None

    served, honest = Served(), Engine.recommend

    def counted(self, rows, k):
        if len(served) == served.stop_after:
            raise KeyboardInterrupt
        served.append(np.asarray(rows).tolist())
        return honest(self, rows, k)

    monkeypatch.setattr(Engine, "recommend", counted)
    return served


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("chunk", [1, CHUNK, USERS, 100])
def test_chunks_have_the_rows_of_all_at_once(recommender, chunk):
    whole = recommender.recommend(k=3)
    tables = list(recommender.recommend_iter(k=3, chunk=chunk))
    assert [table.user_id.nunique() for table in tables[:-1]] == [chunk] * (len(tables) - 1)
    joined = pd.concat(tables, ignore_index=True)
    # The language model rounds differently in other batches.
    pd.testing.assert_frame_equal(joined, whole, rtol=1e-4)


def test_lists_are_computed_when_asked_for(recommender, served):
    tables = recommender.recommend_iter(k=3, chunk=CHUNK)
    assert not served
    next(tables)
    assert served == [list(range(CHUNK))]


def test_without_text_nothing_matches(recommender):
    users = recommender.model.dataset.user_ids[:4]
    (table,) = Recommender(recommender.model, text=False).recommend_iter(users, k=3)
    assert (table.text == "").all() and not table.matched.any()
    assert table.user_id.unique().tolist() == users


@pytest.mark.parametrize("stopped", [0, 1, 3])
def test_an_interrupted_file_goes_on_to_the_same_bytes(recommender, served, tmp_path, stopped):
    whole, out = tmp_path / "whole.parquet", tmp_path / "lists.parquet"
    recommender.write_lists(whole, k=3, chunk=CHUNK)
    del served[:]
    served.stop_after = stopped
    with pytest.raises(KeyboardInterrupt):
        recommender.write_lists(out, k=3, chunk=CHUNK)
    assert left_behind(tmp_path) == [".lists.parquet.parts", "whole.parquet"]
    served.stop_after = None
    recommender.write_lists(out, k=3, chunk=CHUNK, progress=(recorder := Recorder()))
    assert served == [list(range(i, min(i + CHUNK, USERS))) for i in range(0, USERS, CHUNK)]
    assert len(recorder.figures["Users"]) == len(served) - stopped
    assert out.read_bytes() == whole.read_bytes()
    assert left_behind(tmp_path) == ["lists.parquet", "whole.parquet"]
    expected = pd.concat(recommender.recommend_iter(k=3, chunk=CHUNK), ignore_index=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)


OTHERS = {"text": {"text": False}, "seed": {"seed": 1}, "dtype": {"dtype": torch.bfloat16}}


@pytest.mark.parametrize("change", ["weights", "k", "users", *OTHERS])
def test_parts_of_another_job_are_not_used(recommender, served, tmp_path, change):
    out, arguments = tmp_path / "lists.parquet", {"k": 3, "chunk": CHUNK}
    served.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        recommender.write_lists(out, **arguments)
    served.stop_after = None
    model = recommender.model
    if change == "weights":
        model = copy.deepcopy(model)
        model.condition.bias.data[0] += 1
        recommender = Recommender(model)
    elif change in ("k", "users"):
        arguments |= {"k": 4} if change == "k" else {"users": model.dataset.user_ids[::-1]}
    else:
        recommender = Recommender(model, **OTHERS[change])
    recommender.write_lists(out, **arguments)
    expected = pd.concat(recommender.recommend_iter(**arguments), ignore_index=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)


def test_another_job_for_the_same_file_meanwhile(recommender, served, tmp_path, monkeypatch):
    """The first loses its chunks, and takes none of the other's for its own."""
    out, honest, arguments = tmp_path / "lists.parquet", Engine.recommend, {"k": 3, "chunk": 7}

    def between(self, rows, k):
        if len(served) == 2:
            monkeypatch.setattr(Engine, "recommend", honest)
            served.stop_after = 4
            with pytest.raises(KeyboardInterrupt):
                recommender.write_lists(out, recommender.model.dataset.user_ids[::-1], **arguments)
            served.stop_after = None
        return honest(self, rows, k)

    monkeypatch.setattr(Engine, "recommend", between)
    with pytest.raises(FileNotFoundError):
        recommender.write_lists(out, **arguments)
    assert not out.exists()
    recommender.write_lists(out, **arguments)
    expected = pd.concat(recommender.recommend_iter(**arguments), ignore_index=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)


def test_a_number_of_numpys(recommender, tmp_path):
    users = recommender.model.dataset.user_ids[:2]
    recommender.write_lists(tmp_path / "lists.parquet", users, k=np.int64(3))
    assert len(pd.read_parquet(tmp_path / "lists.parquet")) == 6


def test_a_folder_is_no_file(recommender, served, tmp_path):
    with refused(ValueError, "path"):
        recommender.write_lists(tmp_path, k=3)
    assert not served and not left_behind(tmp_path)


@pytest.mark.parametrize(
    "bad, kind, word",
    [
        ({"k": 0}, ValueError, "k"),
        ({"k": 2.5}, TypeError, "k"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"users": ["nobody"]}, ValueError, "users"),
        ({"users": []}, ValueError, "users"),
    ],
)
def test_refused_before_anything_is_written(recommender, served, tmp_path, bad, kind, word):
    with refused(kind, word):
        recommender.write_lists(tmp_path / "lists.parquet", **bad)
    assert not served and not left_behind(tmp_path)
