"""Prompts: histories of titles and continuous tokens, and the sentence the model answers with.

`role, example | title <diff> z_1 .. z_K </diff> ... | question | response`. The parts that never
change come first and last, so a growing history only appends. The state at an item's last
continuous token has read everything up to and including that item, and nothing of what follows:
that is where the condition of the diffusion head is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrec_fast.config import PromptConfig
from contrec_fast.data.interactions import Items

OPEN, CLOSE = "<diff>", "</diff>"
ROLE = (
    "You advise the customers of a shop. Example: after a tent and a sleeping bag, "
    "the user might lean towards (Camping) products, such as a camping stove. "
    "This user chose, oldest first:"
)
QUESTION = " What comes next?"
IGNORED = -100  # label that the loss skips, by Hugging Face's convention


def response_text(title: str, category: str) -> str:
    """The sentence that states what a user wants."""
    if category:
        return f" The user might lean towards ({category}) products, such as {title}."
    return f" The user might like {title}."


@dataclass
class PromptBatch:
    """A batch of prompts.

    token_ids, rows: [B, L] int64, as `ops.gather_tokens` takes them. attention_mask: [B, L]
    int64. labels: [B, L] text to learn, else -100. read_row, read_column: [P] where conditions
    are read. next_items: [P] the item that follows there, -1 if unknown.
    """

    token_ids: Tensor
    rows: Tensor
    attention_mask: Tensor
    labels: Tensor
    read_row: Tensor
    read_column: Tensor
    next_items: Tensor

    def to(self, device) -> "PromptBatch":
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})


class Prompts:
    """Writes prompts for one catalog and one text tokenizer.

    Args:
        items: the catalog. text_tokenizer: a Hugging Face tokenizer that knows `<diff>` and
        `</diff>` as single tokens. tokens: K continuous tokens per item.
    """

    def __init__(self, items: Items, text_tokenizer, tokens: int, config: PromptConfig):
        self.config, self.tokens, self.text_tokenizer = config, tokens, text_tokenizer
        self.pad = text_tokenizer.pad_token_id
        shown = [
            " ".join((title or item).split())[: config.title_length]
            for title, item in zip(items.titles, items.ids)
        ]
        fixed = [_piece(ids, learned=False) for ids in self._encode([ROLE, QUESTION])]
        self.role, self.question = fixed
        opening, closing = text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
        slots = _piece([opening, *[self.pad] * tokens, closing], learned=False)
        self._blocks = []
        for item, title in enumerate(self._encode([" " + title for title in shown])):
            slots[1, 1:-1] = np.arange(item * tokens, (item + 1) * tokens)
            self._blocks.append(np.concatenate([_piece(title, learned=True), slots], axis=1))
        categories = [" ".join(category.split()) for category in items.categories]
        answers = self._encode([response_text(*pair) for pair in zip(shown, categories)])
        end = text_tokenizer.eos_token_id
        self._answers = [_piece([*ids, end], learned=True) for ids in answers]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # A title may hold the characters of a special token, but never becomes one.
        return self.text_tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True
        ).input_ids

    def training_batch(self, windows: Sequence[np.ndarray]) -> PromptBatch:
        """Prompts that predict each next item of their window and state the last one.

        Args:
            windows: item indices, oldest first, 2 to history + 1 of them each.
        """
        return self._batch(windows, self._answers)

    def inference_batch(self, histories: Sequence[np.ndarray]) -> PromptBatch:
        """Prompts up to the question, padded on the left, one condition each.

        Args:
            histories: item indices, oldest first; the latest `history` of them are used.
        """
        windows = [np.append(h[-self.config.history :], -1) for h in histories]
        batch = self._batch(windows, None)
        last = batch.token_ids.shape[1] - self.question.shape[1] - 2
        batch.read_row = torch.arange(len(windows))
        batch.read_column = torch.full((len(windows),), last)
        batch.next_items = torch.full((len(windows),), -1)
        return batch

    def _batch(self, windows, answers) -> PromptBatch:
        """Prompts for `window[:-1]`; answered and padded right if `answers` are given, else left.

        The titles of the history are learned like the answer's: each says what came next.
        """
        prompts, reads = [], []
        for window in windows:
            blocks = [self._blocks[item] for item in window[:-1]]
            answer = [answers[window[-1]]] if answers else []
            prompts.append(np.concatenate([self.role, *blocks, self.question, *answer], axis=1))
            lengths = [block.shape[1] for block in blocks]
            reads.append(self.role.shape[1] + np.cumsum(lengths) - 2)
        width = max(prompt.shape[1] for prompt in prompts)
        padded = np.empty((4, len(prompts), width), dtype=np.int64)
        padded[:] = np.array([self.pad, -1, IGNORED, 0])[:, None, None]
        for line, prompt in enumerate(prompts):
            length = prompt.shape[1]
            place = slice(length) if answers else slice(width - length, width)
            padded[:3, line, place], padded[3, line, place] = prompt, 1
        token_ids, rows, labels, attention_mask = torch.from_numpy(padded)
        return PromptBatch(
            token_ids=token_ids,
            rows=rows,
            attention_mask=attention_mask,
            labels=labels,
            read_row=torch.repeat_interleave(torch.tensor([len(ends) for ends in reads])),
            read_column=torch.from_numpy(np.concatenate(reads)),
            next_items=torch.from_numpy(np.concatenate([window[1:] for window in windows])),
        )


def _piece(ids: list[int], learned: bool) -> np.ndarray:
    """Text as a piece of a prompt: [3, n] token ids, token-table rows and labels."""
    labels = ids if learned else [IGNORED] * len(ids)
    return np.array([ids, [-1] * len(ids), labels], dtype=np.int64)


class CategoryMatcher:
    """Finds which categories a text names, as whole words and whatever the case."""

    def __init__(self, categories: Sequence[str]):
        known = [tuple(_words(category)) for category in categories]
        self.names = sorted({words for words in known if words})
        self._index = {words: group for group, words in enumerate(self.names)}
        self._longest = max(map(len, self.names), default=0)
        self.groups = torch.tensor([self._index.get(words, -1) for words in known])

    def match(self, texts: Sequence[str]) -> Tensor:
        """texts -> [B, G] bool, G being the number of categories (at least 1)."""
        matched = torch.zeros(len(texts), max(len(self.names), 1), dtype=torch.bool)
        for row, text in enumerate(texts):
            words = _words(text)
            for start in range(len(words)):
                for end in range(start + 1, min(start + self._longest, len(words)) + 1):
                    group = self._index.get(tuple(words[start:end]))
                    if group is not None:
                        matched[row, group] = True
        return matched


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
