"""What a response must go on with, if it is to be one of those that the catalog's items have.

Responses follow a template: its words, the rest of a category or of a title of which a few tokens
are written, leave no choice. Such a stretch is a draft: the language model reads it in one pass
and keeps as much of it as it would have written itself (speculative decoding, arXiv 2211.17192,
with certain drafts and greedy choices), so that drafts change the time and never the text.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Drafts:
    """The tree of all responses, as tensors.

    A sequence's place in it is a *node*, a response that begins as the sequence does, and an
    *end*: up to there all responses that begin so agree. Node -1: no response does.

    Args:
        responses: token ids of each; the last one ends the text, and is never drafted.
        vocabulary: number of token ids.
    """

    def __init__(self, responses: Sequence[Sequence[int]], vocabulary: int, device="cpu"):
        self.vocabulary = vocabulary
        known = sorted({tuple(response[:-1]) for response in responses})
        lengths = np.array([len(response) for response in known])
        width = int(lengths.max()) + 1
        table = np.full((len(known), width), -1, dtype=np.int64)
        table[np.arange(width) < lengths[:, None]] = np.concatenate([*map(np.array, known), []])
        # shared[i]: how many tokens responses i - 1 and i share.
        differ = table[1:] != table[:-1]
        shared = np.concatenate([[-1], differ.argmax(1)]) if len(known) > 1 else np.array([-1])
        ends = lengths.copy()  # of the stretch that each node begins with, seen from `depth`
        keys, nodes, upto = [], [], []
        for depth in range(width - 1, -1, -1):
            starts = shared < depth
            group = starts.cumsum() - 1
            branching = np.bincount(group, shared == depth)[group] > 0
            # A response that ends where others go on is a branch like any other.
            first = starts.nonzero()[0][group]
            child = np.flatnonzero(branching & (starts | (shared == depth)))
            keys.append((first[child] * width + depth) * (vocabulary + 1) + table[child, depth])
            nodes.append(child)
            upto.append(ends[child])
            ends[branching] = depth
        keys, nodes, upto = map(np.concatenate, (keys, nodes, upto))
        order = keys.argsort(kind="stable")
        self.root = int(ends[0])
        self._width = width
        self._table, self._keys, self._nodes, self._ends = (
            torch.from_numpy(np.ascontiguousarray(x)).to(device)
            for x in (table, keys[order], nodes[order], upto[order])
        )

    def propose(self, node: Tensor, depth: Tensor, most: int) -> Tensor:
        """What sequences [B] of so many tokens, at these nodes, may go on with: [B, most]."""
        places = depth[:, None] + torch.arange(most, device=depth.device)
        return self._table[node.clamp(min=0)[:, None], places.clamp(max=self._width - 1)]

    def follow(self, node: Tensor, end: Tensor, depth: Tensor, token: Tensor):
        """Nodes and ends [B] after the token [B] that comes at this depth [B], at most the end."""
        places = depth.clamp(max=self._width - 1)
        row = node.clamp(min=0)
        goes_on = (depth < end) & (self._table[row, places] == token)
        if len(self._keys):
            key = (row * self._width + places) * (self.vocabulary + 1) + token
            at = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
            branches = (depth == end) & (self._keys[at] == key)
        else:
            at, branches = torch.zeros_like(depth), torch.zeros_like(goes_on)
            self._nodes, self._ends = node.new_zeros(1), end.new_zeros(1)
        alive = (node >= 0) & (goes_on | branches)
        node = torch.where(branches, self._nodes[at], node)
        return torch.where(alive, node, -1), torch.where(branches, self._ends[at], end)
