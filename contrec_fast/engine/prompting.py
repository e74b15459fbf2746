"""Prompts without padding, their rows referring to the table of all items' tokens."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_fast.data.prompts import Prompts, Window, padded_lists
from contrec_fast.engine.remembered import Known
from contrec_fast.ops.transfer import upload


@dataclass
class PackedPrompts:
    """Prompts of B users but for what they all begin with, one after another: T tokens.

    token_ids, rows: [T] int64 as `ops.gather_tokens` takes them; rows refer to the K tokens of
    each item of the catalog, then to the K tokens of each user. before: [B] on the host, how many
    tokens of each prompt are left out because they are known. counts, reads: [B] on the host, the
    tokens behind these, with the opening of a response if there is one, and where among them the
    condition is read. lasting: [B] on the host, the tokens that a prompt with more items begins
    with, too. known: B users, None where nothing is to be remembered. The rest is what
    `ContRec.conditions` and `ContRec.summaries` take of a batch (`PromptBatch`), for states
    [B, 1, H].
    """

    token_ids: Tensor
    rows: Tensor
    before: Tensor
    counts: Tensor
    reads: Tensor
    lasting: Tensor
    known: list[Known | None]
    shown: Tensor
    older: Tensor
    older_offsets: Tensor
    read_row: Tensor
    read_column: Tensor
    read_item: Tensor


class PromptPacker:
    """Packs what `Prompts.inference_batch` pads.

    Args:
        items: how many the catalog has.
    """

    def __init__(self, prompts: Prompts, items: int, device):
        self.prompts, self.items, self.device = prompts, items, device
        self.role, self._question = prompts.fixed
        self._user = prompts.block(items)[:2] if prompts.config.user_token else self.role[:2, :0]
        # The blocks of items one after another: where each begins (-1: unknown) and its length.
        self._blocks, self._filled = np.empty((2, 0), dtype=np.int64), 0
        self._starts, self._lengths = np.full((2, items), -1)
        self._learning = threading.Lock()

    def learn(self, windows: Sequence[Window]) -> None:
        """Encode the items that `pack` will show; in any thread, while others are packed."""
        items = np.concatenate(_shown(windows))
        with self._learning:
            new = np.unique(items[self._starts[items] < 0])
            if not len(new):
                return
            blocks, lengths = self.prompts.blocks(new)
            filled = self._filled + blocks.shape[1]
            if filled > self._blocks.shape[1]:
                room = 2 * filled - self._blocks.shape[1]
                self._blocks = np.pad(self._blocks, ((0, 0), (0, room)))
            self._blocks[:, self._filled : filled] = blocks[:2]
            self._starts[new] = self._filled + lengths.cumsum() - lengths
            self._lengths[new], self._filled = lengths, filled

    def order(
        self, windows: Sequence[Window], known: Sequence[Known | None]
    ) -> tuple[np.ndarray, int]:
        """[B] an order by how much there is to read, and the tokens of the most items."""
        self.learn(windows)
        shown = _shown(windows)
        firsts = np.cumsum([0, *map(len, shown[:-1])])
        lengths = np.add.reduceat(self._lengths[np.concatenate(shown)], firsts)
        return np.lexsort((lengths, lengths - _held(known))), int(lengths.max())

    def pack(
        self,
        windows: Sequence[Window],
        known: Sequence[Known | None],
        opening: np.ndarray | None,
    ) -> PackedPrompts:
        """Prompts of windows that `order` has seen.

        Args:
            known: what is remembered of each user; the token where the condition is read is read
            in any case. opening: [n] token ids, what the response may begin with, to stand behind
            the question; None for prompts that end where the condition is read.
        """
        cut, tail = self.prompts.behind, self._question[:2, :0]
        shown, older = _shown(windows), [window.history[: window.start] for window in windows]
        counts = np.array([len(items) for items in shown])
        items, ends = np.concatenate(shown), counts.cumsum()
        lengths, head = self._lengths[items], self._user.shape[1]
        if opening is None:
            lengths[ends - 1] -= cut
        else:
            behind = np.array([opening, np.full(len(opening), -1)])
            tail = np.concatenate([self._question[:2], behind], axis=1)
        # Where in the batch each item begins, each prompt, and what stands behind its items.
        begins = lengths.cumsum() - lengths
        bodies = np.add.reduceat(lengths, ends - counts)
        totals = head + bodies + tail.shape[1]
        tails = totals.cumsum() - tail.shape[1]
        starts = tails - bodies - head
        token_ids, rows = packed = np.empty((2, totals.sum()), dtype=np.int64)
        each = np.arange(bodies.sum())
        shifts = starts + head - begins[ends - counts]
        packed[:, each + np.repeat(shifts, bodies)] = self._blocks[
            :, each + np.repeat(self._starts[items] - begins, lengths)
        ]
        packed[:, tails[:, None] + np.arange(tail.shape[1])] = tail[:, None]
        at = starts[:, None] + np.arange(head)
        packed[:, at] = self._user[:, None]
        line = self.prompts.tokens * np.arange(len(shown))[:, None]
        rows[at] += np.where(self._user[1] >= 0, line, 0)
        reads = head + bodies - 1 - (0 if opening is None else cut)
        before = np.minimum(_held(known), reads)
        if before.any():
            place = np.arange(len(rows)) - np.repeat(starts, totals)
            token_ids, rows = packed[:, place >= np.repeat(before, totals)]
        on_device = {
            "token_ids": torch.from_numpy(token_ids),
            "rows": torch.from_numpy(rows),
            "shown": padded_lists(shown),
            "older": torch.from_numpy(np.concatenate(older)),
            "older_offsets": torch.tensor([0, *map(len, older[:-1])]).cumsum(0),
            "read_row": torch.arange(len(shown)),
            "read_column": torch.zeros(len(shown), dtype=torch.int64),
            "read_item": torch.from_numpy(counts - 1),
        }
        lasting = reads + 1 + (0 if opening is None else cut) - before
        on_host = {"before": before, "counts": totals - before, "reads": reads - before,
                   "lasting": lasting}  # fmt: skip
        return PackedPrompts(
            known=list(known),
            **{name: torch.from_numpy(array) for name, array in on_host.items()},
            **{name: upload(tensor, self.device) for name, tensor in on_device.items()},
        )


def _shown(windows: Sequence[Window]) -> list[np.ndarray]:
    return [window.history[window.start :] for window in windows]


def _held(known: Sequence[Known | None]) -> np.ndarray:
    """[B] how many tokens are known."""
    return np.array([len(user.places) if user else 0 for user in known])
