"""Keys and values of users' histories, kept from one reading to the next.

The fixed words come first and last in a prompt, so a history that goes on only appends to what was
read: a returning user's old items need not be read again (prefix caching, as in vLLM, arXiv
2309.06180, here by user). That holds while the window onto the history does not move.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_fast.data.prompts import Window
from contrec_fast.engine.packed import RowCache


def growing_window(history: np.ndarray, most: int) -> Window:
    """A window that grows from `most` items to twice as many before it is cut back to `most`.

    It depends on the length of the history alone, so that what is read of a user never depends on
    what is remembered.
    """
    return Window(history, max(0, (len(history) - most) // (most + 1) * (most + 1)))


@dataclass
class Known:
    """What is remembered of a user.

    window: what is read now, or was last. history: what of it is remembered. places: [n] int64
    places of the pool that hold the first n tokens of the window. call: when it was looked up last.
    """

    window: Window
    history: np.ndarray
    places: np.ndarray
    call: int


class Remembered:
    """A pool of keys and values of single tokens, which the least recently seen users leave first.

    Args:
        limit: bytes of keys and values, allocated at once, on the cache's device. cache: where
        prompts are read; it has stored something. counters: "hits" (users of whom something is
        known), "misses", "evictions" (of users) and "saved" (tokens not read again) are added up
        there.

    Raises:
        ValueError: the limit is less than one token takes.
    """

    def __init__(self, limit: int, cache: RowCache, counters: dict):
        if limit < cache.place_bytes:
            raise ValueError(
                f"remembered: expected at least {cache.place_bytes} bytes, which one token takes, "
                f"got {limit}"
            )
        self.cache, self.counters = cache, counters
        self._users: OrderedDict[Hashable, Known] = OrderedDict()
        self._free = np.arange(int(limit // cache.place_bytes))[::-1].copy()
        self._left = len(self._free)  # the first of `_free` are free
        self._call = 0
        self._pool = [x.new_empty(len(self._free) * x.shape[1], x.shape[3]) for x in cache.stored()]

    def look_up(self, users: Sequence[Hashable], windows: Sequence[Window]) -> list[Known | None]:
        """What is known of users whose windows are to be read now.

        It stays until the next call. Of a user with another window or a history that does not go
        on from the one read before, nothing is known any more. None for a user that this call has
        already met.
        """
        self._call += 1
        return [self._look_up(user, window) for user, window in zip(users, windows)]

    def _look_up(self, user: Hashable, window: Window) -> Known | None:
        known = self._users.get(user)
        if known is not None and known.call == self._call:
            return None
        goes_on = (
            known is not None
            and known.window.start == window.start
            and np.array_equal(window.history[: len(known.history)], known.history)
        )
        if not goes_on:
            self._forget(user)
            known = self._users[user] = Known(window, *_NOTHING, 0)
        known.window, known.call = window, self._call
        self._users.move_to_end(user)
        self.counters["hits" if len(known.places) else "misses"] += 1
        return known

    def restore(self, known: Sequence[Known | None], counts: np.ndarray, row: int, first: int):
        """Write the first counts [B] tokens of users to rows row, row + 1, ... of the cache.

        Args:
            first: their first place there.
        """
        pooled = [user.places[:count] for user, count in zip(known, counts) if count]
        if pooled:
            self._copy(np.concatenate(pooled), counts, 0 * counts, row, first, save=False)
            self.counters["saved"] += int(counts.sum())

    def save(self, known: Sequence[Known | None], counts: np.ndarray, row: int, first: int):
        """Remember the first counts [B] tokens of users, which rows row, row + 1, ... hold."""
        begins, pooled, saved = counts.copy(), [], []
        for line, user in enumerate(known):
            if user is None or counts[line] <= len(user.places):
                continue
            new = self._take(counts[line] - len(user.places))
            if new is None:  # what is remembered already is of this call, too
                continue
            begins[line] = len(user.places)
            pooled.append(new)
            saved.append(user)
        try:
            if pooled:
                self._copy(np.concatenate(pooled), counts - begins, begins, row, first, save=True)
        except BaseException:  # out of memory: what was not copied is not known
            for new in pooled:
                self._give(new)
            raise
        for user, new in zip(saved, pooled):
            user.places = np.concatenate([user.places, new])
            user.history = user.window.history.copy()

    def _copy(self, pooled, counts, begins, row: int, first: int, save: bool) -> None:
        rows = torch.from_numpy(np.repeat(np.arange(row, row + len(counts)), counts))
        starts = np.repeat(first + begins - (counts.cumsum() - counts), counts)
        places = torch.from_numpy(starts + np.arange(len(pooled)))
        pooled, rows, places = (
            x.to(self.cache.device) for x in (torch.from_numpy(pooled), rows, places)
        )
        for pool, stored in zip(self._pool, self.cache.stored()):
            heads = stored.shape[1]
            slots = self.cache.slots(heads, rows, places)
            kept = _each_head(heads, pooled, len(self._free))
            stored = stored.flatten(0, 2)
            if save:
                pool.index_copy_(0, kept, stored.index_select(0, slots))
            else:
                stored.index_copy_(0, slots, pool.index_select(0, kept))

    def _take(self, count: int) -> np.ndarray | None:
        """Free places, for which the users seen longest ago are forgotten; None if too few."""
        while self._left < count and self._users:
            user = next(iter(self._users))
            if self._users[user].call == self._call:
                return None
            self.counters["evictions"] += len(self._users[user].places) > 0
            self._forget(user)
        if self._left < count:
            return None
        self._left -= count
        return self._free[self._left : self._left + count].copy()

    def clear(self) -> None:
        """Forget everybody."""
        for user in list(self._users):
            self._forget(user)

    def _forget(self, user: Hashable) -> None:
        known = self._users.pop(user, None)
        if known is not None:
            self._give(known.places)

    def _give(self, places: np.ndarray) -> None:
        self._free[self._left : self._left + len(places)] = places
        self._left += len(places)


def _each_head(heads: int, places: Tensor, size: int) -> Tensor:
    """Where T tokens at places [T] of a pool of that size are: [heads * T] of its rows."""
    return (torch.arange(heads, device=places.device)[:, None] * size + places).flatten()


_NOTHING = np.empty((2, 0), dtype=np.int64)
