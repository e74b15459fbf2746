"""What retrieval searches: the catalog's vectors and the users' seen items, checked once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from contrec_fast.ops.checks import FLOATS, INTEGERS, check


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


class Catalog:
    """Items that can be retrieved.

    Args:
        vectors: [N, D] item vectors of any positive, finite norm.
        groups: [N] integer group of each item (an opaque category id); -1 never matches.
        eligible: [N] bool, which items may be returned (in stock); all if not given.

    Attributes:
        vectors: [N, D] as given. norms: [N] float64. scan: [N, D] float32, `vectors` scaled
        to norm 1, for finding candidates. groups: [N] int64. eligible: [N] bool.
        num_groups: 1 + the largest group id.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, an empty catalog, or a row that is
        zero or not finite, in one line.
    """

    def __init__(
        self, vectors: Tensor, groups: Tensor | None = None, eligible: Tensor | None = None
    ):
        check("vectors", vectors, ("N", "D"), FLOATS)
        if 0 in vectors.shape:
            raise ValueError(f"vectors: expected at least one item, got {list(vectors.shape)}")
        count = len(vectors)
        if groups is None:
            groups = torch.full((count,), -1, device=vectors.device)
        if eligible is None:
            eligible = torch.ones(count, dtype=torch.bool, device=vectors.device)
        check("groups", groups, (count,), INTEGERS, like=vectors)
        check("eligible", eligible, (count,), (torch.bool,), like=vectors)
        self.vectors = vectors.detach()
        self.norms = norms_of(self.vectors)
        wrong = ~((self.norms > 0) & self.norms.isfinite())
        if wrong.any():
            row = int(wrong.nonzero()[0])
            norm = float(self.norms[row])
            raise ValueError(f"vectors: expected positive finite norms, got {norm} in row {row}")
        if groups.min() < -1:
            raise ValueError(f"groups: expected ids from -1 up, got {int(groups.min())}")
        self.scan = (self.vectors / self.norms[:, None]).float()
        self.groups, self.eligible = groups.long(), eligible
        self.num_groups = int(self.groups.max()) + 1

    def __len__(self) -> int:
        return len(self.vectors)


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
        rows = [torch.as_tensor(row, dtype=torch.int64).sort().values for row in lists]
        offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        ids = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        return cls(offsets.to(device), ids.to(device))

    def __len__(self) -> int:
        return len(self.offsets) - 1
