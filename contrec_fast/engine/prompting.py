"""Prompts without padding, their rows referring to the table of all items' tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_fast.data.prompts import Prompts, padded_lists


@dataclass
class PackedPrompts:
    """Prompts of B users but for what they all begin with, one after another: T tokens.

    token_ids, rows: [T] int64 as `ops.gather_tokens` takes them; rows refer to the K tokens of
    each item of the catalog, then to the K tokens of each user. counts, reads: [B] on the host,
    the tokens of each prompt, with the opening of a response if there is one, and where in it the
    condition is read. The rest is what
    `ContRec.conditions` and `ContRec.summaries` take of a batch (`PromptBatch`), for states
    [B, 1, H].
    """

    token_ids: Tensor
    rows: Tensor
    counts: Tensor
    reads: Tensor
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
        self._blocks: dict[int, np.ndarray] = {}

    def order(self, histories: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
        """[B] an order in which prompts become longer, and how long the items of the last are."""
        blocks, most = self._blocks, self.prompts.config.history
        shown = [history[-most:].tolist() for history in histories]
        new = sorted(set().union(*shown) - blocks.keys())
        blocks.update(zip(new, (block[:2] for block in self.prompts.blocks(new))))
        lengths = [sum(blocks[item].shape[1] for item in items) for items in shown]
        return np.argsort(lengths, kind="stable"), max(lengths)

    def pack(self, histories: Sequence[np.ndarray], opening: np.ndarray | None) -> PackedPrompts:
        """Prompts of histories that `order` has seen.

        Args:
            opening: [n] token ids, what the response may begin with, to stand behind the question;
            None for prompts that end where the condition is read.
        """
        prompts, most = self.prompts, self.prompts.config.history
        shown = [history[-most:] for history in histories]
        before = [history[:-most] for history in histories]
        if opening is not None:
            behind = np.array([opening, np.full(len(opening), -1)])
            behind = np.concatenate([self._question[:2], behind], axis=1)
        pieces, counts, reads = [], [], []
        for line, items in enumerate(shown):
            prompt = [self._blocks[item] for item in items.tolist()]
            if prompts.config.user_token:
                prompt.insert(0, prompts.block(self.items + line)[:2])
            length = sum(piece.shape[1] for piece in prompt) - prompts.behind
            reads.append(length - 1)
            if opening is None:
                prompt[-1] = prompt[-1][:, : prompt[-1].shape[1] - prompts.behind]
            else:
                prompt.append(behind)
                length += prompts.behind + behind.shape[1]
            pieces += prompt
            counts.append(length)
        token_ids, rows = np.concatenate(pieces, axis=1)
        on_device = {
            "token_ids": torch.from_numpy(token_ids),
            "rows": torch.from_numpy(rows),
            "shown": padded_lists(shown),
            "older": torch.from_numpy(np.concatenate(before)),
            "older_offsets": torch.tensor([0, *map(len, before[:-1])]).cumsum(0),
            "read_row": torch.arange(len(shown)),
            "read_column": torch.zeros(len(shown), dtype=torch.int64),
            "read_item": torch.tensor([len(items) - 1 for items in shown]),
        }
        return PackedPrompts(
            counts=torch.tensor(counts),
            reads=torch.tensor(reads),
            **{name: tensor.to(self.device) for name, tensor in on_device.items()},
        )
