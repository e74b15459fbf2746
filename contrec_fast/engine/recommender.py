"""From users' histories to top-K lists, batch by batch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contrec_fast.data.interactions import Dataset
from contrec_fast.data.prompts import Prompts
from contrec_fast.engine.head import Head, stable_id
from contrec_fast.engine.reader import Reader
from contrec_fast.models.contrec import ContRec

BATCH = 512


@dataclass
class Recommendations:
    """Top-K lists of B users.

    ids: [B, k] int64 internal item indices, -1 where there is no further item. scores: [B, k]
    float32. matched: [B, k] bool, the item's category is named by the user's text. texts: B.
    """

    ids: np.ndarray
    scores: np.ndarray
    matched: np.ndarray
    texts: list[str]


class Recommender:
    """Serves a trained model for the users of a dataset.

    The sampler's noise is keyed by the user's original id: it depends neither on the batch nor on
    the row a user has in the dataset. (The language model rounds differently in other batches.)

    Args:
        seed: key of the sampler's noise.
        text: off leaves out the text and its bonus (the latent path alone).
    """

    def __init__(self, model: ContRec, dataset: Dataset, seed: int = 0, text: bool = True):
        self.model, self.dataset, self.seed = model.eval(), dataset, seed
        config = model.config
        self.text = (text or config.head.source == "response") and config.prompt.text != "none"
        self.prompts = Prompts(
            dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt
        )
        self.reader = Reader(model, self.prompts)
        self.head = Head.of(model, dataset, seed)
        self.matcher, self.catalog, self.seen = self.head.matcher, self.head.catalog, self.head.seen
        self.keys = torch.tensor(
            [stable_id(user) for user in dataset.user_ids], device=model.item_vectors.device
        )

    def recommend(
        self, rows: Sequence[int], k: int, batch_size: int = BATCH, advance=None
    ) -> Recommendations:
        """Lists for some users of the dataset, items of their history left out.

        Args:
            rows: user rows. k: length of the lists. advance: called after each batch.

        Raises:
            ValueError: no rows, a row that no user has, or k not in 1..N, in one line.
            TypeError: k is no whole number.
        """
        rows = np.asarray(rows)
        self.check(rows, k)  # before the language model has read anything
        k = int(k)
        order = np.argsort([len(self.dataset.histories[row]) for row in rows], kind="stable")
        parts = []
        for start in range(0, len(rows), batch_size):
            parts.append(self._batch(rows[order[start : start + batch_size]], k))
            if advance:
                advance()
        back = np.argsort(order)
        columns = [np.concatenate(column)[back] for column in zip(*(part[:3] for part in parts))]
        texts = [text for part in parts for text in part[3]]
        return Recommendations(*columns, [texts[i] for i in back])

    def check(self, rows: np.ndarray, k: int) -> None:
        """Raise what `recommend` does for such arguments."""
        if not isinstance(k, Integral):
            raise TypeError(f"k: expected a whole number, got {k!r}")
        users, items = len(self.dataset.histories), len(self.catalog)
        if not 1 <= k <= items:
            raise ValueError(f"k: expected 1 to the catalog's {items} items, got {k}")
        if not len(rows) or rows.min() < 0 or rows.max() >= users:
            raise ValueError(f"rows: expected user rows from 0 to {users - 1}, got {rows}")

    @torch.inference_mode()
    def _batch(self, rows: np.ndarray, k: int):
        device = self.model.item_vectors.device
        vectors, texts = self.sample(rows)
        user = torch.from_numpy(rows).to(device)
        matched = self.matcher.match(texts).to(device)
        scores, ids = self.head.search(vectors, k, matched, None if self.seen is None else user)
        group = self.catalog.groups[ids.clamp(min=0)].long()
        named = matched.gather(1, group.clamp(min=0)) & (group >= 0) & (ids >= 0)
        return ids.cpu().numpy(), scores.cpu().numpy(), named.cpu().numpy(), texts

    @torch.inference_mode()
    def sample(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Item-space vectors [S, B, D] of some users, S per user, and their texts."""
        histories = [self.dataset.histories[row] for row in rows]
        if self.text:
            condition, texts = self.reader.write(histories)
        else:
            condition, texts = self.reader.read(histories), [""] * len(rows)
        keys = self.keys[torch.as_tensor(rows, device=self.keys.device)]
        return self.vectors(condition, keys), texts

    def vectors(self, condition: Tensor, keys: Tensor) -> Tensor:
        """Conditions [B, D] and noise keys [B] to item-space vectors [S, B, D]."""
        return self.head.vectors(condition, keys)


def served_dataset(
    model: ContRec,
    users: Sequence[str] | None = None,
    histories: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """The users to serve, as `recommend` takes them, and what to read of each.

    Serving is not evaluation: a known user's held-out item is the last that the user chose, so it
    ends the history that is read and is left out like the rest of it. (`Recommender` on the
    model's dataset is what evaluation runs.) What `data.holdout=validation` leaves out is not
    among the data; such a run is for choosing settings.

    Raises:
        ValueError: an unknown user or item, an empty history, no users, or a model without a
        catalog, in one line.
        TypeError: ids that are no strings, no list where several belong, or `histories` that name
        no users.
    """
    if model.dataset is None:
        raise ValueError("model: expected one with a dataset, which names users and items")
    if users is not None and histories is not None:
        raise ValueError("users, histories: expected one of them, got both")
    dataset = model.dataset
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


def recommend(
    model: ContRec,
    users: Sequence[str] | None = None,
    histories: Mapping[str, Sequence[str]] | None = None,
    k: int = 10,
    progress=None,
) -> pd.DataFrame:
    """Top-K lists of known users (all of them by default) or of new ones with a history.

    Args:
        users: original ids of users that the model was trained with. histories: instead, the
        original item ids that each new user chose, oldest first. k: items per user.
        progress: shows long work (`progress.ProgressBars`).

    Returns:
        Columns user_id, item_id, title, score (float), rank (from 1), matched (the item's
        category is named by the text) and text; a user's rows together, best first.

    Raises:
        ValueError, TypeError: as `served_dataset`, and for k not in 1..N.
    """
    dataset = served_dataset(model, users, histories)
    rows = np.arange(len(dataset.user_ids))
    advance = None
    if progress:
        advance = progress.stage("Users", math.ceil(len(rows) / BATCH), "batches")
    return table_of(dataset, rows, Recommender(model, dataset).recommend(rows, k, advance=advance))


def table_of(dataset: Dataset, rows: np.ndarray, lists: Recommendations) -> pd.DataFrame:
    """The lists of some user rows as `recommend` returns them."""
    place, rank = np.nonzero(lists.ids >= 0)
    items, names = lists.ids[place, rank], dataset.items
    return pd.DataFrame({
        "user_id": [dataset.user_ids[rows[i]] for i in place],
        "item_id": [names.ids[i] for i in items],
        "title": [names.titles[i] for i in items],
        "score": lists.scores[place, rank],
        "rank": rank + 1,
        "matched": lists.matched[place, rank],
        "text": [lists.texts[i] for i in place],
    })  # fmt: skip


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
