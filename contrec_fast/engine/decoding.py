"""Greedy decoding of many responses at once, several tokens a pass where a draft holds."""

import torch
from torch import Tensor, nn

from contrec_fast import native
from contrec_fast.engine.drafts import CONTEXT, LONGEST, Drafts
from contrec_fast.engine.fixed import WIDTH, FixedPasses
from contrec_fast.engine.packed import PackedModel, Packing
from contrec_fast.native_layers import choose_tokens

ROWS, GROUP = 512, 64  # of logits at a time, columns of them
NARROW = 512  # hidden states; wider ones leave the products to a library


class Decoder:
    """Writes on from prompts that a packed model's cache holds.

    The result is that of plain greedy decoding: a drafted token stays only if it is what the
    language model has just written. Finished sequences take no part in any product.

    Args:
        drafts: of the catalog's responses. end: the token id that ends a text. room: the most
        tokens of a response. counters: "passes" without padding, the tokens "fed" in them,
        "replays" of passes of fixed shapes and "written" tokens are added up there.
    """

    def __init__(self, packed: PackedModel, drafts: Drafts, end: int, room: int, counters: dict):
        self.packed, self.drafts, self.end, self.room = packed, drafts, end, room
        self.counters = counters
        self.embed = packed.backbone.get_input_embeddings()
        self.head = packed.backbone.get_output_embeddings()
        self.fixed = FixedPasses(packed, self.embed, self.greedy, counters)

    def opening(self) -> Tensor:
        """[n] draft of what every response begins with, to be fed behind the prompt."""
        start = torch.full((1, CONTEXT), -1, device=self.packed.cache.device)
        tokens, length = self.drafts.propose(start, self.room - 1)
        return tokens[0, : int(length)]

    def greedy(self, hidden: Tensor, fed: Tensor | None = None) -> Tensor:
        """The most likely next token [...] after each of the hidden states [..., H].

        Args:
            fed: [B, W] bool, which of the tokens of a pass they belong to (hidden is [T, H]); None
            for those of the opening (hidden is [B, 1 + n, H]).
        """
        plain = type(self.head) is nn.Linear and self.head.bias is None
        if not plain or hidden.device.type != "cpu":
            return self.head(hidden).argmax(-1)
        return greedy(hidden.flatten(0, -2), self.head.weight).view(hidden.shape[:-1])

    def write(self, opening: Tensor, best: Tensor, places: Tensor) -> Tensor:
        """Responses [B, room], -1 behind their end.

        Args:
            opening: [n] as fed. best: [B, 1 + n] what is most likely after the prompt and after
            each token of the opening. places: [B] where the cache holds the opening's first token.
        """
        batch, device = len(best), best.device
        self.written = best.new_full((batch, self.room), -1)
        self.count = best.new_zeros(batch)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.context = best.new_full((batch, CONTEXT), -1)
        self.place = places - 1
        self._accept(opening.expand(batch, -1), best.new_full((batch,), len(opening)), best)
        while left := int(self.alive.sum()):
            if self.fixed.covers(left):
                self._fixed_pass()
            else:
                self._pass()
        return self.written

    def _propose(self, most: int) -> tuple[Tensor, Tensor]:
        """[B, most] token ids that may come next, [B] how many of them are a draft."""
        draft, drafted = self.drafts.propose(self.context, most)
        return draft, drafted.minimum(self.room - 1 - self.count)

    def _pass(self) -> None:
        draft, drafted = self._propose(LONGEST)
        counts = torch.where(self.alive, 1 + drafted, 0)
        width = int(counts.max())
        draft = draft[:, : width - 1]
        fed = torch.cat([self.context[:, -1:], draft], dim=1)
        columns = torch.arange(width, device=fed.device)
        real = columns < counts[:, None]
        positions = (self.place[:, None] + columns)[real]
        packing = Packing.of(counts.cpu(), positions.cpu(), self.packed.cache)
        best = torch.zeros_like(fed)
        best[real] = self.greedy(self.packed(self.embed(fed[real]), packing), real)
        self.counters["passes"] += 1
        self.counters["fed"] += len(positions)
        self._accept(draft, drafted, best)

    def _fixed_pass(self) -> None:
        live = self.alive.nonzero()[:, 0]
        draft, drafted = self._propose(WIDTH - 1)
        fed = torch.cat([self.context[live, -1:], draft[live]], dim=1)
        best = self.context.new_zeros(len(self.alive), WIDTH)
        best[live] = self._chosen(self.fixed(fed, self.place[live], live), live)
        self.counters["replays"] += 1
        self._accept(draft, drafted, best)

    def _chosen(self, found: Tensor, live: Tensor) -> Tensor:
        """[n, WIDTH] what is most likely, from what passes of fixed shapes give for rows live."""
        return found

    def _accept(self, draft: Tensor, drafted: Tensor, best: Tensor) -> Tensor:
        """Keep of a draft [B, W - 1] what was written anyhow, best [B, W], and one token more.

        Returns:
            [B] how much of the draft.
        """
        columns = torch.arange(best.shape[1], device=best.device)
        right = (draft == best[:, :-1]) & (columns[:-1] < drafted[:, None])
        accepted = right.cumprod(1).sum(1)
        ended = (best == self.end) & (columns <= accepted[:, None])
        over = ended.cumsum(1) - ended.long() > 0  # behind the end of the text
        new = (columns <= accepted[:, None]) & ~over & self.alive[:, None]
        rows, at = new.nonzero(as_tuple=True)
        self.written[rows, self.count[rows] + at] = best[rows, at]
        last = accepted[:, None] + 1 + torch.arange(CONTEXT, device=best.device)
        self.context = torch.cat([self.context, best], dim=1).gather(1, last)
        self.place = self.place + accepted + 1
        self.count = self.count + new.sum(1)
        self.counters["written"] += len(rows)
        self.alive = self.alive & ~ended.any(1) & (self.count < self.room)
        return accepted


def greedy(hidden: Tensor, weight: Tensor) -> Tensor:
    """Argmax [T] of hidden [T, H] @ weight [V, H].T, the first one where several are largest.

    Twice as fast on a CPU than product and argmax: the logits of some rows stay in a cache,
    and a maximum is vectorised where an argmax is not, so that it is only looked for in the group
    of columns that holds the maximum. With the C++ extension, logits stay in registers.
    """
    vocabulary = len(weight)
    plain = hidden.dtype == weight.dtype == torch.float32
    if native.serves(hidden) and plain and weight.shape[1] <= NARROW:
        return choose_tokens(hidden.contiguous(), weight.contiguous())
    groups = -(-vocabulary // GROUP)
    logits = hidden.new_empty(min(ROWS, len(hidden)), groups * GROUP)
    logits[:, vocabulary:] = -torch.inf
    found = hidden.new_empty(len(hidden), dtype=torch.int64)
    for part, out in zip(hidden.split(ROWS), found.split(ROWS)):
        rows = logits[: len(part)]
        torch.mm(part, weight.T, out=rows[:, :vocabulary])
        grouped = rows.view(-1, groups, GROUP)
        group = grouped.amax(2).argmax(1, keepdim=True)
        inside = grouped.take_along_dim(group[..., None], dim=1)[:, 0].argmax(1, keepdim=True)
        out.copy_((group * GROUP + inside)[:, 0])
    return found
