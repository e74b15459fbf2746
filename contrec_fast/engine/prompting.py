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
    the tokens of each prompt and where in it the condition is read. The rest is what
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

    def order(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[B] an order in which neighbours have prompts of similar lengths."""
        blocks, most = self._blocks, self.prompts.config.history
        shown = [history[-most:].tolist() for history in histories]
        new = sorted(set().union(*shown) - blocks.keys())
        blocks.update(zip(new, self.prompts.blocks(new)))
        lengths = [sum(blocks[item].shape[1] for item in items) for items in shown]
        return np.argsort(lengths, kind="stable")

    def pack(self, histories: Sequence[np.ndarray], question: bool) -> PackedPrompts:
        """Prompts of histories that `order` has seen, up to the question or to what is read."""
        prompts, most = self.prompts, self.prompts.config.history
        shown = [history[-most:] for history in histories]
        before = [history[:-most] for history in histories]
        pieces, counts, reads = [], [], []
        for line, items in enumerate(shown):
            prompt = [self._blocks[item] for item in items.tolist()]
            if prompts.config.user_token:
                prompt.insert(0, prompts.block(self.items + line))
            read = sum(piece.shape[1] for piece in prompt) - prompts.behind
            if question:
                prompt.append(self._question)
            else:
                prompt[-1] = prompt[-1][:, : prompt[-1].shape[1] - prompts.behind]
            pieces += prompt
            counts.append(sum(piece.shape[1] for piece in prompt))
            reads.append(read - 1)
        token_ids, rows = np.concatenate(pieces, axis=1)[:2]
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
