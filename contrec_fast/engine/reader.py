"""The language model's part of inference: histories to conditions and texts."""

import copy
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from contrec_fast import ops
from contrec_fast.data.prompts import Prompts
from contrec_fast.engine.decoding import Decoder
from contrec_fast.engine.drafts import Drafts
from contrec_fast.engine.packed import PackedModel, Packing
from contrec_fast.engine.prompting import PackedPrompts, PromptPacker
from contrec_fast.models.contrec import ContRec

EXAMPLES = 5000  # responses that drafts are made of at first
BUDGET = {"cpu": 4096, "cuda": 32768}  # tokens in one pass over prompts


class Reader:
    """Reads histories and writes responses: what `ContRec.read` and `.write` do, but faster.

    Prompts are packed: no linear layer sees padding. What all prompts begin with is read once,
    here, and stays in the cache. The last layer computes keys and values everywhere, the rest of
    it only where something is read. Responses are drafted (`engine.drafts`). In float32 the
    results are the same up to rounding. A language model that cannot be packed (`packed.suits`:
    one with a sliding window, or whose attention does not go through transformers' interface) is
    read by ContRec's own methods.

    The model must not change as long as the reader is used.

    Args:
        prompts: of the catalog that the histories refer to. dtype: that the language model
        computes in, its own by default; for another one it is copied. bfloat16 leaves conditions
        2 to 3 digits and may change words of the texts.

    Attributes:
        counters: tokens of "prompts" read, decoding "passes", tokens "fed" in them and "written".
    """

    def __init__(self, model: ContRec, prompts: Prompts, dtype: torch.dtype | None = None):
        backbone = model.backbone
        if dtype not in (None, backbone.dtype):
            backbone = copy.deepcopy(backbone).to(dtype)
        self.model, self.prompts = model, prompts
        self.packed = PackedModel(backbone)
        self.counters = {"prompts": 0, "passes": 0, "fed": 0, "written": 0}
        self.text_table = backbone.get_input_embeddings().weight.detach()
        self.tokens = model.item_tokens.flatten(0, 1).to(self.text_table.dtype)
        self.packer = PromptPacker(prompts, len(model.item_tokens), self.text_table.device)
        self.prefix = self.packer.role.shape[1]
        self._decoder: Decoder | None = None
        if self.packed.suits and self.prefix:
            self._read_role()

    @torch.inference_mode()
    def _read_role(self) -> None:
        cache, token_ids = self.packed.cache, torch.from_numpy(self.packer.role[0])
        cache.reserve(1, self.prefix)
        packing = Packing.of(torch.tensor([self.prefix]), torch.arange(self.prefix), cache)
        self.packed(self.text_table[token_ids.to(cache.device)], packing)
        cache.keep_prefix(self.prefix)

    @torch.inference_mode()
    def read(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Conditions [B, D] of histories of item indices, oldest first, at least one each.

        Raises:
            ValueError: a prompt is longer than the language model has positions.
        """
        if not self.packed.suits:
            batch = self.prompts.inference_batch(histories)
            return self.model.read(batch.to(self.text_table.device))
        order = self.packer.order(histories)
        packed = self.packer.pack([histories[i] for i in order], question=False)
        self._reserve(packed, 0)
        nothing = packed.token_ids[:0]
        hidden = self._prefill(packed, nothing, (packed.reads,), lambda hidden: hidden[:, 0])
        return self._conditions(hidden, packed)[np.argsort(order)]

    @torch.inference_mode()
    def write(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, list[str]]:
        """Conditions [B, D] and the texts that answer such histories, written greedily.

        Raises:
            ValueError: a prompt and its response are longer than the language model has positions.
        """
        if not self.packed.suits:
            batch = self.prompts.inference_batch(histories)
            return self.model.write(batch.to(self.text_table.device))
        order = self.packer.order(histories)
        back = np.argsort(order)
        packed = self.packer.pack([histories[i] for i in order], question=True)
        decoder = self._decoder = self._decoder or self._make_decoder()
        self._reserve(packed, decoder.room)
        opening, last = decoder.opening(), packed.counts - 1
        wanted = [packed.reads, *(last + i for i in range(len(opening) + 1))]
        hidden, best = zip(*self._prefill(
            packed, opening, wanted,
            lambda hidden: (hidden[:, 0].clone(), decoder.greedy(hidden[:, 1:])),
        ))  # fmt: skip
        places = (self.prefix + packed.counts).to(opening.device)
        written = decoder.write(opening, torch.cat(best), places)
        if self.model.config.head.source == "response":
            conditions = self.model.response_conditions(written)
        else:
            conditions = self._conditions(hidden, packed)
        lines = [line[line >= 0].tolist() for line in written.cpu().numpy()[back]]
        texts = self.model.text_tokenizer.batch_decode(lines, skip_special_tokens=True)
        return conditions[back], [text.strip() for text in texts]

    def _make_decoder(self) -> Decoder:
        end, room = self.model.text_tokenizer.eos_token_id, self.model.config.prompt.response_tokens
        drafts = Drafts(self.prompts.responses(EXAMPLES), end, self.text_table.device)
        return Decoder(self.packed, drafts, end, room, self.counters)

    def _reserve(self, packed: PackedPrompts, room: int) -> None:
        longest = self.prefix + int(packed.counts.max()) + room
        self.model.require_positions(longest)
        self.packed.cache.reserve(len(packed.counts), longest)

    def _conditions(self, hidden: Sequence[Tensor], packed: PackedPrompts) -> Tensor:
        states = torch.cat(tuple(hidden)).to(self.model.item_vectors.dtype)
        return self.model.conditions(states[:, None], packed)

    def _prefill(self, packed: PackedPrompts, opening: Tensor, wanted, take) -> list:
        """Read prompts, each with the opening of its response behind it, some at a time.

        Args:
            wanted: places [B] in the prompts, ascending. take: what is kept of the hidden states
            [b, len(wanted), H] there.
        """
        tokens = self._token_table(packed)
        budget = BUDGET[self.text_table.device.type]
        filled = (packed.counts + len(opening)).cumsum(0).tolist()
        wanted = torch.stack(tuple(wanted), dim=1)
        ends = packed.counts.cumsum(0).tolist()
        found, first = [], 0
        while first < len(ends):
            before = filled[first - 1] if first else 0
            last = max(bisect_right(filled, before + budget), first + 1)
            part = slice(ends[first - 1] if first else 0, ends[last - 1])
            hidden = self._pass(packed, part, slice(first, last), opening, tokens, wanted)
            found.append(take(hidden))
            first = last
        return found

    def _pass(self, packed, part: slice, users: slice, opening, tokens, wanted) -> Tensor:
        counts, device = packed.counts[users], opening.device
        embedded = ops.gather_tokens(
            packed.token_ids[None, part], packed.rows[None, part], self.text_table, tokens
        )[0]
        total = counts + len(opening)
        starts = total.cumsum(0) - total
        inside = torch.arange(int(total.sum())) - starts.repeat_interleave(total)
        if len(opening):
            prompt = inside < counts.repeat_interleave(total)
            both = embedded.new_empty(len(inside), embedded.shape[1])
            both[prompt.to(device)] = embedded
            both[~prompt.to(device)] = self.text_table[opening].repeat(len(counts), 1)
            embedded = both
        cache, first = self.packed.cache, users.start
        positions = self.prefix + inside
        packing = Packing.of(total, positions, cache, first, alike=True)
        wanted = wanted[users]
        keep = (starts[:, None] + wanted).flatten()
        kept = torch.full_like(counts, wanted.shape[1])
        kept = Packing.of(kept, positions[keep], cache, first)
        self.counters["prompts"] += len(inside)
        hidden = self.packed(embedded, packing, keep.to(device), kept)
        return hidden.view(*wanted.shape, -1)

    def _token_table(self, packed: PackedPrompts) -> Tensor:
        """Tokens [R, H] of all items, and behind them those of the users, if prompts show any."""
        if not self.prompts.config.user_token:
            return self.tokens
        users = self.model.encode(self.model.summaries(packed)[0]).flatten(0, 1)
        return torch.cat([self.tokens, users.to(self.tokens.dtype)])
