"""What retrieval searches: the catalog's vectors and the users' seen items, checked once."""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from contrec_fast.ops.checks import FLOATS, INTEGERS, check
from contrec_fast.ops.transfer import upload

FITTING = (2.0**-400, 2.0**400)  # norms whose squares and products are exact enough in float64
FILL_ELEMENTS = 1 << 22  # vector elements worked on at once


def fixed_order_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension in an order that every backend can follow.

    Zeros pad the dimension to a power of two; then the upper half is added to the lower half
    until one term is left. Element-wise additions round the same way in any batch.
    """
    width = terms.shape[-1]
    size = 1 << max(width - 1, 0).bit_length()
    terms = torch.nn.functional.pad(terms, (0, size - width))
    while size > 1:
        size //= 2
        terms = terms[..., :size] + terms[..., size:]
    return terms[..., 0]


def norms_of(vectors: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, float64, summed in the fixed order."""
    return fixed_order_sum(vectors.double().square()).sqrt()


def scan_of(vectors: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors scaled to norm 1 in low precision, and how far off they are.

    Args:
        vectors: [N, D]. norms: [N] float64, of `norms_of`.

    Returns:
        scan [N, D] bfloat16; errors [N] float32, upper bounds of `||vector / norm - scan row||`.
        Where squares or products of float64 vectors could leave float64's range, the scan row is
        zero and the error infinite: such a row is always scored exactly.
    """
    usable = ((norms > FITTING[0]) & (norms < FITTING[1]))[:, None]
    unit = (vectors.double() / norms[:, None]).masked_fill(~usable, 0.0)
    scan = unit.bfloat16()
    errors = (unit - scan.double()).square().sum(1).sqrt()
    # The margins: rounding of this very line, of the norm and the quotient, bfloat16 denormals.
    errors = (errors * (1 + 2.0**-20) + 2.0**-40).float()
    return scan, errors.masked_fill(~usable[:, 0], torch.inf)


class Catalog:
    """Items that can be retrieved. An item's id is its row, and stays what it is.

    Items come and go without a rebuild: `add` fills spare rows (and doubles the capacity C where
    there are none left), `remove` leaves a row that is never returned again.

    Args:
        vectors: [N, D] item vectors of any positive, finite norm. Copied only where they are not
            contiguous or capacity beyond N is asked for, so they may be a memory-mapped file;
            what is derived from them here goes stale when they are changed.
        groups: [N] integer group of each item (an opaque category id); -1 never matches.
        eligible: [N] bool, which items may be returned (in stock); all if not given.
        capacity: rows to hold from the start, N if not given.
        scan: [capacity, D] bfloat16 memory to write the scan copy to, for instance a
            memory-mapped file; made here if not given.

    Attributes:
        vectors: [C, D] as given. norms: [C] float64. scan: [C, D] bfloat16 and errors: [C]
        float32, see `scan_of`, for finding candidates. groups: [C] int32. eligible: [C] bool,
        false in spare and removed rows. num_groups: 1 + the largest group id so far.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, an empty catalog, or a row that is
        zero or not finite, in one line.
    """

    def __init__(
        self,
        vectors: Tensor,
        groups: Tensor | None = None,
        eligible: Tensor | None = None,
        capacity: int | None = None,
        scan: Tensor | None = None,
    ):
        check("vectors", vectors, ("N", "D"), FLOATS)
        if 0 in vectors.shape:
            raise ValueError(f"vectors: expected at least one item, got {list(vectors.shape)}")
        count, dim = vectors.shape
        capacity = count if capacity is None else capacity
        if type(capacity) is not int or capacity < count:
            raise ValueError(f"capacity: expected {count} rows or more, got {capacity}")
        if scan is not None:
            check("scan", scan, (capacity, dim), (torch.bfloat16,), like=vectors)
        vectors = vectors.detach().contiguous()
        groups, eligible = self._checked(vectors, groups, eligible)
        self._count, self.num_groups = 0, 0
        self.vectors = vectors if capacity == count else vectors.new_empty((0, dim))
        self.norms = vectors.new_empty(0, dtype=torch.float64)
        self.scan = vectors.new_empty((0, dim), dtype=torch.bfloat16) if scan is None else scan
        self.errors = vectors.new_empty(0, dtype=torch.float32)
        self.groups = vectors.new_empty(0, dtype=torch.int32)
        self.eligible = vectors.new_empty(0, dtype=torch.bool)
        self.removed = vectors.new_empty(0, dtype=torch.bool)
        self._grow(capacity)
        self._fill(vectors, groups, eligible)

    def __len__(self) -> int:
        """Number of ids given out: ids run from 0 to len - 1, removed items included."""
        return self._count

    def add(
        self, vectors: Tensor, groups: Tensor | None = None, eligible: Tensor | None = None
    ) -> Tensor:
        """New items, as in the constructor.

        Returns:
            [M] int64 their ids.
        """
        check("vectors", vectors, ("M", self.vectors.shape[1]), (self.vectors.dtype,), self.vectors)
        vectors = vectors.detach()
        groups, eligible = self._checked(vectors, groups, eligible)
        first, needed = self._count, self._count + len(vectors)
        if needed > len(self.vectors):
            self._grow(max(needed, 2 * len(self.vectors)))
        self._fill(vectors, groups, eligible)
        return torch.arange(first, needed, device=vectors.device)

    def remove(self, ids: Tensor) -> None:
        """Items that are never returned again. Their ids are not given to others."""
        self._check_ids(ids)
        self.eligible[ids.long()] = False
        self.removed[ids.long()] = True

    def set_eligible(self, ids: Tensor, eligible: Tensor | bool) -> None:
        """Whether items may be returned: one bool, or [M] bool for ids [M]."""
        self._check_ids(ids)
        if not isinstance(eligible, bool):
            check("eligible", eligible, (len(ids),), (torch.bool,), like=ids)
        self.eligible[ids.long()] = eligible

    def _checked(self, vectors: Tensor, groups: Tensor | None, eligible: Tensor | None):
        """Groups and eligibility of new items, with their defaults."""
        count = len(vectors)
        if groups is None:
            groups = torch.full((count,), -1, device=vectors.device)
        if eligible is None:
            eligible = torch.ones(count, dtype=torch.bool, device=vectors.device)
        check("groups", groups, (count,), INTEGERS, like=vectors)
        check("eligible", eligible, (count,), (torch.bool,), like=vectors)
        if count and (groups.min() < -1 or groups.max() >= 2**31 - 1):
            low, high = int(groups.min()), int(groups.max())
            raise ValueError(f"groups: expected ids from -1 to 2**31 - 2, got {low} to {high}")
        return groups, eligible

    def _check_ids(self, ids: Tensor) -> None:
        check("ids", ids, ("M",), INTEGERS, like=self.vectors)
        if len(ids) and (ids.min() < 0 or ids.max() >= self._count):
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"ids: expected 0 to {self._count - 1}, got {low} to {high}")
        removed = ids[self.removed[ids.long()]]
        if len(removed):
            raise ValueError(f"ids: expected items of the catalog, got {int(removed[0])}, removed")

    def _grow(self, capacity: int) -> None:
        """Give every row tensor that is shorter this many rows; new ones are never returned."""
        empty = {"norms": 1.0, "groups": -1}
        for name in ("vectors", "norms", "scan", "errors", "groups", "eligible", "removed"):
            old = getattr(self, name)
            if len(old) < capacity:
                new = old.new_full((capacity, *old.shape[1:]), empty.get(name, 0))
                new[: len(old)] = old
                setattr(self, name, new)

    def _fill(self, vectors: Tensor, groups: Tensor, eligible: Tensor) -> None:
        """Write items to the next rows; they count once all of them are right."""
        first, stop = self._count, self._count + len(vectors)
        rows = max(1, FILL_ELEMENTS // vectors.shape[1])
        for start in range(0, len(vectors), rows):
            part = vectors[start : start + rows]
            norms = norms_of(part)
            wrong = ~((norms > 0) & norms.isfinite())
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    "vectors: expected positive finite norms, "
                    f"got {float(norms[row])} in row {start + row}"
                )
            into = slice(first + start, first + start + len(part))
            self.norms[into] = norms
            self.scan[into], self.errors[into] = scan_of(part, norms)
        if self.vectors[first:stop].data_ptr() != vectors.data_ptr():  # not the given ones
            self.vectors[first:stop] = vectors
        self.groups[first:stop] = groups
        if len(groups):
            self.num_groups = max(self.num_groups, int(groups.max()) + 1)
        self.eligible[first:stop] = eligible
        self._count = stop


class SeenLists:
    """The items each user has seen, for all users at once (compressed sparse rows).

    Args:
        offsets: [U + 1] int64, from 0 up to len(ids). ids: [M] item ids, ascending (repeats
            allowed) within each user's slice `ids[offsets[u]:offsets[u + 1]]`.

    Raises:
        TypeError, ValueError: wrong dtype or shape, offsets that do not ascend from 0 to M,
        ids that are negative or unsorted, in one line.
    """

    def __init__(self, offsets: Tensor, ids: Tensor):
        check("offsets", offsets, ("U + 1",), INTEGERS)
        check("ids", ids, ("M",), INTEGERS, like=offsets)
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(ids):
            ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else "nothing"
            raise ValueError(f"offsets: expected to run from 0 to {len(ids)}, got {ends}")
        counts = offsets.diff()
        if (counts < 0).any():
            row = int((counts < 0).nonzero()[0])
            raise ValueError(f"offsets: expected ascending offsets, got a fall after row {row}")
        self.offsets, self.ids = offsets.long(), ids.long()
        owner = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts)
        falls = (self.ids.diff() < 0) & (owner.diff() == 0)
        if falls.any():
            row = int(owner[falls.nonzero()[0]])
            raise ValueError(f"ids: expected ascending ids within a user, got a fall in row {row}")
        if len(ids) and ids.min() < 0:
            raise ValueError(f"ids: expected ids from 0 up, got {int(ids.min())}")
        self.bound = int(self.ids.max()) + 1 if len(ids) else 0

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]], device=None) -> "SeenLists":
        """From one (unsorted) list of item ids per user."""
        rows = [np.asarray(row, dtype=np.int64) for row in lists]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
        ids = ids[np.lexsort((ids, np.repeat(np.arange(len(rows)), lengths)))]
        offsets = np.append(0, lengths.cumsum())
        return cls(torch.from_numpy(offsets), torch.from_numpy(ids)).to(device)

    def to(self, device) -> "SeenLists":
        """The same on another device."""
        other = copy.copy(self)
        other.offsets, other.ids = (upload(x, device) for x in (self.offsets, self.ids))
        return other

    def __len__(self) -> int:
        return len(self.offsets) - 1


def seen_arguments(
    seen: SeenLists | None, seen_rows: Tensor | None, queries: Tensor, items: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Offsets, ids and rows of the lists to leave out, as operations over a catalog take them.

    Raises:
        TypeError, ValueError: one without the other, ids beyond the items, wrong dtype, shape or
        device, in one line.
    """
    if (seen is None) != (seen_rows is None):
        raise ValueError("seen, seen_rows: expected both or neither, got one")
    if seen is None:
        return None, None, None
    if not isinstance(seen, SeenLists):
        raise TypeError(f"seen: expected an ops.SeenLists, got {type(seen).__name__}")
    check("seen_rows", seen_rows, (len(queries),), INTEGERS, like=queries)
    check("seen", seen.ids, ("M",), (torch.int64,), like=queries)
    if seen.bound > items:
        raise ValueError(f"seen: expected ids below {items}, got {seen.bound - 1}")
    return seen.offsets, seen.ids, seen_rows
