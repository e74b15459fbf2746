"""Guesses of how a response goes on, from the responses that were written before.

Responses follow a template, and many users get the same categories and titles: three tokens mostly
tell the next ones. A language model reads such a draft in one pass and keeps as much of it as it
would have written itself (speculative decoding, arXiv 2211.17192, with greedy choices; n-grams as
drafts: arXiv 2304.04487). So drafts change the time and never the text.
"""

import numpy as np
import torch
from torch import Tensor

CONTEXT = 3  # tokens that a guess is made from
LONGEST = 16  # tokens of a draft
SURE = 0.25  # a draft goes on while it is right as a whole at least that often
RECENT = 4096  # responses that are remembered
FACTORS = (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85, 0x106689D45497FDB5)


def _key(context):
    """Hash [...] of contexts [..., 3], the same with numpy and torch; integers wrap around."""
    return sum(context[..., i] * FACTORS[i] for i in range(CONTEXT))


class Drafts:
    """A table from contexts to drafts.

    Its memory is bounded: the examples and the last RECENT responses.

    Args:
        examples: [M, S] int64 token ids of responses with the end of the text, -1 behind it; M is
        at least 1. end: the token id that ends a text, which no draft goes beyond.
    """

    def __init__(self, examples: np.ndarray, end: int, device):
        self.end, self.device, self._examples = end, device, examples
        self._build([examples])
        self._first = self._keys, self._drafts, self._lengths
        self.forget()

    def forget(self) -> None:
        """Let drafts be those of the examples alone."""
        self._recent, self._new, self._known = [], 0, 1
        self._keys, self._drafts, self._lengths = self._first

    def propose(self, context: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Drafts for sequences whose last tokens are context [B, 3] (-1 before the first).

        Returns:
            [B, most] token ids and [B] how many of them are a draft.
        """
        key = _key(context)
        at = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        length = torch.where(self._keys[at] == key, self._lengths[at], 0)
        return self._drafts[at, :most], length.clamp(max=most)

    def learn(self, written: Tensor) -> None:
        """Remember responses [B, S], -1 behind their end; the table is remade ever less often."""
        self._recent.append(written.cpu().numpy())
        self._new += len(written)
        if self._new < min(self._known, RECENT):
            return
        while len(self._recent) > 1 and sum(map(len, self._recent[1:])) >= RECENT:
            self._recent.pop(0)
        self._known, self._new = sum(map(len, self._recent)), 0
        self._build([self._examples, *self._recent])

    def _build(self, parts: list[np.ndarray]) -> None:
        contexts, tokens = [], []
        for texts in parts:
            before = np.pad(texts, ((0, 0), (CONTEXT, 0)), constant_values=-1)
            windows = np.lib.stride_tricks.sliding_window_view(before, CONTEXT + 1, axis=1)
            windows = windows[texts >= 0]
            contexts.append(windows[:, :CONTEXT])
            tokens.append(windows[:, CONTEXT])
        context, token = np.concatenate(contexts), np.concatenate(tokens)
        key = _key(context)
        # Each pair of context and token once, with its count; then the commonest of each context.
        order = np.lexsort((token, key))
        key, token, context = key[order], token[order], context[order]
        new = np.append(True, (key[1:] != key[:-1]) | (token[1:] != token[:-1]))
        count = np.diff(np.append(new.nonzero()[0], len(key)))
        key, token, context = key[new], token[new], context[new]
        order = np.lexsort((-count, key))
        key, token, context, count = key[order], token[order], context[order], count[order]
        first = np.append(True, key[1:] != key[:-1])
        total = np.add.reduceat(count, first.nonzero()[0])
        key, token, context = key[first], token[first], context[first]
        share = np.where(token == self.end, 0.0, count[first] / total)
        following = _key(np.concatenate([context[:, 1:], token[:, None]], axis=1))
        after = np.searchsorted(key, following).clip(max=len(key) - 1)
        known = key[after] == following
        drafts = np.empty((len(key), LONGEST), dtype=np.int64)
        lengths = np.zeros(len(key), dtype=np.int64)
        at, sure = np.arange(len(key)), np.ones(len(key))
        for place in range(LONGEST):
            drafts[:, place] = token[at]
            sure *= share[at]
            lengths += sure >= SURE
            sure *= known[at]
            at = after[at]
        self._keys, self._drafts, self._lengths = (
            torch.from_numpy(x).to(self.device) for x in (key, drafts, lengths)
        )
