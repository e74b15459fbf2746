"""Prompts against an independent reconstruction, and the category matcher against a plain one."""

import random
import re

import numpy as np
import pytest
import torch

from contrec_fast.config import BackboneConfig, PromptConfig
from contrec_fast.data import Items
from contrec_fast.data.prompts import (
    CLOSE,
    IGNORED,
    OPEN,
    QUESTION,
    ROLE,
    CategoryMatcher,
    Prompts,
    response_text,
)
from contrec_fast.models.backbone import load_backbone, make_tiny_backbone

TITLES = [
    "Plain Kettle",
    "  Two \n lines\tand   gaps ",
    "A title that is much longer than fifty characters, cut in the middle of a word",
    "",
    "Ünïcode – 茶 & <b>",
    "Says <diff> and </diff> and <eos>",
    *(f"Thing {number}" for number in range(40)),
]
ITEMS = Items(
    [f"SKU-{number}" for number in range(len(TITLES))],
    TITLES,
    ["Tea", "", " Board  Games ", "", "", "Tea", *["Things"] * 40],
)
SHOWN = [
    "Plain Kettle",
    "Two lines and gaps",
    "A title that is much longer than fifty characters,",
    "SKU-3",
    "Ünïcode – 茶 & <b>",
    "Says <diff> and </diff> and <eos>",
    *TITLES[6:],
]
CATEGORIES = ["Tea", "", "Board Games", "", "", "Tea", *["Things"] * 40]
HISTORY = 20


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    config = BackboneConfig(hidden=8, layers=1, heads=1, vocabulary=300)
    make_tiny_backbone(TITLES, config, folder)
    return load_backbone(folder)[1]


def make_prompts(text_tokenizer, tokens=2, **config):
    return Prompts(ITEMS, text_tokenizer, tokens, PromptConfig(**config))


def random_windows(*lengths):
    rng = np.random.default_rng(random.randrange(2**32))
    return [rng.integers(0, len(ITEMS), length) for length in lengths]


def decode_parts(text_tokenizer, ids, rows):
    """A prompt as text, in which continuous tokens are written as their rows in brackets."""
    parts, run = [], []
    for token, row in zip([*ids, None], [*rows, None]):
        if row == -1:
            run.append(token)
            continue
        if run:
            parts.append(text_tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
        if row is not None:
            parts.append(f"[{row}]")
    return "".join(parts)


def expected_text(history, tokens):
    """What a prompt says, from the catalog alone."""
    text = ROLE
    for item in history:
        slots = "".join(f"[{item * tokens + k}]" for k in range(tokens))
        text += f" {SHOWN[item]}{OPEN}{slots}{CLOSE}"
    return text + QUESTION


def unpadded(batch, line):
    kept = batch.attention_mask[line].bool()
    return [tensor[line][kept].tolist() for tensor in (batch.token_ids, batch.rows, batch.labels)]


def check_reads(batch, tokens, histories):
    """Conditions are read at the last continuous token of each item, right before `</diff>`."""
    items = [item for history in histories for item in history]
    users = [user for user, history in enumerate(histories) for _ in history]
    assert batch.read_row.tolist() == users
    assert len(batch.read_column) == len(items)
    for user, column, item in zip(users, batch.read_column.tolist(), items):
        slots = batch.rows[user, column - tokens + 1 : column + 2].tolist()
        assert slots == [*(item * tokens + k for k in range(tokens)), -1]
        assert batch.attention_mask[user, column] == 1


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_training_batches_say_what_they_should(text_tokenizer, tokens):
    prompts = make_prompts(text_tokenizer, tokens)
    windows = [np.arange(7), *random_windows(2, 3, 21, 9), np.array([5, 5, 5])]
    batch = prompts.training_batch(windows)
    histories = [window[:-1] for window in windows]
    for line, window in enumerate(windows):
        ids, rows, _ = unpadded(batch, line)
        answer = response_text(SHOWN[window[-1]], CATEGORIES[window[-1]])
        expected = expected_text(histories[line], tokens) + answer + "<eos>"
        assert decode_parts(text_tokenizer, ids, rows) == expected
    check_reads(batch, tokens, histories)
    closing = text_tokenizer.convert_tokens_to_ids(CLOSE)
    assert (batch.token_ids[batch.read_row, batch.read_column + 1] == closing).all()
    assert batch.next_items.tolist() == [item for window in windows for item in window[1:]]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_inference_batches_stop_at_the_question(text_tokenizer, tokens):
    prompts = make_prompts(text_tokenizer, tokens)
    histories = random_windows(1, 2, 20, 21, 45)
    batch = prompts.inference_batch(histories)
    kept = [history[-HISTORY:] for history in histories]
    for line in range(len(histories)):
        ids, rows, labels = unpadded(batch, line)
        assert decode_parts(text_tokenizer, ids, rows) == expected_text(kept[line], tokens)
    columns = batch.read_column.tolist()
    assert batch.read_row.tolist() == list(range(len(histories))) and len(columns) == 5
    for line, (column, history) in enumerate(zip(columns, kept)):
        assert batch.rows[line, column] == history[-1] * tokens + tokens - 1
        assert not (batch.rows[line, column + 1 :] >= 0).any()
    assert (batch.next_items == -1).all()


@pytest.mark.parametrize("kind", ["training", "inference"])
def test_padding_is_on_the_right_in_training_and_on_the_left_at_inference(text_tokenizer, kind):
    prompts = make_prompts(text_tokenizer)
    windows = random_windows(2, 12, 5)
    batch = getattr(prompts, f"{kind}_batch")(windows)
    shape = batch.token_ids.shape
    for tensor in (batch.token_ids, batch.rows, batch.attention_mask, batch.labels):
        assert tensor.shape == shape and tensor.dtype == torch.int64
    lengths = batch.attention_mask.sum(1)
    assert lengths.max() == shape[1] and lengths.min() < shape[1]
    for line, length in enumerate(lengths.tolist()):
        place = slice(length) if kind == "training" else slice(shape[1] - length, None)
        assert (batch.attention_mask[line, place] == 1).all()
        padding = batch.attention_mask[line] == 0
        assert (batch.token_ids[line, padding] == text_tokenizer.pad_token_id).all()
        assert (batch.rows[line, padding] == -1).all()
        assert (batch.labels[line, padding] == IGNORED).all()
    # Alone and in company a prompt is the same.
    for line, window in enumerate(windows):
        alone = getattr(prompts, f"{kind}_batch")([window])
        assert unpadded(alone, 0) == unpadded(batch, line)


def test_labels_cover_titles_and_answer_and_nothing_else(text_tokenizer):
    prompts = make_prompts(text_tokenizer)
    windows = [np.array([4, 2, 1, 3]), *random_windows(6)]
    batch = prompts.training_batch(windows)
    for line, window in enumerate(windows):
        ids, rows, labels = map(np.array, unpadded(batch, line))
        learned = labels != IGNORED
        np.testing.assert_array_equal(ids[learned], labels[learned])
        assert (rows[learned] == -1).all()
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned)) + 1)
        said = [text_tokenizer.decode(ids[run]) for run in runs if learned[run[0]]]
        answer = response_text(SHOWN[window[-1]], CATEGORIES[window[-1]])
        assert said == [*(f" {SHOWN[item]}" for item in window[:-1]), f"{answer}<eos>"]


def test_the_latest_items_are_kept_and_a_short_configuration_is_respected(text_tokenizer):
    prompts = make_prompts(text_tokenizer, history=3, title_length=5)
    history = np.arange(6, 12)
    ids, rows, _ = unpadded(prompts.inference_batch([history]), 0)
    assert [row for row in rows if row >= 0] == [18, 19, 20, 21, 22, 23]
    assert decode_parts(text_tokenizer, ids, rows).count(" Thing<") + 1 >= 3
    assert "Thing 1" not in decode_parts(text_tokenizer, ids, rows)


def test_titles_cannot_forge_special_tokens(text_tokenizer):
    special = text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE, "<eos>"])
    batch = make_prompts(text_tokenizer).training_batch([np.array([5, 5])])
    counts = [(batch.token_ids == token).sum().item() for token in special]
    assert counts == [1, 1, 1]  # one item read, one end of the answer


def test_moves_as_a_whole(text_tokenizer):
    batch = make_prompts(text_tokenizer).training_batch(random_windows(3, 4))
    moved = batch.to("meta")
    assert all(tensor.device.type == "meta" for tensor in vars(moved).values())


@pytest.mark.parametrize(
    "title, category, text",
    [
        ("Green Tea", "Tea", " The user might lean towards (Tea) products, such as Green Tea."),
        ("Green Tea", "", " The user might like Green Tea."),
    ],
)
def test_response_text(title, category, text):
    assert response_text(title, category) == text


def named(matcher, text):
    """The names of the categories that a text names."""
    (row,) = matcher.match([text])
    return {" ".join(matcher.names[group]) for group in row.nonzero()[:, 0].tolist()}


def test_matches_whole_words_whatever_the_case():
    matcher = CategoryMatcher(["Tea", "Board Games", "Games", "", "tea", "STRASSE"])
    assert named(matcher, "towards (TEA) products") == {"tea"}
    assert named(matcher, "teapots, steamy, tea_time, tea2") == set()
    assert named(matcher, "board-GAMES!") == {"board games", "games"}
    assert named(matcher, "games for the board") == {"games"}
    assert named(matcher, "boards games") == {"games"}
    assert named(matcher, "board\n games, and tea.") == {"board games", "games", "tea"}
    assert named(matcher, "in der Straße") == {"strasse"}
    assert named(matcher, "") == set()


def test_groups_are_shared_by_items_of_a_category_and_minus_one_without():
    matcher = CategoryMatcher(["Tea", "Board Games", "", " tea ", "&", "Board  games"])
    groups = matcher.groups.tolist()
    assert groups[0] == groups[3] and groups[1] == groups[5] and groups[0] != groups[1]
    assert groups[2] == groups[4] == -1
    assert matcher.groups.dtype == torch.int64
    matched = matcher.match(["some tea", "nothing", "board games"])
    assert matched.dtype == torch.bool and matched.shape == (3, 2)
    assert matched[:, groups[0]].tolist() == [True, False, False]
    assert matched[:, groups[1]].tolist() == [False, False, True]


def test_without_categories_nothing_matches():
    matcher = CategoryMatcher(["", "", ""])
    assert matcher.groups.tolist() == [-1, -1, -1] and matcher.groups.dtype == torch.int64
    assert matcher.match(["", "any text"]).tolist() == [[False], [False]]
    assert matcher.match([]).shape == (0, 1)


def test_matcher_agrees_with_regular_expressions():
    words = ["tea", "board", "games", "old"]
    pick = lambda most: " ".join(random.choices(words, k=random.randint(1, most)))  # noqa: E731
    categories = [pick(3) for _ in range(8)]
    matcher = CategoryMatcher(categories)
    for _ in range(50):
        text = pick(9)
        expected = {name for name in categories if re.search(rf"\b{name}\b", text)}
        assert named(matcher, text) == expected, (categories, text)
