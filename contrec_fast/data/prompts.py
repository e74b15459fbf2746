"""Prompts: histories of titles and continuous tokens, and the sentence the model answers with.

`role, example | user token | title <diff> z_1 .. z_K </diff> ... | question | response`. The
parts that never change come first and last, so a growing history only appends. The state at an
item's last continuous token has read everything up to and including that item, and nothing of
what follows: that is where the condition of the diffusion head is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrec_fast.config import PromptConfig
from contrec_fast.data.interactions import Items
from contrec_fast.data.templates import TEMPLATES, response_text

OPEN, CLOSE = "<diff>", "</diff>"
IGNORED = -100  # label that the loss skips, by Hugging Face's convention


class Window(NamedTuple):
    """A stretch of a user's history: `history[start:]` is shown, what is before is summarised."""

    history: np.ndarray
    start: int


@dataclass
class PromptBatch:
    """A batch of B prompts, which show I different items in all.

    token_ids, rows: [B, L] int64, as `ops.gather_tokens` takes them; rows refer to the K tokens
    of each of `items`, then to the K tokens of each user. attention_mask: [B, L] int64.
    labels: [B, L] text to learn, else -100. items: [I] item indices. shown: [B, M] item indices
    in order, -1 behind the last. older, older_offsets: items that the users chose before, and
    [B] where each user's begin. read_row, read_column: [P] where conditions are read.
    read_item: [P] which item of `shown` that is. next_items: [P] the item that follows there,
    -1 if unknown. answers: [B, S] token ids of the response, -1 behind its end; S may be 0.
    """

    token_ids: Tensor
    rows: Tensor
    attention_mask: Tensor
    labels: Tensor
    items: Tensor
    shown: Tensor
    older: Tensor
    older_offsets: Tensor
    read_row: Tensor
    read_column: Tensor
    read_item: Tensor
    next_items: Tensor
    answers: Tensor

    def to(self, device) -> "PromptBatch":
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})


class Prompts:
    """Writes prompts for one catalog and one text tokenizer.

    Args:
        items: the catalog. text_tokenizer: a Hugging Face tokenizer that knows `<diff>` and
        `</diff>` as single tokens. tokens: K continuous tokens per item and per user.

    Raises:
        ValueError: more templates are asked for than there are.
    """

    def __init__(self, items: Items, text_tokenizer, tokens: int, config: PromptConfig):
        self.config, self.tokens, self.text_tokenizer = config, tokens, text_tokenizer
        self.pad = text_tokenizer.pad_token_id
        if not 1 <= config.templates <= len(TEMPLATES):
            raise ValueError(
                f"prompt.templates: expected 1 to {len(TEMPLATES)}, got {config.templates}"
            )
        self._templates, self._titles, self._answers = [(_text([]), _text([]))], None, None
        self._open, self._close = _text([]), _text([])
        if config.text == "none":
            return
        self._templates = [
            tuple(_text(ids) for ids in self._encode(template))
            for template in TEMPLATES[: config.templates]
        ]
        opening, closing = text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
        self._open, self._close = _text([opening]), _text([closing])
        shown = [
            " ".join((title or item).split())[: config.title_length]
            for title, item in zip(items.titles, items.ids)
        ]
        if config.text == "full":
            self._titles = _LearnedTexts(self._encode, [" " + title for title in shown])
        categories = [" ".join(category.split()) for category in items.categories]
        answers = [response_text(*pair) for pair in zip(shown, categories)]
        self._answers = _LearnedTexts(self._encode, answers, text_tokenizer.eos_token_id)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # A title may hold the characters of a special token, but never becomes one.
        return self.text_tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True
        ).input_ids

    def training_batch(
        self, windows: Sequence[Window], rng: np.random.Generator | None = None
    ) -> PromptBatch:
        """Prompts that predict each next item of their window and state the last one.

        Args:
            windows: 2 to history + 1 items shown of each; the last is only predicted.
            rng: chooses the templates; the first one if not given.
        """
        count = len(self._templates)
        chosen = rng.integers(count, size=len(windows)) if rng else np.zeros(len(windows), int)
        shown = [window.history[window.start : -1] for window in windows]
        following = [window.history[window.start + 1 :] for window in windows]
        batch = self._batch(windows, shown, chosen, [next_items[-1] for next_items in following])
        batch.next_items = torch.from_numpy(np.concatenate(following))
        return batch

    def windows(self, histories: Sequence[np.ndarray]) -> list[Window]:
        """The latest `config.history` items of each history."""
        return [Window(h, max(0, len(h) - self.config.history)) for h in histories]

    def inference_batch(
        self, histories: Sequence[np.ndarray], windows: Sequence[Window] | None = None
    ) -> PromptBatch:
        """Prompts up to the question, padded on the left, one condition each.

        Args:
            histories: item indices, oldest first, at least one each. windows: what is shown of
            them, the latest `config.history` by default.
        """
        windows = self.windows(histories) if windows is None else windows
        shown = [window.history[window.start :] for window in windows]
        batch = self._batch(windows, shown, np.zeros(len(windows), int), None)
        last = torch.tensor([len(items) for items in shown]).cumsum(0) - 1
        batch.read_row, batch.read_column, batch.read_item = (
            read[last] for read in (batch.read_row, batch.read_column, batch.read_item)
        )
        batch.next_items = torch.full((len(windows),), -1)
        return batch

    @property
    def fixed(self) -> tuple[np.ndarray, np.ndarray]:
        """What every prompt at inference begins and ends with, [3, n] as `block` gives it."""
        return self._templates[0]

    @property
    def behind(self) -> int:
        """How many tokens of a block come after its last continuous token."""
        return self._close.shape[1]

    def block(self, row: int) -> np.ndarray:
        """Continuous tokens of one row of a table [rows, K, H], in their brackets.

        Returns:
            [3, n] token ids, rows of the table [rows * K, H] (-1 for text) and labels.
        """
        return np.concatenate(self._slots(row), axis=1)

    def blocks(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items [I] as a prompt shows them, each like `block` with its title; the row is the item.

        Returns:
            [3, T] all of them, one after another, and [I] how many tokens each has.
        """
        slots = self.block(0)
        lengths = np.full(len(items), slots.shape[1])
        blocks = np.tile(slots, len(items))
        blocks[1] += np.where(blocks[1] >= 0, self.tokens * np.repeat(items, lengths), 0)
        if self._titles is None:
            return blocks, lengths
        titles = self._titles.pieces(items.tolist())
        pairs = zip(titles, np.split(blocks, len(items), axis=1))
        pieces = [piece for pair in pairs for piece in pair]
        return np.concatenate(pieces, axis=1), lengths + [title.shape[1] for title in titles]

    def responses(self, most: int) -> np.ndarray:
        """Responses of at most so many items of the catalog, evenly spread over it.

        Returns:
            [M, S] int64 token ids with the end of the text, -1 behind it.

        Raises:
            ValueError: `config.text` is "none": there are no responses.
        """
        if self._answers is None:
            raise ValueError("prompt.text: expected 'full' or 'response', got 'none'")
        return padded_lists(self._answers.encoded(most)).numpy()

    def _batch(self, windows, shown, templates, answered) -> PromptBatch:
        """Answered (an item per window) and padded right, or not answered and padded left.

        The titles of the history are learned like the answer's: each says what came next.
        """
        items, place = np.unique(np.concatenate(shown), return_inverse=True)
        places = np.split(place, np.cumsum([len(part) for part in shown])[:-1])
        texts = answered is not None and self._answers is not None
        titles = None if self._titles is None else self._titles.pieces(items)
        answers = self._answers.pieces(answered) if texts else []
        prompts, reads = [], []
        for line, local in enumerate(places):
            role, question = self._templates[templates[line]]
            pieces = [role]
            if self.config.user_token:
                pieces += self._slots(len(items) + line)
            ends, length = [], sum(piece.shape[1] for piece in pieces)
            for position in local:
                block = [] if titles is None else [titles[position]]
                block += self._slots(position)
                length += sum(piece.shape[1] for piece in block)
                ends.append(length - 1 - self._close.shape[1])
                pieces += block
            pieces.append(question)
            if texts:
                pieces.append(answers[line])
            prompts.append(np.concatenate(pieces, axis=1))
            reads.append(ends)
        width = max(prompt.shape[1] for prompt in prompts)
        padded = np.empty((4, len(prompts), width), dtype=np.int64)
        padded[:] = np.array([self.pad, -1, IGNORED, 0])[:, None, None]
        for line, prompt in enumerate(prompts):
            length = prompt.shape[1]
            start = 0 if answered is not None else width - length
            padded[:3, line, start : start + length] = prompt
            padded[3, line, start : start + length] = 1
            reads[line] = np.array(reads[line]) + start
        token_ids, rows, labels, attention_mask = torch.from_numpy(padded)
        lengths = np.array([len(part) for part in shown])
        before = [window.history[: window.start] for window in windows]
        responses = [answer[0] for answer in answers] if texts else [[]] * len(shown)
        return PromptBatch(
            token_ids=token_ids,
            rows=rows,
            attention_mask=attention_mask,
            labels=labels,
            items=torch.from_numpy(items),
            shown=padded_lists(shown),
            older=torch.from_numpy(np.concatenate(before)),
            older_offsets=torch.tensor([0, *map(len, before[:-1])]).cumsum(0),
            read_row=torch.from_numpy(np.repeat(np.arange(len(shown)), lengths)),
            read_column=torch.from_numpy(np.concatenate(reads)),
            read_item=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
            next_items=torch.empty(0, dtype=torch.int64),
            answers=padded_lists(responses),
        )

    def _slots(self, owner: int) -> list[np.ndarray]:
        """`<diff> z_1 .. z_K </diff>` for a row of the batch's token table."""
        slots = _text([self.pad] * self.tokens)
        slots[1] = np.arange(owner * self.tokens, (owner + 1) * self.tokens)
        return [self._open, slots, self._close]


class _LearnedTexts:
    """Each item's text as a piece of a prompt, encoded when it is first wanted.

    Args:
        encode: texts to token ids. end: token id behind each text, if any.
    """

    def __init__(self, encode, texts: list[str], end: int | None = None):
        self._encode, self._texts = encode, texts
        self._end = [] if end is None else [end]
        self._known: dict[int, np.ndarray] = {}

    def pieces(self, items: Sequence[int]) -> list[np.ndarray]:
        new = [item for item in dict.fromkeys(items) if item not in self._known]
        for item, ids in zip(new, self._encode([self._texts[item] for item in new]) if new else ()):
            self._known[item] = _text([*ids, *self._end], learned=True)
        return [self._known[item] for item in items]

    def encoded(self, most: int) -> list[list[int]]:
        """Token ids of at most so many texts, evenly spread; nothing of it is kept."""
        texts = self._texts[:: -(-len(self._texts) // most)]
        return [[*ids, *self._end] for ids in self._encode(texts)]


def _text(ids: list[int], learned: bool = False) -> np.ndarray:
    """Text as a piece of a prompt: [3, n] token ids, token-table rows and labels."""
    labels = ids if learned else [IGNORED] * len(ids)
    return np.array([ids, [-1] * len(ids), labels], dtype=np.int64)


def padded_lists(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, M] int64, -1 behind each row's end."""
    padded = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    lengths = np.array([len(row) for row in rows])
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(padded)


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
