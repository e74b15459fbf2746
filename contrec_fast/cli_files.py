"""The tables that the command line reads and writes."""

import os
import re
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from contrec_fast.data.columns import id_column, read_table, text_column
from contrec_fast.data.files import decode, read_bytes, whole_file

SUFFIXES = (".csv", ".parquet")
STANDARD_OUTPUT = Path("-")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, blanks included; empty ones mean nothing."""
    # str.splitlines would also break lines at characters that an id may have.
    return [line for line in re.split("[\r\n]", decode(path, read_bytes(path))) if line]


def read_histories(path: Path) -> pd.DataFrame:
    """user_id and item_id of a table, each id stored once."""
    names = "user_id", "item_id"
    table = read_table(path, names)
    return pa.table(
        {name: id_column(table, name).dictionary_encode() for name in names}
    ).to_pandas()


def read_items(path: Path) -> pd.DataFrame:
    """item_id, title and, if it is there, category of a table, as strings."""
    table = read_table(path, ("item_id", "title"), (("category",),))
    columns = {name: text_column(table, name) for name in table.columns}
    return pd.DataFrame(columns | {"item_id": id_column(table, "item_id").to_pylist()})


def require_table(path: Path) -> None:
    """ValueError, in one line, for a file that `write_table` could not write."""
    if path == STANDARD_OUTPUT:
        return
    if path.suffix not in SUFFIXES:
        raise ValueError(f"out: expected -, a .csv or a .parquet file, got {path}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"out: expected a file in a folder that can be written to, got {path}")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV to a file or, for "-", to standard output."""
    csv = {"index": False, "float_format": "%.6f", "lineterminator": "\n"}
    if path == STANDARD_OUTPUT:
        table.to_csv(sys.stdout, **csv)
        sys.stdout.flush()  # a closed pipe shows here, not when the program ends
        return
    with whole_file(path) as partial:
        table.to_csv(partial, **csv)
