"""Whom to serve: original ids of users, or new users' histories, as a dataset."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from contrec_fast.data.interactions import Dataset


def served_dataset(
    dataset: Dataset,
    users: Sequence[str] | None = None,
    histories: Mapping[str, Sequence[str]] | None = None,
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


def _new_users(dataset: Dataset, histories: Mapping[str, Sequence[str]]) -> Dataset:
    index = {item: position for position, item in enumerate(dataset.items.ids)}
    rows = []
    if not isinstance(histories, Mapping):
        got = type(histories).__name__
        raise TypeError(f"histories: expected a dict of users to their items, got {got}")
    for user, items in zip(_ids("histories: expected users as", histories), histories.values()):
        items = _ids(f"histories: expected for user {user!r}", items)
        unknown = [item for item in items if item not in index]
        if unknown or not items:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(
                f"histories: expected items of the catalog for user {user!r}, got {got}"
            )
        rows.append(np.array([index[item] for item in items], dtype=np.int64))
    targets = np.full(len(rows), -1, dtype=np.int64)
    return Dataset(dataset.items, list(histories), rows, targets)


def _ids(expected: str, ids) -> list[str]:
    """Several ids as a list; TypeError, which begins with `expected`, for anything else."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"{expected} a list of ids, got {ids!r}")
    ids = list(ids)
    for other in ids:
        if not isinstance(other, str):
            raise TypeError(f"{expected} a list of strings, got one with {other!r}")
    return ids
