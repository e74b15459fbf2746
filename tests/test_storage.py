"""A run's data: the round trip, every refusal, any bytes, and nothing half-written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import assert_one_line, assert_same, datasets, mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from contrec_fast.data import Dataset, Items, load_dataset, save_dataset, synthetic_shop

ITEMS = {"item_id": ["x", "y"], "title": ["X", ""], "category": ["", "Tea"]}
USERS = {"user_id": ["a", "b"], "history": [[0, 1, 0], [1]], "target": [1, None]}


def write(folder, items=ITEMS, users=USERS):
    for name, columns in (("items", items), ("users", users)):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


@settings(deadline=None, max_examples=150)
@given(data=datasets(lowest_target=-1))
def test_saved_data_loads_the_same(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "data"
    save_dataset(data, folder)
    loaded = load_dataset(folder)
    assert_same(data, loaded)
    assert all(array.flags.writeable for array in (*loaded.histories, loaded.targets))
    assert [path.name for path in folder.parent.iterdir()] == ["data"]  # nothing temporary stays


def test_files_are_plain_tables(tmp_path):
    write(tmp_path)
    save_dataset(load_dataset(tmp_path), tmp_path / "again")
    for name, columns in (("items", ITEMS), ("users", USERS)):
        assert pq.read_table(tmp_path / "again" / f"{name}.parquet").to_pydict() == columns


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("item_id", ["x", "x"], "items.parquet: items.ids: expected each id once, got 'x' twice"),
        ("item_id", ["x", None], "items.parquet, row 2: expected a string as item_id, got None"),
        ("title", [None, "Y"], "items.parquet, row 1: expected a string as title, got None"),
        ("category", [1.5, 2.5], "items.parquet, row 1: expected strings .* category, got a doub"),
        ("user_id", ["a", "a"], "users.parquet: user_ids: expected each id once, got 'a' twice"),
        ("user_id", [None, "a"], "users.parquet, row 1: expected a string as user_id, got None"),
        ("history", [[0], None], "users.parquet, row 2: expected a list as history, got None"),
        ("history", [[0], []], "users.parquet: histories: expected an item for user row 1, got no"),
        ("history", [[0], [None]], "users.parquet: expected positions of .* history, got a null"),
        ("history", [[0], [2]], "users.parquet: histories: expected item indices from 0 to 1, got"),
        ("history", [[0], [-1]], "users.parquet: histories: expected item indices from 0 to 1"),
        ("history", [[0.0], [1.0]], "users.parquet: expected history as list<.*int64>, got list<"),
        ("history", [0, 1], "users.parquet: expected history as list<.*int64>, got int64"),
        ("target", [0, 2], "users.parquet: targets: expected item indices from -1 to 1, got 0 t"),
        ("target", ["0", "1"], "users.parquet: expected target as int64, got string"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, column, values, message):
    items, users = ({**table} for table in (ITEMS, USERS))
    (items if column in items else users)[column] = values
    write(tmp_path, items, users)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(tmp_path)
    assert_one_line(error.value, tmp_path)


def test_refuses_missing_files_columns_and_rows(tmp_path):
    with pytest.raises(ValueError, match="items.parquet: expected a file, got nothing"):
        load_dataset(tmp_path)
    write(tmp_path, users={"user_id": ["a"], "history": [[0]]})
    with pytest.raises(ValueError, match="'user_id, history' without target"):
        load_dataset(tmp_path)
    write(tmp_path, items={name: pa.array([], pa.string()) for name in ITEMS})
    with pytest.raises(ValueError, match="items.parquet: expected rows, got only the names of"):
        load_dataset(tmp_path)


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(["items.parquet", "users.parquet"]), data=st.data())
def test_any_bytes_give_a_dataset_or_one_line(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("bytes")
    write(folder)
    content = data.draw(mutated((folder / name).read_bytes()))
    (folder / name).write_bytes(content)
    try:
        assert isinstance(load_dataset(folder), Dataset)
    except ValueError as error:
        assert_one_line(error, folder)


def test_save_refuses_and_leaves_nothing_behind(tmp_path, monkeypatch):
    shop = synthetic_shop(5, 60)
    (full := tmp_path / "full").mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="full: expected a new or empty folder, got one that exi"):
        save_dataset(shop, full)
    target = tmp_path / "inner" / "data"
    with pytest.raises(ValueError, match="dataset: expected at least one user, got none"):
        save_dataset(shop.of_users(np.array([], dtype=np.int64)), target)
    lone = Dataset(Items(["\ud800"], [""], [""]), ["u"], [np.array([0])], np.array([0]))
    with pytest.raises(ValueError, match=r"dataset: expected valid Unicode, got '\\ud800'"):
        save_dataset(lone, target)
    assert not target.parent.exists()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_dataset(shop, target)
    assert list(target.parent.iterdir()) == []
