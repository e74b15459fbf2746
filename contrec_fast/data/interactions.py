"""Interactions and catalog: the in-memory form, and the folder format they are read from.

A folder holds `train.txt` and `test.txt` (one line per user, `user item item ...`, oldest item
first; the test line is the train line plus the held-out item), and optionally `item_list.txt` and
`user_list.txt`, space-separated tables with double quotes that give the numbers of the former two
their original ids, titles and categories. This is the layout LightGCN, TokenRec and ContRec use.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contrec_fast.config import NAMES
from contrec_fast.data.files import decode, read_bytes, require_free, shorten, write_whole


@dataclass(frozen=True)
class Items:
    """The catalog as people know it; the position in each list is the internal item index.

    ids: original ids, all different. titles, categories: "" where unknown.
    Raises ValueError when the lists differ in length or an id occurs twice.
    """

    ids: list[str]
    titles: list[str]
    categories: list[str]

    def __post_init__(self):
        for name in ("titles", "categories"):
            got = len(getattr(self, name))
            if got != len(self):
                raise ValueError(f"{name}: expected one per item ({len(self)}), got {got}")
        _require_distinct("items.ids", self.ids)

    def __len__(self) -> int:
        return len(self.ids)


# eq=False: the generated comparison would fail on arrays.
@dataclass(frozen=True, eq=False)
class Dataset:
    """Users, their histories and one held-out item each, in internal indices.

    items: the catalog of N items.
    user_ids: U original ids, all different; the position is the internal user row.
    histories: U int64 arrays of item indices in 0..N-1, oldest first, each with at least one
        entry: all that may be trained on. Repeats are legal.
    targets: int64 [U], the held-out next item of each user, -1 where there is none. Neither
        trained on nor shown to the model while lists are judged by it; serving shows it.
    Raises ValueError when these do not hold.
    """

    items: Items
    user_ids: list[str]
    histories: list[np.ndarray]
    targets: np.ndarray

    def __post_init__(self):
        users, items = len(self.user_ids), len(self.items)
        for name in ("histories", "targets"):
            got = len(getattr(self, name))
            if got != users:
                raise ValueError(f"{name}: expected one per user ({users}), got {got}")
        _require_distinct("user_ids", self.user_ids)
        if not users:
            return
        lengths = np.array([len(history) for history in self.histories])
        if lengths.min() == 0:
            row = lengths.argmin()
            raise ValueError(f"histories: expected an item for user row {row}, got none")
        for name, values, lowest in (
            ("histories", np.concatenate(self.histories), 0),
            ("targets", np.asarray(self.targets), -1),
        ):
            if values.dtype != np.int64:
                raise ValueError(f"{name}: expected int64, got {values.dtype}")
            if values.min() < lowest or values.max() >= items:
                raise ValueError(
                    f"{name}: expected item indices from {lowest} to {items - 1}, "
                    f"got {values.min()} to {values.max()}"
                )

    def of_users(self, rows: np.ndarray) -> "Dataset":
        """The same catalog with some of the users, in the order of their rows [R]."""
        users = [self.user_ids[row] for row in rows]
        return Dataset(self.items, users, [self.histories[row] for row in rows], self.targets[rows])

    def for_validation(self) -> "Dataset":
        """The same users and catalog, the last item of each history being the target.

        The targets of before are left out. A history of one item stays, with target -1, so that
        rows mean the same users.
        """
        longer = [len(history) > 1 for history in self.histories]
        pairs = list(zip(self.histories, longer, strict=True))
        histories = [history[:-1] if more else history for history, more in pairs]
        targets = [history[-1] if more else -1 for history, more in pairs]
        return Dataset(self.items, self.user_ids, histories, np.array(targets, dtype=np.int64))

    def complete(self) -> "Dataset":
        """The same users and catalog with nothing held out: each target ends its history."""
        held = self.targets >= 0
        if not held.any():
            return self
        ends = np.cumsum([len(history) for history in self.histories])
        items = np.insert(np.concatenate(self.histories), ends[held], self.targets[held])
        histories = np.split(items, (ends + held.cumsum())[:-1])
        return Dataset(self.items, self.user_ids, histories, np.full(len(histories), -1))

    def hold_out(self, holdout: str) -> "Dataset":
        """This dataset, whose targets are the last items, as `data.holdout` wants it."""
        if holdout not in NAMES["holdout"]:
            expected = ", ".join(NAMES["holdout"])
            raise ValueError(f"holdout: expected one of {expected}, got {holdout!r}")
        if holdout == "test":
            return self
        return self.for_validation() if holdout == "validation" else self.complete()


def read_folder(path, holdout: str = "test") -> Dataset:
    """Read a folder of `train.txt`, `test.txt`, optional `item_list.txt` and `user_list.txt`.

    holdout="test": histories are the lines of train.txt, targets the last items of test.txt.
    holdout="validation": histories are the lines of train.txt without their last item, which is
    the target. A user with a single training item keeps it as history and has target -1, so that
    rows mean the same users whatever the holdout. holdout="none": histories are the lines of
    test.txt and all targets are -1.

    The catalog is every item that a file names (test.txt too, whatever the holdout), in ascending
    order of its number, which may have gaps; users are in ascending order of theirs. Without a
    list, ids are the numbers as strings and titles and categories are "". A list has a header
    naming its columns in any order: `org_id` and `remap_id` (the number), and for items
    optionally `title` and `category`. It may name items and users that no line has; an item that
    it lacks is known by its number.

    Raises ValueError, one line with the file and line, when anything else is found.
    """
    folder = Path(path)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise ValueError(f"{folder}: expected a folder, got {got}")
    train_path, test_path = folder / "train.txt", folder / "test.txt"
    item_path, user_path = folder / "item_list.txt", folder / "user_list.txt"

    train, test = _read_lines(train_path), _read_lines(test_path)
    _check_pairs(train_path, train, test_path, test)
    users = sorted(train)

    listed_users = _read_table(user_path, ()) if user_path.exists() else None
    if listed_users is None:
        user_ids = [str(user) for user in users]
    else:
        for user in users:
            if user not in listed_users:
                where = f"{train_path}, line {train[user][0]}"
                raise ValueError(f"{where}: expected a user of {user_path.name}, got {user}")
        user_ids = [listed_users[user][0] for user in users]

    listed = _read_table(item_path, ("title", "category")) if item_path.exists() else {}
    # A test line is the train line plus one item, so the test lines hold every item.
    sequences = [test[user][1] for user in users]
    numbers = np.unique(np.concatenate([np.array(sorted(listed), dtype=np.int64), *sequences]))
    numbers_list = numbers.tolist()
    rows = [listed.get(number, (str(number), "", "")) for number in numbers_list]
    _check_unlisted(item_path, listed, numbers_list)
    items = Items(*(list(column) for column in zip(*rows, strict=True)))

    indices = [np.searchsorted(numbers, sequence) for sequence in sequences]
    histories = [sequence[:-1] for sequence in indices]
    targets = np.array([sequence[-1] for sequence in indices], dtype=np.int64)
    return Dataset(items, user_ids, histories, targets).hold_out(holdout)


def write_folder(dataset: Dataset, path) -> None:
    """Write the four files that `read_folder(path)` turns into the same dataset.

    The folder appears whole or not at all (a temporary name beside it, then a rename).
    Raises ValueError when path exists and is not an empty folder, when a user has no target
    (the format has no way to say so) and when a string is not valid Unicode.
    """
    folder = Path(path)
    require_free(folder)
    if not dataset.user_ids:
        raise ValueError("dataset: expected at least one user, got none")
    if dataset.targets.min() < 0:
        user = dataset.user_ids[int(dataset.targets.argmin())]
        raise ValueError(f"dataset: expected a target for every user, got none for user {user!r}")

    train = [f"{u} " + " ".join(map(str, h.tolist())) for u, h in enumerate(dataset.histories)]
    test = [
        f"{line} {target}" for line, target in zip(train, dataset.targets.tolist(), strict=True)
    ]
    items = dataset.items
    texts = {
        "train.txt": "\n".join(train) + "\n",
        "test.txt": "\n".join(test) + "\n",
        "item_list.txt": _format_table(
            ("org_id", "remap_id", "title", "category"),
            zip(items.ids, range(len(items)), items.titles, items.categories, strict=True),
        ),
        "user_list.txt": _format_table(
            ("org_id", "remap_id"),
            zip(dataset.user_ids, range(len(dataset.user_ids)), strict=True),
        ),
    }
    contents = {}
    for name, text in texts.items():
        try:
            contents[name] = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"dataset: expected valid Unicode for {name}, got {error.object[error.start]!r}"
            ) from None
    write_whole(folder, contents)


def _read_text(path: Path) -> str:
    return decode(path, read_bytes(path))


def _read_lines(path: Path) -> dict[int, tuple[int, np.ndarray]]:
    """{user: (line number, items int64)} of a file of `user item item ...` lines."""
    text = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if not text:
        raise ValueError(f"{path}: expected a line 'user item item ...', got an empty file")
    users = {}
    for line, content in enumerate(text.split("\n"), 1):
        tokens = content.split()
        if len(tokens) < 2:
            got = f"user {shorten(tokens[0])} without items" if tokens else "an empty line"
            raise ValueError(f"{path}, line {line}: expected 'user item item ...', got {got}")
        user, *items = (_parse_number(path, line, token) for token in tokens)
        if user in users:
            raise ValueError(
                f"{path}, line {line}: expected each user once, got user {user} again "
                f"(first on line {users[user][0]})"
            )
        users[user] = line, np.array(items, dtype=np.int64)
    return users


def _check_pairs(train_path, train, test_path, test) -> None:
    """Every user is in both files, and its test line is its train line plus one item."""
    for path, here, other_path, other in (
        (train_path, train, test_path, test),
        (test_path, test, train_path, train),
    ):
        for user, (line, _) in here.items():
            if user not in other:
                raise ValueError(
                    f"{path}, line {line}: expected a user of {other_path.name}, got {user}"
                )
    for user, (line, items) in test.items():
        train_line, history = train[user]
        where = (
            f"{test_path}, line {line}: "
            f"expected line {train_line} of {train_path.name} plus one item"
        )
        if len(items) != len(history) + 1:
            raise ValueError(
                f"{where} for user {user} ({len(history) + 1} items), got {len(items)} items"
            )
        differ = np.flatnonzero(items[:-1] != history)
        if len(differ):
            at = differ[0]
            raise ValueError(
                f"{where} for user {user}, got item {items[at]} "
                f"instead of {history[at]} at position {at + 1}"
            )


def _read_table(path: Path, optional: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """{remap_id: (org_id, *optional columns, "" where absent)} of a space-separated table."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=" ", strict=True)
    known = ("org_id", "remap_id", *optional)
    header, rows, seen_ids, blank = None, {}, {}, 0
    while True:
        line = reader.line_num + 1  # a quoted field may span lines: where this row starts
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: expected space-separated columns, got: {error}"
            ) from None
        if row is None:
            break
        if not row:
            blank = blank or line
            continue
        if blank:
            raise ValueError(f"{path}, line {blank}: expected a row, got an empty line")
        if header is None:
            header = row
            names = set(header)
            if not {"org_id", "remap_id"} <= names <= set(known) or len(names) != len(header):
                raise ValueError(
                    f"{path}, line {line}: expected a header with org_id and remap_id"
                    f"{' and optionally ' + ' and '.join(optional) if optional else ''}, "
                    f"got {shorten(' '.join(header), 80)}"
                )
            columns = [header.index(name) if name in header else None for name in known]
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: expected {len(header)} columns ({' '.join(header)}), "
                f"got {len(row)}"
            )
        org_id, remap_id, *rest = ("" if column is None else row[column] for column in columns)
        number = _parse_number(path, line, remap_id)
        if number in rows:
            raise ValueError(
                f"{path}, line {line}: expected each remap_id once, got {number} again"
            )
        if org_id in seen_ids:
            raise ValueError(
                f"{path}, line {line}: expected each org_id once, got {shorten(org_id)} again "
                f"(first on line {seen_ids[org_id]})"
            )
        seen_ids[org_id] = line
        rows[number] = (org_id, *rest)
    if header is None:
        raise ValueError(f"{path}: expected a header with org_id and remap_id, got an empty file")
    return rows


def _check_unlisted(path: Path, listed, numbers: list[int]) -> None:
    """An item that the list lacks goes by its number, which must be nobody's org_id."""
    owner = {row[0]: number for number, row in listed.items()}
    for number in numbers:
        if number not in listed and str(number) in owner:
            raise ValueError(
                f"{path}: expected a row for item {number}, got none, "
                f"and '{number}' is already the org_id of item {owner[str(number)]}"
            )


def _parse_number(path: Path, line: int, token: str) -> int:
    # 18 digits always fit int64.
    if not (token.isascii() and token.isdigit()) or len(token) > 18:
        raise ValueError(
            f"{path}, line {line}: expected a whole number of at most 18 digits, "
            f"got {shorten(token)}"
        )
    return int(token)


def _format_table(header, rows) -> str:
    """A space-separated table with every string quoted; the inverse of `_read_table`."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=" ", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows(rows)
    return " ".join(header) + "\n" + out.getvalue()


def _require_distinct(name: str, ids: list[str]) -> None:
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        again = next(value for value in ids if value in seen or seen.add(value))
        raise ValueError(f"{name}: expected each id once, got {again!r} twice")
