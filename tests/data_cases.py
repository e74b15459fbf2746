"""What the tests of data share: random data sets, the comparison of two, tables as files."""

import csv
import gzip

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from contrec_fast.data import Dataset, Items

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

LOGS = ["log.csv", "log.tsv", "log.csv.gz", "log.parquet", "log.inter"]
LOG = {"user_id": ["b", "a", "a", "b", "a"], "item_id": [*"xyzzx"], "timestamp": [5, 3, 1, 4, 2]}
ITEMS = {"item_id": ["y", "w", "x"], "title": ["Y", "W, w", "X"], "category": ["Tea", "", "Tea"]}
TYPES = {"timestamp": "float", "title": "token_seq", "category": "token"}


@st.composite
def datasets(draw, texts=text, lowest_target=0):
    ids = draw(st.lists(text, min_size=1, max_size=7, unique=True))
    columns = st.lists(texts, min_size=len(ids), max_size=len(ids))
    items = Items(ids, draw(columns), draw(columns))
    users = draw(st.lists(text, min_size=1, max_size=5, unique=True))
    index = st.integers(0, len(ids) - 1)
    histories = [np.array(draw(st.lists(index, min_size=1, max_size=6))) for _ in users]
    targets = np.array([draw(st.integers(lowest_target, len(ids) - 1)) for _ in users])
    return Dataset(items, users, histories, targets)


def assert_same(a: Dataset, b: Dataset):
    assert (a.items, a.user_ids) == (b.items, b.user_ids)
    assert [h.tolist() for h in a.histories] == [h.tolist() for h in b.histories]
    assert all(h.dtype == np.int64 for h in b.histories)
    assert b.targets.dtype == np.int64
    np.testing.assert_array_equal(a.targets, b.targets)


@st.composite
def mutated(draw, data: bytes):
    """Some bytes of a file replaced, removed, put in or cut off; or any other bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.sampled_from([0, 0, 1, 1, 2, 8, len(data)]))
        likely = [b'"', b"\n", b"\r", b",", b"\t", b"\0", b"1e999", b"\xff", b"-", b":", b"nan"]
        data = data[:start] + draw(st.sampled_from(likely) | st.binary(max_size=4)) + data[end:]
    return data


def assert_one_line(error: Exception, path) -> None:
    assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1, str(error)


def encode(name: str, columns: dict) -> bytes:
    """A table as the content of a file of that name."""
    frame = pd.DataFrame(columns)
    if name.endswith(".parquet"):
        return frame.to_parquet()
    if name.endswith((".inter", ".item")):
        frame.columns = [f"{column}:{TYPES.get(column, 'token')}" for column in frame]
    sep = "," if ".csv" in name else "\t"
    data = frame.to_csv(sep=sep, index=False, quoting=csv.QUOTE_ALL).encode()
    return gzip.compress(data) if name.endswith(".gz") else data


def items_name(log: str) -> str:
    """What the items table beside a log of that name is called."""
    special = {"log.inter": "log.item", "log.parquet": "items.parquet"}
    return special.get(log, "items.csv")


def write(folder, name="log.csv", log=LOG, items=None):
    path = folder / name
    path.write_bytes(log if isinstance(log, bytes) else encode(name, log))
    if items is not None:
        (folder / items_name(name)).write_bytes(encode(items_name(name), items))
    return path
