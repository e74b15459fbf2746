"""Decoding among the responses of the catalog, so that what a text names exists.

Decoding in a prefix tree is how generative retrieval writes nothing but known names (GENRE, arXiv
2010.00904); here it is greedy. The language model chooses where the tree branches. Where it does
not, tokens are drafted, and as soon as one response is left, the rest of it needs no model at all.
"""

import numpy as np
import torch
from torch import Tensor

from contrec_fast.engine.decoding import ROWS, Decoder
from contrec_fast.engine.fixed import FixedPasses


class ResponseTrie:
    """A prefix tree of token ids down to where one response is left.

    Nodes are numbered level by level from 0, the root, so that the children of a node follow one
    another, in the order of their tokens. Node -1 is none, and has no children.

    Args:
        responses: [M, S] int64 token ids, -1 behind their end; M is at least 1. room: the most
        tokens of a response. vocabulary: more than any token id. end: the id that ends a text.

    Attributes:
        responses: [R, room] int64, the different ones. lone: [nodes + 1] the row of `responses`
        that is left at a node, else -1.
    """

    def __init__(self, responses: np.ndarray, room: int, vocabulary: int, end: int, device):
        rows = np.unique(responses[:, :room], axis=0)
        new = np.ones((len(rows) + 1, rows.shape[1]), dtype=bool)  # begins like no row before
        new[1:-1] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
        alone = new[:-1] & new[1:]
        new = new[:-1] & (rows >= 0)
        new[:, 1:] &= ~alone[:, :-1]
        levels = new.sum(0)
        node = np.zeros((len(rows), rows.shape[1] + 1), dtype=np.int64)  # after so many tokens
        node[:, 1:] = new.cumsum(0) + (levels.cumsum() - levels)
        level, row = new.T.nonzero()
        token, parent = rows[row, level], node[row, level]
        count = np.bincount(parent, minlength=len(token) + 1)
        lone = np.where(alone[row, level], row, -1)
        found = {
            "responses": np.pad(
                rows, ((0, 0), (0, room - rows.shape[1])), constant_values=-1
            ),
            "keys": parent * vocabulary + token,
            # The last entries are those of node -1.
            "token": np.concatenate([[-1], token, [-1]]),
            "first": np.append(1 + count.cumsum() - count, len(count)),
            "count": np.append(count, 0),
            "lone": np.concatenate([[-1], lone, [-1]]),
        }  # fmt: skip
        for name, value in found.items():
            setattr(self, name, torch.from_numpy(value).to(device))
        self.vocabulary, self.end = vocabulary, end

    def child(self, node: Tensor, token: Tensor) -> Tensor:
        """The nodes [...] that tokens [...] lead to from nodes [...], -1 where there is none."""
        key = node * self.vocabulary + token
        at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        known = (self.keys[at] == key) & (node >= 0) & (token >= 0)
        return torch.where(known, at + 1, -1)

    def follow(
        self, node: Tensor, draft: Tensor, drafted: Tensor, most: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Drafts as far as they lead to nodes with children, put right and continued where there
        is no choice.

        Args:
            node: [B] where they begin. draft: [B, W] token ids, of which drafted [B] are a draft.
            most: [B] tokens of a draft at most.

        Returns:
            [B, W] token ids, [B] how many of them are a draft, and [B, 1 + W] the nodes before
            the first of them and after each.
        """
        columns, path, going = [], [node], torch.ones_like(drafted, dtype=torch.bool)
        length = torch.zeros_like(drafted)
        for column in range(draft.shape[1]):
            only = self.count[node] == 1
            token = torch.where(only, self.token[self.first[node]], draft[:, column])
            node = self.child(node, token)
            going = going & (only | (column < drafted)) & (column < most) & (self.count[node] > 0)
            length = length + going
            columns.append(token)
            path.append(node)
        draft = torch.stack(columns, 1) if columns else draft
        return draft, length, torch.stack(path, 1)

    def choose(self, hidden: Tensor, node: Tensor, head) -> Tensor:
        """The most likely of the allowed tokens [T] after hidden states [T, H] at nodes [T].

        The first one where several are, the end of the text where none is allowed.

        Args:
            head: hidden states to logits [T, V].
        """
        count = self.count[node]
        best = torch.where(count > 0, self.token[self.first[node]], self.end)
        free = (count > 1).nonzero()[:, 0]
        for part in free.split(ROWS) if len(free) else ():
            best[part] = self._choose(head(hidden[part]), node[part])
        return best

    def _choose(self, logits: Tensor, node: Tensor) -> Tensor:
        count, each = self.count[node], torch.arange(len(node), device=node.device)
        which = each.repeat_interleave(count)
        place = torch.arange(len(which), device=node.device)
        token = self.token[(self.first[node] - (count.cumsum(0) - count))[which] + place]
        value = logits[which, token]
        top = value.new_full((len(node),), -torch.inf)
        top = top.scatter_reduce(0, which, value, "amax")
        place = place.masked_fill(value < top[which], len(which) - 1)
        first = place.new_full((len(node),), len(which) - 1).scatter_reduce(0, which, place, "amin")
        return token[first]


class ConstrainedDecoder(Decoder):
    """Writes only what a trie allows, else like `Decoder`.

    The result is that of greedy decoding with all other tokens' logits at minus infinity.
    """

    def __init__(self, trie: ResponseTrie, *args):
        super().__init__(*args)
        self.trie = trie
        # What is allowed differs from pass to pass: it is chosen behind the graphs.
        self.fixed = FixedPasses(self.packed, self.embed, lambda hidden: hidden, self.counters)

    def opening(self) -> Tensor:
        draft = super().opening()[None]
        length = torch.full((1,), draft.shape[1], device=draft.device)
        root = torch.zeros_like(length)
        draft, length, self.path = self.trie.follow(root, draft, length, length)
        self.path = self.path[:, : 1 + int(length)]
        return draft[0, : int(length)]

    def greedy(self, hidden: Tensor, fed: Tensor | None = None) -> Tensor:
        if fed is None:
            return self._choose(hidden, self.path.expand(len(hidden), -1))
        return self._choose(hidden, self.path[:, : fed.shape[1]][fed])

    def _chosen(self, found: Tensor, live: Tensor) -> Tensor:
        return self._choose(found, self.path[live])

    def _choose(self, hidden: Tensor, node: Tensor) -> Tensor:
        return self.trie.choose(hidden.flatten(0, -2), node.flatten(), self.head).view(node.shape)

    def _propose(self, most: int) -> tuple[Tensor, Tensor]:
        draft, drafted = super()._propose(most)
        room = self.room - 1 - self.count
        draft, drafted, self.path = self.trie.follow(self.node, draft, drafted, room)
        return draft, drafted

    def _accept(self, draft: Tensor, drafted: Tensor, best: Tensor) -> Tensor:
        accepted = super()._accept(draft, drafted, best)
        at = accepted[:, None]
        path = self.path.expand(len(best), -1)
        self.node = self.trie.child(path.gather(1, at)[:, 0], best.gather(1, at)[:, 0])
        row = self.trie.lone[self.node]
        done = (self.alive & (row >= 0)).nonzero()[:, 0]
        rest = self.trie.responses[row[done]]
        self.counters["written"] += int((rest >= 0).sum() - self.count[done].sum())
        self.written[done] = rest
        self.alive[done] = False
        return accepted
