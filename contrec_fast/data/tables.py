"""Interaction logs of any of the usual forms (folder, CSV, Parquet, RecBole) to a `Dataset`."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from contrec_fast.config import DataConfig
from contrec_fast.data.columns import encode, id_column, read_table, text_column, time_column
from contrec_fast.data.files import shorten
from contrec_fast.data.interactions import Dataset, Items, read_folder

# The first of these that an items table has; some are what RecBole's data sets use.
TITLES = ("title", "name", "movie_title")
CATEGORIES = ("categories", "category", "class", "genre", "genres")
# Lists of strings as Python and JSON print them, their brackets being optional.
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
PRINTED_LIST = re.compile(
    rf"\[\s*]|\[?\s*(?:{QUOTED.pattern})(?:\s*,\s*(?:{QUOTED.pattern}))*\s*]?", re.DOTALL
)
PHRASES = re.compile(r"[>|,]| & ")  # in columns whose blanks are within names


def read_data(
    path: str | Path,
    config: DataConfig | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Dataset:
    """Read interactions and what is known of their items.

    path is one of
    - a folder with `train.txt` and `test.txt` (see `read_folder`);
    - a `.csv`, `.csv.gz`, `.tsv` or `.parquet` file with the columns user_id, item_id and
      timestamp. Items come from `config.items` or else from `items.csv` or `items.parquet` beside
      it, if there: item_id and, optionally, title and category;
    - a RecBole `NAME.inter` file (tabs, `user_id:token item_id:token timestamp:float`) with
      `NAME.item` beside it, if there, or a folder with exactly one `.inter` file.
    Other columns are ignored. Titles may also be called name or movie_title, categories
    categories, class, genre or genres. Of several categories one is taken: the last, most
    specific of "A > B", else the first of "A|B", of "A, B" (but a column called category has one,
    which may contain a comma), or of a list in Parquet or as Python and JSON print one, whose
    entries are taken as they are. RecBole's `token_seq` is a title of several words, or several
    categories whatever the column is called: separated by blanks, as RecBole has it ("Action
    Comedy"), unless the column shows that its blanks are within names, by a ">", "|" or "," or by
    a "&" between blanks in any row ("Hotels & Travel, Tours"; then "Active Life" is one).

    Ids are strings, taken exactly as they are, blanks included; integers in Parquet become
    decimal strings; an empty or missing id is refused. Timestamps are numbers or ISO 8601 dates
    and datetimes (of the years 1678 to 2261, UTC unless they say otherwise).

    In this order: rows that equal an earlier one in user, item and time are dropped; with
    `config.core` > 0, users and items with fewer interactions are dropped until none is left,
    and the catalog is what remains; each user's interactions are sorted by time, in the order of
    the file where times are equal or, with `config.shuffle_ties`, in an order drawn by `seed`
    that does not depend on other rows. The target is the last item; with `config.holdout`
    "validation" that one is left out and the target is the one before; with "none" histories are
    whole and there are no targets. A user whose items do not suffice has target -1, so that rows
    mean the same users whatever the holdout. Buying an item again is legal and kept.

    Users and items are in ascending order of their ids (code points); those of a train.txt folder
    keep its order. The catalog is every item that interactions or the items table name.

    say: called with one line of counts, which also tells of how many items one of several
    categories was taken, with an example. Raises ValueError, one line that begins with the file
    (and the line, or the row of Parquet, if one is to blame), when anything else is found.
    """
    config, path = config or DataConfig(), Path(path)
    if not path.exists():
        raise ValueError(f"{path}: expected a file or folder, got nothing")
    if path.is_dir() and any((path / name).exists() for name in ("train.txt", "test.txt")):
        for name in ("items", "shuffle_ties"):
            if value := getattr(config, name):
                raise ValueError(
                    f"{path}: expected no data.{name} for a folder of train.txt and test.txt, "
                    f"which has its own item_list.txt and no times, got {value!r}"
                )
        user_ids, catalog, users, items = _flatten(read_folder(path))
        notes = []
    else:
        path = _the_inter_file(path) if path.is_dir() else path
        user_ids, catalog, users, items, notes = _read_log(path, config, seed)
    before = len(user_ids), len(catalog)
    if config.core:
        keep = _core(users, items, config.core)
        if not len(keep):
            raise ValueError(
                f"{path}: expected users and items with {config.core} interactions among each "
                "other (data.core), got none"
            )
        kept, items = np.unique(items[keep], return_inverse=True)
        columns = (catalog.ids, catalog.titles, catalog.categories)
        catalog = Items(*([column[item] for item in kept.tolist()] for column in columns))
        kept, users = np.unique(users[keep], return_inverse=True)
        user_ids = [user_ids[user] for user in kept.tolist()]
    if say is not None:
        line = f"{len(user_ids):,} users, {len(catalog):,} items, {len(items):,} interactions"
        if config.core:
            notes.append(f"{config.core}-core of {before[0]:,} users and {before[1]:,} items")
        say("; ".join([line, *notes]))
    return _leave_one_out(user_ids, catalog, users, items).hold_out(config.holdout)


def _flatten(dataset: Dataset) -> tuple[list[str], Items, np.ndarray, np.ndarray]:
    """User ids, catalog, and the user row and item of every interaction, targets last."""
    pairs = zip(dataset.histories, dataset.targets, strict=True)
    sequences = [np.append(history, target) for history, target in pairs]
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    return dataset.user_ids, dataset.items, users, np.concatenate(sequences)


def _read_log(path: Path, config: DataConfig, seed: int):
    """The same of a table, sorted by user and time; last, notes on what was left out."""
    table = read_table(path, ("user_id", "item_id", "timestamp"))
    user_ids, users = encode(id_column(table, "user_id"))
    item_ids, items = encode(id_column(table, "item_id"))
    times = time_column(table, "timestamp")
    log = pd.DataFrame({"user": users, "item": items, "time": times})
    distinct = log[~log.duplicated()]
    dropped = len(log) - len(distinct)
    notes = [f"{dropped:,} duplicate rows dropped"] if dropped else []
    log = _sort(distinct, user_ids, item_ids, seed if config.shuffle_ties else None)
    items_path = _items_path(path, config.items)
    catalog, position = _catalog(item_ids, _read_items(items_path, notes) if items_path else {})
    items = position[log["item"].to_numpy()]
    return user_ids, catalog, log["user"].to_numpy(), items, notes


def _catalog(chosen: list[str], listed: dict[str, tuple[str, str]]) -> tuple[Items, np.ndarray]:
    """All items by ascending id, and where each of the chosen (sorted) is among them [C]."""
    ids = sorted({*chosen, *listed})
    index = {item: at for at, item in enumerate(ids)}
    known = [listed.get(item, ("", "")) for item in ids]
    catalog = Items(ids, [title for title, _ in known], [category for _, category in known])
    return catalog, np.array([index[item] for item in chosen], dtype=np.int64)


def _sort(log: pd.DataFrame, user_ids: list[str], item_ids: list[str], seed) -> pd.DataFrame:
    """By user, then time, then order of rows or, with a seed, a hash of the row and the seed."""
    keys = [log["time"], log["user"]]
    if seed is not None:
        # Hashed as ids: a code depends on which other ids there are.
        named = log.assign(
            user=pd.Categorical.from_codes(log["user"], user_ids),
            item=pd.Categorical.from_codes(log["item"], item_ids),
        )
        hash_key = f"{seed % 2**64:016x}"
        keys.insert(0, pd.util.hash_pandas_object(named, index=False, hash_key=hash_key))
    return log.iloc[np.lexsort(keys)]


def _core(users: np.ndarray, items: np.ndarray, core: int) -> np.ndarray:
    """Which interactions are left once all users and items have `core` of them, ascending."""
    keep = np.arange(len(users))
    while True:
        counts = (np.bincount(codes[keep])[codes[keep]] for codes in (users, items))
        enough = np.logical_and(*(count >= core for count in counts))
        if enough.all():
            return keep
        keep = keep[enough]


def _leave_one_out(user_ids, catalog: Items, users: np.ndarray, items: np.ndarray) -> Dataset:
    """Each user's last item is the target, unless it is the only one; rows are sorted by user."""
    ends = np.cumsum(np.bincount(users, minlength=len(user_ids)))
    starts = np.append(0, ends[:-1])
    alone = ends - starts == 1
    bounds = zip(starts.tolist(), (ends - ~alone).tolist(), strict=True)
    histories = [items[start:end] for start, end in bounds]
    return Dataset(catalog, user_ids, histories, np.where(alone, -1, items[ends - 1]))


def _the_inter_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise ValueError(
            f"{folder}: expected a folder with train.txt and test.txt or with one .inter file, "
            f"got one with {len(found) or 'neither'}{' .inter files' if found else ''}"
        )
    return found[0]


def _items_path(path: Path, given: str) -> Path | None:
    """Where titles and categories are: the file that is named, or else one beside the log."""
    if given:
        return Path(given)
    recbole = path.suffix.lower() == ".inter"
    names = [path.stem + ".item"] if recbole else ["items.csv", "items.parquet"]
    beside = [path.with_name(name) for name in names if name != path.name]
    found = [path for path in beside if path.exists()]
    if len(found) > 1:
        raise ValueError(f"{found[0]}: expected it or {found[1].name} or data.items, got both")
    return found[0] if found else None


def _read_items(path: Path, notes: list[str]) -> dict[str, tuple[str, str]]:
    """{item id: (title, category)}, each "" where unknown; a note of categories left out."""
    table = read_table(path, ("item_id",), (TITLES, CATEGORIES))
    ids = id_column(table, "item_id").to_pylist()
    rows: dict[str, int] = {}
    for row, item in enumerate(ids):
        if rows.setdefault(item, row) != row:
            raise ValueError(
                f"{table.where(row)}: expected each item_id once, got {shorten(item)} again"
            )
    titles = categories = [""] * len(ids)
    for name in table.columns:
        if name in TITLES:
            titles = text_column(table, name)
        if name in CATEGORIES:
            values = text_column(table, name, lists=True)
            categories = _first_categories(values, name, table.kinds.get(name), notes)
    return dict(zip(ids, zip(titles, categories, strict=True), strict=True))


def _first_categories(values: list, name: str, kind: str | None, notes: list[str]) -> list[str]:
    """One category of each value of a column, which may name several."""
    words = kind == "token_seq"
    marks = ">|" if name == "category" and not words else ">|,"
    if words and not any(map(PHRASES.search, values)):
        marks += " "
    parts = [_split(value, marks) for value in values]
    several = [row for row, part in enumerate(parts) if len(part) > 1]
    if several:
        kept, value = parts[several[0]][0], values[several[0]]
        notes.append(
            f"{len(several):,} items with several categories in {name}, of which one is kept "
            f"({shorten(kept)} of {shorten(str(value))})"
        )
    return [part[0] if part else "" for part in parts]


def _split(value: str | list[str | None], marks: str) -> list[str]:
    """The categories that a value names, none empty, the one to keep first.

    In a text that is no printed list, the first of the marks that is there separates them.
    """
    if isinstance(value, list):
        return [*filter(None, value)]
    if PRINTED_LIST.fullmatch(value.strip()):
        quoted = (text[1:-1].strip() for text in QUOTED.findall(value))
        return [re.sub(r"\\(['\"\\])", r"\1", text) for text in quoted if text]
    mark = next((mark for mark in marks if mark in value), None)
    if mark is None:
        return [value] if value else []
    parts = [part for part in map(str.strip, value.split(mark)) if part]
    return parts[::-1] if mark == ">" else parts
