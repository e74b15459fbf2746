"""What a released language model answers to prompts of text and continuous tokens."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from contrec_fast import ops
from contrec_fast.engine.decoding import Decoder
from contrec_fast.engine.drafts import Drafts
from contrec_fast.engine.packed import PackedModel, Packing
from contrec_fast.engine.reader import BUDGET, CACHE_BYTES

NO_TOKEN = -2  # the end of texts that nothing ends


class Responder:
    """Writes greedily, like transformers' `generate` with one new token or more, but faster.

    Prompts are packed without padding, what all of a call begin with is read once, and drafts of
    earlier responses are verified instead of written token by token (`contrec_fast.engine`).

    Args:
        language_model: a causal LM, which must not change any more. room: tokens written at most.

    Raises:
        ValueError: a model whose attention cannot be packed (`PackedModel.suits`).
    """

    def __init__(self, language_model: PreTrainedModel, room: int):
        self.model, self.room = language_model, room
        self.table = language_model.get_input_embeddings().weight.detach()
        self.packed = PackedModel(language_model)
        if not self.packed.suits:
            kind = type(language_model).__name__
            raise ValueError(
                f"base: expected full attention through transformers' interface, got {kind}'s"
            )
        ends = language_model.generation_config.eos_token_id
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        end = self.ends[0] if self.ends else NO_TOKEN
        counters = dict.fromkeys(("passes", "fed", "replays", "captures", "written"), 0)
        drafts = Drafts(np.array([[max(end, 0)]]), end, self.table.device)  # none to begin with
        self.decoder = Decoder(self.packed, drafts, end, room, counters)
        self.prefix = np.empty((2, 0), dtype=np.int64)  # what the cache's rows begin with

    @torch.inference_mode()
    def write(self, prompts: Sequence[np.ndarray], tokens: Tensor) -> Tensor:
        """Responses [B, room] with the end of the text, -1 behind it.

        Args:
            prompts: B arrays [2, n] of text token ids and of rows of `tokens`, -1 for text.
            tokens: [R, H] continuous tokens in the embeddings' dtype.

        Raises:
            ValueError: prompts that, with a response, are longer than the language model reads.
        """
        lengths = np.array([prompt.shape[1] for prompt in prompts])
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and lengths.max() + self.room > most:
            raise ValueError(
                f"prompts: expected at most {most - self.room} tokens, got {lengths.max()}"
            )
        self._share(prompts)
        start, order = self.prefix.shape[1], np.argsort(lengths, kind="stable")
        places = (lengths.max() + self.room) * self.packed.cache.place_bytes
        at_once = max(1, CACHE_BYTES // places)
        written = torch.empty(len(prompts), self.room, dtype=torch.int64, device=tokens.device)
        for part in np.split(order, range(at_once, len(order), at_once)):
            written[part] = self._write([prompts[i][:, start:] for i in part], tokens)
        ended = torch.isin(written, written.new_tensor(self.ends))
        return written.masked_fill(ended.cumsum(1) - ended.long() > 0, -1)

    def _share(self, prompts: Sequence[np.ndarray]) -> None:
        """Let the cache's rows begin with what all prompts begin with, but for a token at least.

        Of what they begin with already a part is enough, if it is not much shorter.
        """
        shortest = min(prompt.shape[1] for prompt in prompts) - 1
        heads = np.stack([prompt[:, :shortest] for prompt in prompts])
        same = ((heads == heads[0]) & (heads[:, 1:] == -1)).all((0, 1))
        shared = prompts[0][:, : int(same.cumprod().sum())]
        both = min(shared.shape[1], self.prefix.shape[1])
        kept = int((shared[0, :both] == self.prefix[0, :both]).cumprod().sum())
        self.prefix = shared[:, :kept]
        if 2 * kept >= shared.shape[1]:
            return
        self.prefix, length = shared, shared.shape[1]
        cache = self.packed.cache
        cache.reserve(1, length)
        packing = Packing.of(torch.tensor([length]), torch.arange(length), cache)
        self.packed(self.table[torch.from_numpy(shared[0]).to(self.table.device)], packing)
        cache.keep_prefix(length)

    def _write(self, prompts: list[np.ndarray], tokens: Tensor) -> Tensor:
        counts = np.array([prompt.shape[1] for prompt in prompts])
        start = self.prefix.shape[1]
        self.packed.cache.reserve(len(prompts), start + int(counts.max()) + self.room)
        budget = BUDGET.get(self.table.device.type, BUDGET["cuda"])
        passes = (counts.cumsum() - counts) // budget  # which pass over prompts each is in
        bounds = [0, *(np.flatnonzero(np.diff(passes)) + 1), len(prompts)]
        best = [self._first(prompts[a:b], tokens, a) for a, b in pairwise(bounds)]
        places = torch.from_numpy(start + counts).to(self.table.device)
        written = self.decoder.write(places[:0], torch.cat(best)[:, None], places)
        self.decoder.drafts.learn(written)
        return written

    def _first(self, prompts: list[np.ndarray], tokens: Tensor, row: int) -> Tensor:
        """Read prompts into the cache's rows from `row` on; [b] the first token of responses."""
        device, cache = self.table.device, self.packed.cache
        ids, rows = torch.from_numpy(np.concatenate(prompts, axis=1)).to(device)
        embedded = ops.gather_tokens(ids[None], rows[None], self.table, tokens)[0]
        counts = torch.tensor([prompt.shape[1] for prompt in prompts])
        ends = counts.cumsum(0)
        positions = torch.arange(len(ids)) - (ends - counts).repeat_interleave(counts)
        positions += self.prefix.shape[1]
        packing = Packing.of(counts, positions, cache, row, alike=True)
        kept = Packing.of(torch.ones_like(counts), positions[ends - 1], cache, row)
        hidden = self.packed(embedded, packing, (ends - 1).to(device), kept)
        logits = self.model.get_output_embeddings()(hidden)
        logits[:, self.ends] = -torch.inf  # a text has a token at least
        return logits.argmax(-1)
