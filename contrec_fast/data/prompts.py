"""Prompts: histories of titles and continuous tokens, and the sentence the model answers with.

`role, example | title <diff> z_1 .. z_K </diff> ... | question | response`. The parts that never
change come first and last, so a growing history only appends. The state at an item's `</diff>`
has read everything up to and including that item, and nothing of what follows: that is where
the condition of the diffusion head is read.
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
        self.role, self.question = self._encode([ROLE, QUESTION])
        marks = [text_tokenizer.convert_tokens_to_ids(mark) for mark in (OPEN, CLOSE)]
        slots = [marks[0], *[self.pad] * tokens, marks[1]]
        self._blocks = [
            np.array([*title, *slots]) for title in self._encode([" " + t for t in shown])
        ]
        categories = [" ".join(category.split()) for category in items.categories]
        responses = [response_text(*pair) for pair in zip(shown, categories)]
        end = text_tokenizer.eos_token_id
        self._responses = [np.array([*ids, end]) for ids in self._encode(responses)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.text_tokenizer(texts, add_special_tokens=False).input_ids

    def training_batch(self, windows: Sequence[np.ndarray]) -> PromptBatch:
        """Prompts that predict each next item of their window and state the last one.

        Args:
            windows: item indices, oldest first, 2 to history + 1 of them each.
        """
        return self._batch(windows, self._responses)

    def inference_batch(self, histories: Sequence[np.ndarray]) -> PromptBatch:
        """Prompts up to the question, padded on the left, one condition each.

        Args:
            histories: item indices, oldest first; the latest `history` of them are used.
        """
        windows = [np.append(h[-self.config.history :], -1) for h in histories]
        batch = self._batch(windows, None)
        last = batch.token_ids.shape[1] - len(self.question) - 1
        batch.read_row = torch.arange(len(windows))
        batch.read_column = torch.full((len(windows),), last)
        batch.next_items = torch.full((len(windows),), -1)
        return batch

    def _batch(self, windows, responses) -> PromptBatch:
        """Prompts for `window[:-1]`, answered if `responses` are given."""
        tokens, rows, labels, reads = [], [], [], []
        for window in windows:
            parts, ends, length = [self.role], [], len(self.role)
            for item in window[:-1]:
                length += len(self._blocks[item])
                parts.append(self._blocks[item])
                ends.append(length - 1)
            parts.append(self.question)
            answer = responses[window[-1]] if responses else []
            ids = np.concatenate([*parts, answer]).astype(np.int64)
            row = np.full(len(ids), -1)
            slots = np.array(ends)[:, None] - np.arange(self.tokens, 0, -1)
            row[slots] = window[:-1, None] * self.tokens + np.arange(self.tokens)
            label = np.full(len(ids), IGNORED)
            if len(answer):
                label[-len(answer) :] = answer
            tokens.append(ids)
            rows.append(row)
            labels.append(label)
            reads.append(ends)
        width = max(map(len, tokens))
        left = responses is None

        def pad(arrays, value):
            whole = np.full((len(arrays), width), value)
            for line, array in zip(whole, arrays):
                line[slice(-len(array), None) if left else slice(len(array))] = array
            return torch.from_numpy(whole)

        return PromptBatch(
            token_ids=pad(tokens, self.pad),
            rows=pad(rows, -1),
            attention_mask=pad([np.ones(len(ids), dtype=np.int64) for ids in tokens], 0),
            labels=pad(labels, IGNORED),
            read_row=torch.repeat_interleave(torch.tensor([len(ends) for ends in reads])),
            read_column=torch.tensor([end for ends in reads for end in ends]),
            next_items=torch.from_numpy(np.concatenate([window[1:] for window in windows])),
        )


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
