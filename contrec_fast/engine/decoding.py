"""Greedy decoding of many responses at once, several tokens a pass where a draft holds."""

import torch
from torch import Tensor

from contrec_fast.engine.drafts import Drafts
from contrec_fast.engine.packed import PackedModel, Packing


class Decoder:
    """Writes on from prompts that a packed model's cache holds.

    The result is that of plain greedy decoding: a drafted token stays only if it is what the
    language model has just written. Finished sequences take no part in any product, and leave
    the cache when half of those that it holds are finished.

    Args:
        drafts: of the catalog's responses. end: the token id that ends a text. room: the most
        tokens of a response. counters: "passes", "fed" and "written" tokens are added up there.
    """

    def __init__(self, packed: PackedModel, drafts: Drafts, end: int, room: int, counters: dict):
        self.packed, self.drafts, self.end, self.room = packed, drafts, end, room
        self.counters = counters
        self.embed = packed.backbone.get_input_embeddings()
        self.head = packed.backbone.get_output_embeddings()
        self.opening = drafts.propose(
            torch.zeros(1, dtype=torch.int64, device=packed.cache.device),
            torch.zeros(1, dtype=torch.int64, device=packed.cache.device),
            min(drafts.root, room - 1),
        )[0]  # what every response begins with, to be fed with the prompt

    def greedy(self, hidden: Tensor) -> Tensor:
        """The most likely next token [...] after each of the hidden states [..., H]."""
        return self.head(hidden).argmax(-1)

    def write(self, best: Tensor, places: Tensor) -> Tensor:
        """Responses [B, room], -1 behind their end.

        Args:
            best: [B, 1 + n] what is most likely after the prompt and after each of the n tokens
            of `opening`. places: [B] where the cache holds the first token of the opening.
        """
        batch, device = len(best), best.device
        self.written = best.new_full((batch, self.room), -1)
        self.count = best.new_zeros(batch)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.node, self.ends = best.new_zeros(batch), best.new_full((batch,), self.drafts.root)
        self.place = places - 1
        self.token = best[:, 0]
        finished, who = self.written.clone(), torch.arange(batch, device=device)
        self._accept(self.opening.expand(batch, -1), len(self.opening), best)
        while left := int(self.alive.sum()):
            if 2 * left <= len(self.alive):
                finished[who] = self.written
                who = who[self._compact()]
            self._pass()
        finished[who] = self.written
        return finished

    def _pass(self) -> None:
        drafted = (self.ends - self.count).minimum(self.room - 1 - self.count)
        drafted = torch.where(self.alive & (self.node >= 0), drafted, 0)
        counts = torch.where(self.alive, 1 + drafted, 0)
        width = int(counts.max())
        draft = self.drafts.propose(self.node, self.count, width - 1)
        fed = torch.cat([self.token[:, None], draft], dim=1)
        columns = torch.arange(width, device=fed.device)
        real = columns < counts[:, None]
        positions = (self.place[:, None] + columns)[real]
        packing = Packing.of(counts.cpu(), positions.cpu(), self.packed.cache)
        best = torch.zeros_like(fed)
        best[real] = self.greedy(self.packed(self.embed(fed[real]), packing))
        self.counters["passes"] += 1
        self.counters["fed"] += len(positions)
        self._accept(draft, drafted, best)

    def _accept(self, draft: Tensor, drafted: Tensor | int, best: Tensor) -> None:
        """Keep of a draft [B, W - 1] what was written anyhow, best [B, W], and one token more."""
        columns = torch.arange(best.shape[1], device=best.device)
        right = (draft == best[:, :-1]) & (columns[:-1] < torch.as_tensor(drafted)[..., None])
        accepted = right.cumprod(1).sum(1)
        ended = (best == self.end) & (columns <= accepted[:, None])
        over = ended.cumsum(1) - ended.long() > 0  # behind the end of the text
        new = (columns <= accepted[:, None]) & ~over & self.alive[:, None]
        rows, at = new.nonzero(as_tuple=True)
        self.written[rows, self.count[rows] + at] = best[rows, at]
        self.token = best.gather(1, accepted[:, None])[:, 0]
        depth = self.count + accepted
        self.node, self.ends = self.drafts.follow(self.node, self.ends, depth, self.token)
        self.place = self.place + accepted + 1
        self.count = self.count + new.sum(1)
        self.counters["written"] += len(rows)
        self.alive = self.alive & ~ended.any(1) & (self.count < self.room)

    def _compact(self) -> Tensor:
        """Drop finished sequences; returns which stay."""
        stay = self.alive.nonzero()[:, 0]
        self.packed.cache.compact(stay, int(self.place[stay].max()))
        for name in ("written", "count", "alive", "node", "ends", "place", "token"):
            setattr(self, name, getattr(self, name)[stay])
        return stay
