"""Whom to serve: original ids of users, or new users' histories, as a dataset."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from contrec_fast.data.interactions import Dataset

Histories = Mapping[str, Sequence[str]] | pd.DataFrame


def served_dataset(
    dataset: Dataset,
    users: Sequence[str] | None = None,
    histories: Histories | None = None,
) -> Dataset:
    """The users to serve, as `Recommender.recommend` takes them, and what to read of each.

    Serving is not evaluation: a known user's held-out item is the last that the user chose, so it
    ends the history that is read and is left out like the rest of it. (`Engine` on the model's
    dataset is what evaluation runs.) What `data.holdout=validation` leaves out is not
    among the data; such a run is for choosing settings.

    Raises:
        ValueError: an unknown user or item, an empty history, or no users, in one line.
        TypeError: ids that are no strings, no list where several belong, or `histories` that name
        no users.
    """
    if users is not None and histories is not None:
        raise ValueError("users, histories: expected one of them, got both")
    if histories is not None:
        dataset = _new_users(dataset, histories)
    elif users is not None:
        users = _ids("users: expected", users)
        row_of = {user: row for row, user in enumerate(dataset.user_ids)}
        unknown = [user for user in users if user not in row_of]
        if unknown:
            raise ValueError(f"users: expected users of the training data, got {unknown[0]!r}")
        chosen = dict.fromkeys(users)
        dataset = dataset.of_users(np.array([row_of[user] for user in chosen], dtype=np.int64))
    if not dataset.user_ids:
        name = "users" if histories is None else "histories"
        raise ValueError(f"{name}: expected at least one user, got none")
    return dataset.complete()


def _new_users(dataset: Dataset, histories: Histories) -> Dataset:
    index = {item: position for position, item in enumerate(dataset.items.ids)}
    if isinstance(histories, pd.DataFrame):
        users, rows = _grouped(histories, index)
    elif isinstance(histories, Mapping):
        users = _ids("histories: expected users as", histories)
        rows = [_known(user, items, index) for user, items in zip(users, histories.values())]
    else:
        got = type(histories).__name__
        raise TypeError(f"histories: expected a dict of users to their items, got {got}")
    return Dataset(dataset.items, users, rows, np.full(len(rows), -1))


def _known(user: str, items: Iterable[str], index: dict[str, int]) -> np.ndarray:
    items = _ids(f"histories: expected for user {user!r}", items)
    unknown = [item for item in items if item not in index]
    if unknown or not items:
        raise _unknown(user, repr(unknown[0]) if unknown else "none")
    return np.array([index[item] for item in items], dtype=np.int64)


def _grouped(frame: pd.DataFrame, index: dict[str, int]) -> tuple[list[str], list[np.ndarray]]:
    """The users of a frame in the order in which they come first, and their items in its order."""
    codes, ids = [], []
    for name in ("user_id", "item_id"):
        if name not in frame:
            got = ", ".join(map(str, frame.columns)) or "none"
            raise ValueError(f"histories: expected the columns user_id and item_id, got {got}")
        column, values = pd.factorize(frame[name])
        if len(column) and column.min() < 0:
            row = column.argmin()
            raise ValueError(f"histories: expected a {name} in each row, got none in row {row}")
        codes.append(column)
        ids.append(_ids(f"histories: expected in column {name}", values))
    (user, item), (users, items) = codes, ids
    rows = np.array([index.get(name, -1) for name in items], dtype=np.int64)[item]
    if len(rows) and rows.min() < 0:
        row = rows.argmin()
        raise _unknown(users[user[row]], repr(items[item[row]]))
    ends = np.bincount(user, minlength=len(users)).cumsum()
    return users, np.split(rows[np.argsort(user, kind="stable")], ends[:-1])[: len(users)]


def _unknown(user: str, got: str) -> ValueError:
    return ValueError(f"histories: expected items of the catalog for user {user!r}, got {got}")


def _ids(expected: str, ids) -> list[str]:
    """Several ids as a list; TypeError, which begins with `expected`, for anything else."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"{expected} a list of ids, got {ids!r}")
    ids = list(ids)
    for other in ids:
        if not isinstance(other, str):
            raise TypeError(f"{expected} a list of strings, got one with {other!r}")
    return ids
