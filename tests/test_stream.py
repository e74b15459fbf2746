"""Lists in chunks: the same rows as all at once, and jobs that go on where they stopped."""

import copy
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from model_cases import Recorder, random_model, trained_model
from ops_cases import refused

from contrec_fast.engine import Engine, Recommender
from contrec_fast.engine import lists as lists_module
from contrec_fast.engine.ahead import ahead
from contrec_fast.engine.lists import Recommendations, table_of

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


def test_batches_prepared_ahead_give_the_same_lists(recommender, monkeypatch):
    expected = recommender.engine.recommend(range(USERS), 3, batch_size=4)
    monkeypatch.setattr(lists_module, "BUSY_ELSEWHERE", ("cpu",))
    recommender.engine.reader.forget()
    found = recommender.engine.recommend(range(USERS), 3, batch_size=4)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    assert found.texts == expected.texts


def test_threads_that_share_a_recommender_get_their_own_lists():
    recommender = Recommender(random_model("prompt.response_tokens=20"))
    users = np.array(recommender.model.dataset.user_ids)
    whole = recommender.recommend(k=3).set_index("user_id")
    some = [list(users[np.random.permutation(USERS)[:5]]) for _ in range(40)]
    with ThreadPoolExecutor(4) as threads:
        tables = list(threads.map(lambda part: recommender.recommend(part, k=3), some))
    for part, table in zip(some, tables):
        expected = whole.loc[part].reset_index()
        pd.testing.assert_frame_equal(table, expected, rtol=1e-4)


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


KILLED = """
import os, signal, sys
import torch
from contrec_fast.engine import Engine, Recommender

honest, left = Engine.recommend, int(sys.argv[4])

def recommend(self, rows, k):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return honest(self, rows, k)

Engine.recommend = recommend
torch.set_num_threads(int(sys.argv[3]))
Recommender(sys.argv[1]).write_lists(sys.argv[2], k=3, chunk=7)
"""


def test_a_killed_process_is_resumed_to_the_same_bytes(recommender, served, tmp_path):
    run, whole, out = (tmp_path / name for name in ("run", "whole.parquet", "lists.parquet"))
    recommender.model.save_pretrained(run)
    arguments = [run, out, torch.get_num_threads(), 2]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = [name for name in left_behind(tmp_path / ".lists.parquet.parts") if name[0] != "."]
    assert len(parts) in (1, 2)  # the second may not have been written yet
    Recommender(run).write_lists(out, k=3, chunk=CHUNK)
    assert len(served) == -(-USERS // CHUNK) - len(parts)
    recommender.write_lists(whole, k=3, chunk=CHUNK)
    assert out.read_bytes() == whole.read_bytes()
    assert left_behind(tmp_path) == ["lists.parquet", "run", "whole.parquet"]


def test_what_was_written_before_does_not_matter(tmp_path):
    """Drafts are learned from it, which decide what is read together, and so the rounding."""
    model, fed = random_model("prompt.response_tokens=40"), []
    for before in range(3):
        recommender = Recommender(model)
        for _ in range(before):
            recommender.recommend(k=1)
        counters = recommender.engine.reader.counters
        start = counters["fed"]
        recommender.write_lists(tmp_path / f"{before}.parquet", k=3, chunk=CHUNK)
        fed.append(counters["fed"] - start)
    assert fed[0] == fed[1] == fed[2]


def test_few_chunks_are_held_at_a_time(recommender, monkeypatch, tmp_path):
    alive, most, honest = weakref.WeakSet(), [], Engine.recommend

    def recommend(self, rows, k):
        most.append(len(alive))
        alive.add(lists := honest(self, rows, k))
        return lists

    monkeypatch.setattr(Recommendations, "__hash__", object.__hash__)
    monkeypatch.setattr(Engine, "recommend", recommend)
    recommender.write_lists(tmp_path / "lists.parquet", k=3, chunk=1)
    assert len(most) == USERS and max(most) <= 3


def test_a_failure_to_write_is_told_and_the_rest_is_kept(
    recommender, served, tmp_path, monkeypatch
):
    out, honest, written = tmp_path / "lists.parquet", pq.write_table, []

    def write_table(*arguments):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(honest(*arguments))

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(OSError, match="No space left"):
        recommender.write_lists(out, k=3, chunk=CHUNK)
    assert len(served) == 4  # one more than the one that failed
    assert len(left_behind(tmp_path / ".lists.parquet.parts")) == 2 and not out.exists()
    monkeypatch.undo()
    recommender.write_lists(out, k=3, chunk=CHUNK)
    expected = pd.concat(recommender.recommend_iter(k=3, chunk=CHUNK), ignore_index=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected)


def test_a_failure_beside_the_device_is_the_one_error(recommender, monkeypatch):
    honest, threads = Engine._prepare, threading.active_count()

    def prepare(self, rows):
        assert threading.current_thread() is not threading.main_thread()
        if 20 in rows:
            raise ZeroDivisionError("prepare")
        return honest(self, rows)

    monkeypatch.setattr(Engine, "_prepare", prepare)
    monkeypatch.setattr(lists_module, "BUSY_ELSEWHERE", ("cpu",))
    recommender.engine.recommend(range(20), 3, batch_size=4)
    with pytest.raises(ZeroDivisionError, match="prepare"):
        recommender.engine.recommend(range(USERS), 3, batch_size=4)
    assert threading.active_count() == threads


# Work ahead


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_ahead_are_in_order_and_few(count, most):
    taken, here = [], threading.get_ident()

    def inputs():
        for number in range(count):
            assert threading.get_ident() == here
            taken.append(number)
            yield number

    def call(number):
        assert threading.get_ident() != here
        return -number

    results = ahead(call, inputs(), most)
    for number in range(count):
        assert next(results) == -number
        assert len(taken) == min(number + 1 + most, count)
    assert next(results, None) is None


@pytest.mark.parametrize("where", ["call", "inputs", "caller"])
def test_a_failure_ahead_comes_after_the_results_before_it(where):
    threads, begun, taken = threading.active_count(), [], []

    def fail(number, here):
        if (number, here) == (4, where):
            raise ZeroDivisionError(where)

    def call(number):
        begun.append(number)
        fail(number, "call")
        return number

    def inputs():
        for number in range(9):
            fail(number, "inputs")
            yield number

    def work():
        for number in ahead(call, inputs()):
            taken.append(number)
            fail(number, "caller")

    with pytest.raises(ZeroDivisionError, match=where):
        work()
    assert taken == list(range({"call": 4, "inputs": 3, "caller": 5}[where]))
    assert len(begun) <= len(taken) + 2 and threading.active_count() == threads


# Tables


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (129, 10), (3, 0)])
def test_a_table_has_a_row_for_each_item(recommender, shape):
    dataset, (users, k) = recommender.model.dataset, shape
    rows = np.random.randint(USERS, size=users)
    ids = np.random.randint(-1, len(dataset.items), shape)
    texts = [f"text {number}" for number in np.random.randint(5, size=users)]
    scores = np.random.rand(*shape).astype(np.float32)
    lists = Recommendations(ids, scores, np.random.rand(*shape) < 0.5, texts)
    expected = [
        (dataset.user_ids[row], dataset.items.ids[ids[i, j]], dataset.items.titles[ids[i, j]],
         scores[i, j].item(), j + 1, bool(lists.matched[i, j]), texts[i])
        for i, row in enumerate(rows) for j in range(k) if ids[i, j] >= 0
    ]  # fmt: skip
    table = table_of(dataset, rows, lists)
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    kinds = {"score": "float32", "rank": "int64", "matched": "bool"}
    frame, text = table.to_pandas(), pd.Series(["a"]).dtype
    assert all(frame[name].dtype == kinds.get(name, text) for name in frame)


OTHERS = {
    "text": {"text": False},
    "seed": {"seed": 1},
    "dtype": {"dtype": torch.bfloat16},
    "constrained": {"constrained": True},
    "remembered": {"remembered": 2**24},
}


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


def test_who_is_remembered_does_not_decide_a_file(tmp_path):
    recommender = Recommender(random_model(), remembered=2**24)
    recommender.recommend(k=3)
    recommender.write_lists(tmp_path / "lists.parquet", k=3, chunk=CHUNK)
    counters = recommender.engine.reader.counters
    assert counters["hits"] == 0 and counters["misses"] == 2 * USERS


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
