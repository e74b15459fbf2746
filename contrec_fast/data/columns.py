"""Columns of CSV, TSV, RecBole and Parquet files, checked, with a name for every row."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from contrec_fast.data.files import decode, read_bytes, shorten

DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
NUMBER = r"^-?\d+(\.\d+)?([eE][+-]?\d+)?$"
ISO_8601 = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?$"
# The fields of a last row that is added to a file: missing, a quote left open has swallowed it.
LAST = "\x1a"
PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError)


@dataclass(frozen=True)
class Table:
    """Some columns of a file, at least one row of them.

    kinds: RecBole's types of fields. where: names a row (counted from 0) for an error.
    """

    columns: dict[str, pa.ChunkedArray]
    kinds: dict[str, str]
    where: Callable[[int], str]

    def refuse(self, bad: pa.ChunkedArray, name: str, expected: str) -> None:
        """ValueError for the first row that is true in `bad` [rows], if there is one."""
        row = pc.index(bad, pa.scalar(True)).as_py()
        if row >= 0:
            value = self.columns[name][row].as_py()
            got = shorten(value) if isinstance(value, str) else value
            raise ValueError(f"{self.where(row)}: expected {expected} as {name}, got {got}")


def read_table(path: Path, required: Sequence[str], choices: Sequence[Sequence[str]] = ()) -> Table:
    """The required columns and, of each of the choices, the first name that the file has.

    Columns of text files are strings, those of Parquet what they are there. Raises ValueError,
    one line with the file and the line, for what is not such a file or has no rows.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        table = _read_parquet(path, required, choices)
    else:
        ending = next((ending for ending in DELIMITERS if name.endswith(ending)), None)
        if ending is None:
            raise ValueError(
                f"{path}: expected a file of type {', '.join(DELIMITERS)} or .parquet, "
                f"got {path.suffix or 'none'}"
            )
        table = _read_text(path, DELIMITERS[ending], required, choices)
    if not len(table.columns[required[0]]):
        raise ValueError(f"{path}: expected rows, got only the names of columns")
    return table


def id_column(table: Table, name: str) -> pa.ChunkedArray:
    """Ids as strings [rows], none of them empty."""
    ids = _strings(table, name)
    table.refuse(pc.or_kleene(pc.is_null(ids), pc.equal(ids, "")), name, "an id")
    return ids


def text_column(table: Table, name: str, lists: bool = False) -> list:
    """Texts, "" where there is none; with `lists`, each may be a list of strings instead."""
    column = table.columns[name]
    if lists and pa.types.is_list(column.type) and _is_string(column.type.value_type):
        return [texts or [] for texts in column.to_pylist()]
    return _strings(table, name).fill_null("").to_pylist()


def time_column(table: Table, name: str) -> np.ndarray:
    """Times as numbers [rows], int64 or finite float64, of whatever unit."""
    column = _decoded(table, name)
    expected = "a number or an ISO 8601 date or datetime"
    table.refuse(pc.is_null(column), name, expected)
    if _is_string(column.type):
        if not pc.match_substring_regex(column[:1], NUMBER)[0].as_py():
            return _iso_times(table, name, column, expected)
        numbers = pc.match_substring_regex(column, NUMBER)
        table.refuse(pc.invert(numbers), name, "a number, like those before,")
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            column = column.cast(pa.float64())
    if pa.types.is_floating(column.type):
        table.refuse(pc.invert(pc.is_finite(column)), name, "a finite number")
        return column.cast(pa.float64()).to_numpy()
    if pa.types.is_date32(column.type):
        column = column.cast(pa.int32())
    kinds = (pa.types.is_integer, pa.types.is_timestamp, pa.types.is_date)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise ValueError(f"{table.where(0)}: expected {expected} as {name}, got a {column.type}")
    try:
        return column.cast(pa.int64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        got = _one_line(error)
        raise ValueError(f"{table.where(0)}: expected {expected} as {name}, got {got}") from None


def encode(ids: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The different ids, ascending by code point, and the position of each row's among them."""
    encoded = ids.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)).to_pylist(), position[encoded.indices]


def _iso_times(table: Table, name: str, column: pa.ChunkedArray, expected: str) -> np.ndarray:
    times = pd.to_datetime(column.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    legal = pc.match_substring_regex(column, ISO_8601)  # pandas knows words such as "today", too
    table.refuse(pc.or_(pc.invert(legal), pa.array(times.isna())), name, expected)
    return times.astype("int64").to_numpy()


def _decoded(table: Table, name: str) -> pa.ChunkedArray:
    """A column without the dictionary that Parquet may keep its values in, strings as one type."""
    column = table.columns[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_string()) if _is_string(column.type) else column


def _strings(table: Table, name: str) -> pa.ChunkedArray:
    column = _decoded(table, name)
    kinds = (_is_string, pa.types.is_integer, pa.types.is_null)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise ValueError(
            f"{table.where(0)}: expected strings or whole numbers as {name}, got a {column.type}"
        )
    return column.cast(pa.large_string())


def _is_string(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _one_line(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 200)


def _choose(where: str, names: list[str], required, choices) -> list[str]:
    """The names to read, each of them there once."""
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(
            f"{where}: expected columns {', '.join(required)}, "
            f"got {shorten(', '.join(names), 200)} without {', '.join(missing)}"
        )
    first = (next((name for name in choice if name in names), None) for choice in choices)
    wanted = [*required, *filter(None, first)]
    for name in wanted:
        if names.count(name) > 1:
            raise ValueError(f"{where}: expected one column {name}, got {names.count(name)}")
    return wanted


def _read_text(path: Path, delimiter: str, required, choices) -> Table:
    data = read_bytes(path)
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected gzip, got {_one_line(error)}") from None
    text = decode(path, data)
    line, header = next(_rows(path, text, delimiter), (0, None))
    if header is None:
        raise ValueError(f"{path}: expected columns {', '.join(required)}, got an empty file")
    # Only RecBole's have a type after a colon; elsewhere it would be a name that is not wanted.
    names, _, kinds = zip(*(name.partition(":") for name in header))
    wanted = _choose(f"{path}, line {line}", list(names), required, choices)
    fields = [header[names.index(name)] for name in wanted]
    last = delimiter.join([LAST] * len(header))
    try:
        table = arrow_csv.read_csv(
            io.BytesIO(f"{text}\n{last}\n".encode()),
            read_options=arrow_csv.ReadOptions(block_size=1 << 24),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=fields,
                column_types={field: pa.large_string() for field in fields},
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowException as error:
        _require_rectangle(path, text, delimiter)
        raise ValueError(f"{path}: expected a table, got {_one_line(error)}") from None
    if any(table[field][-1].as_py() != LAST for field in fields):
        _require_rectangle(path, text, delimiter)
        raise ValueError(f"{path}: expected every quote closed, got one open at the end")
    columns = {name: table[field][:-1] for name, field in zip(wanted, fields)}

    def where(row: int) -> str:
        line, _ = next(islice(_rows(path, text, delimiter), row + 1, None))
        return f"{path}, line {line}"

    return Table(columns, dict(zip(names, kinds)), where)


def _rows(path: Path, text: str, delimiter: str, strict=False) -> Iterator[tuple[int, list[str]]]:
    """(line where it starts, fields) of each row: slow, for the header and to name a line."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=strict)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: expected a row, got: {error}") from None
        if row is None:
            return
        if row:  # empty lines mean nothing
            yield line, row


def _require_rectangle(path: Path, text: str, delimiter: str) -> None:
    """Name the first line with bad quotes or another number of fields than the header."""
    rows = _rows(path, text, delimiter, strict=True)
    _, header = next(rows)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} columns, got {len(row)}")


def _read_parquet(path: Path, required, choices) -> Table:
    data = read_bytes(path)
    if not data:
        raise ValueError(f"{path}: expected columns {', '.join(required)}, got an empty file")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
    except PARQUET_ERRORS as error:
        raise ValueError(f"{path}: expected Parquet, got {_one_line(error)}") from None
    wanted = _choose(str(path), names, required, choices)
    try:
        table = file.read(columns=wanted)
        table.validate(full=True)  # else text that is not UTF-8 would come up later
    except PARQUET_ERRORS as error:
        raise ValueError(f"{path}: expected readable columns, got {_one_line(error)}") from None
    return Table({name: table[name] for name in wanted}, {}, lambda row: f"{path}, row {row + 1}")
