"""A dataset as a run keeps it: two Parquet files that hold all that a `Dataset` does."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from contrec_fast.data.columns import Table, read_table, text_column
from contrec_fast.data.files import require_free, write_whole
from contrec_fast.data.interactions import Dataset, Items


def save_dataset(dataset: Dataset, folder: str | Path) -> None:
    """Write what `load_dataset(folder)` turns into the same dataset.

    `items.parquet` has item_id, title and category (strings) and a row per item; `users.parquet`
    has user_id (string), history (list of int64, rows of `items.parquet` counted from 0, oldest
    first) and target (int64, null where there is none). The folder appears whole or not at all.

    Raises ValueError when it exists and is not an empty folder, when there are no users and when
    a string is not valid Unicode.
    """
    require_free(folder := Path(folder))
    if not dataset.user_ids:
        raise ValueError("dataset: expected at least one user, got none")
    items, targets = dataset.items, np.asarray(dataset.targets)
    offsets = np.cumsum([0, *map(len, dataset.histories)])
    try:
        tables = {
            "items.parquet": {
                "item_id": pa.array(items.ids, pa.string()),
                "title": pa.array(items.titles, pa.string()),
                "category": pa.array(items.categories, pa.string()),
            },
            "users.parquet": {
                "user_id": pa.array(dataset.user_ids, pa.string()),
                "history": pa.ListArray.from_arrays(offsets, np.concatenate(dataset.histories)),
                "target": pa.array(targets, pa.int64(), mask=targets < 0),
            },
        }
    except UnicodeEncodeError as error:
        got = error.object[error.start]
        raise ValueError(f"dataset: expected valid Unicode, got {got!r}") from None
    contents = {}
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), content := io.BytesIO())
        contents[name] = content.getvalue()
    write_whole(folder, contents)


def load_dataset(folder: str | Path) -> Dataset:
    """Read what `save_dataset` wrote.

    Raises ValueError, one line that begins with the file, when it holds anything else.
    """
    folder = Path(folder)
    items_path, users_path = folder / "items.parquet", folder / "users.parquet"
    table = read_table(items_path, ("item_id", "title", "category"))
    columns = [_texts(table, name) for name in table.columns]
    try:
        items = Items(*columns)
    except ValueError as error:
        raise ValueError(f"{items_path}: {error}") from None

    table = read_table(users_path, ("user_id", "history", "target"))
    history, target = table.columns["history"].combine_chunks(), table.columns["target"]
    for name, kind in (("history", pa.list_(pa.int64())), ("target", pa.int64())):
        got = table.columns[name].type
        if got != kind:
            raise ValueError(f"{users_path}: expected {name} as {kind}, got {got}")
    table.refuse(pc.is_null(history), "history", "a list")
    chosen = history.flatten()
    if chosen.null_count:
        raise ValueError(f"{users_path}: expected positions of items as history, got a null")
    ends = np.cumsum(pc.list_value_length(history).to_numpy())
    # A copy: Arrow's memory must not be written to.
    histories = np.split(chosen.to_numpy().copy(), ends[:-1])
    targets = target.fill_null(-1).to_numpy().copy()
    try:
        return Dataset(items, _texts(table, "user_id"), histories, targets)
    except ValueError as error:
        raise ValueError(f"{users_path}: {error}") from None


def _texts(table: Table, name: str) -> list[str]:
    table.refuse(pc.is_null(table.columns[name]), name, "a string")
    return text_column(table, name)
