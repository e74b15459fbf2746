"""Prompts against an independent reconstruction, and the category matcher against a plain one."""

import random
import re

import numpy as np
import pytest
import torch
from ops_cases import refused

from contrec_fast.config import BackboneConfig, PromptConfig
from contrec_fast.data import Items
from contrec_fast.data.prompts import CLOSE, IGNORED, OPEN, CategoryMatcher, Prompts, Window
from contrec_fast.data.templates import TEMPLATES, response_text
from contrec_fast.models.backbone import make_tiny_backbone

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
FORMS = ("full", "response", "none")
KINDS = ("training", "inference")


@pytest.fixture(scope="module")
def text_tokenizer():
    config = BackboneConfig(hidden=8, layers=1, heads=1, vocabulary=300)
    return make_tiny_backbone(TITLES, config)[1]


def make_prompts(text_tokenizer, tokens=2, **config):
    return Prompts(ITEMS, text_tokenizer, tokens, PromptConfig(**config))


def random_histories(*lengths):
    rng = np.random.default_rng(random.randrange(2**32))
    return [rng.integers(0, len(ITEMS), length) for length in lengths]


def make_batch(prompts, kind, histories, rng=None):
    """The batch and the (older, shown) items of each of its prompts, from the histories alone.

    Training windows begin at 0, 1, 2, ... as far as that leaves two items.
    """
    if kind == "inference":
        cuts = [max(0, len(history) - prompts.config.history) for history in histories]
        parts = [(history[:cut], history[cut:]) for history, cut in zip(histories, cuts)]
        return prompts.inference_batch(histories), parts
    starts = [min(line, len(history) - 2) for line, history in enumerate(histories)]
    windows = [Window(*pair) for pair in zip(histories, starts)]
    parts = [(history[:start], history[start:-1]) for history, start in windows]
    return prompts.training_batch(windows, rng), parts


def kept(batch, line):
    """[3, n] token ids, rows and labels of a prompt without its padding."""
    tensors = torch.stack([batch.token_ids, batch.rows, batch.labels])
    return tensors[:, line, batch.attention_mask[line].bool()]


def said(text_tokenizer, batch, line, tokens):
    """A prompt as text, in which continuous tokens are written like [item 7.1] or [user 0.1]."""
    parts, run = [], []
    ids, rows, _ = kept(batch, line).tolist()
    for token, row in zip([*ids, None], [*rows, None]):
        if row == -1:
            run.append(token)
            continue
        if run:
            parts.append(text_tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
        if row is not None:
            owner, k = divmod(row, tokens)
            count = len(batch.items)
            name = f"item {batch.items[owner]}" if owner < count else f"user {owner - count}"
            parts.append(f"[{name}.{k}]")
    return "".join(parts)


def expected_text(config, tokens, line, shown, template=TEMPLATES[0], answer=None):
    """What a prompt says, from the catalog alone."""
    with_text = config.text != "none"

    def slots(owner):
        inner = "".join(f"[{owner}.{k}]" for k in range(tokens))
        return f"{OPEN}{inner}{CLOSE}" if with_text else inner

    text = template[0] if with_text else ""
    text += slots(f"user {line}") if config.user_token else ""
    for item in shown:
        text += f" {SHOWN[item]}" if config.text == "full" else ""
        text += slots(f"item {item}")
    text += template[1] if with_text else ""
    if answer is not None and with_text:
        text += response_text(SHOWN[answer], CATEGORIES[answer]) + "<eos>"
    return text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens, user_token", [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_say_and_read_what_they_should(text_tokenizer, form, tokens, user_token, kind):
    prompts = make_prompts(text_tokenizer, tokens, text=form, user_token=user_token, history=9)
    histories = [np.arange(7), *random_histories(2, 3, 10, 12), np.array([5, 5, 5])]
    histories += random_histories(1) if kind == "inference" else []
    batch, parts = make_batch(prompts, kind, histories)
    training = kind == "training"
    for line, (_, shown) in enumerate(parts):
        answer = histories[line][-1] if training else None
        expected = expected_text(prompts.config, tokens, line, shown, answer=answer)
        assert said(text_tokenizer, batch, line, tokens) == expected
    assert batch.items.tolist() == sorted({item for _, shown in parts for item in shown})
    assert [row[row >= 0].tolist() for row in batch.shown] == [s.tolist() for _, s in parts]
    assert batch.older.tolist() == [item for older, _ in parts for item in older]
    ends = [*batch.older_offsets.tolist(), len(batch.older)]
    assert np.diff(ends).tolist() == [len(older) for older, _ in parts] and ends[0] == 0

    # Conditions are read at the last continuous token of items: of each, or of the latest.
    reads = [
        (line, place)
        for line, (_, shown) in enumerate(parts)
        for place in (range(len(shown)) if training else [len(shown) - 1])
    ]
    assert batch.read_row.tolist() == [line for line, _ in reads]
    assert batch.read_item.tolist() == [place for _, place in reads]
    for (line, place), column in zip(reads, batch.read_column.tolist(), strict=True):
        assert batch.attention_mask[line, column] == 1
        own = kept(batch, line)[1]
        last = (own >= 0).nonzero()[(place + 1 + user_token) * tokens - 1].item()
        padding = 0 if training else batch.rows.shape[1] - len(own)
        assert column == last + padding
    follow = [histories[line][len(parts[line][0]) + place + 1] for line, place in reads if training]
    assert batch.next_items.tolist() == (follow if training else [-1] * len(reads))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_on_the_right_in_training_and_on_the_left_at_inference(
    text_tokenizer, form, kind
):
    prompts = make_prompts(text_tokenizer, text=form)
    histories = random_histories(2, 12, 5)
    batch, _ = make_batch(prompts, kind, histories)
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


def test_labels_cover_titles_and_answer_and_nothing_else(text_tokenizer):
    histories = [np.array([4, 2, 1, 3]), *random_histories(6)]
    for form in FORMS:
        batch, parts = make_batch(make_prompts(text_tokenizer, text=form), "training", histories)
        for line, (_, shown) in enumerate(parts):
            ids, rows, labels = kept(batch, line).numpy()
            learned = labels != IGNORED
            np.testing.assert_array_equal(ids[learned], labels[learned])
            assert (rows[learned] == -1).all()
            runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned)) + 1)
            texts = [text_tokenizer.decode(ids[run]) for run in runs if learned[run[0]]]
            answer = histories[line][-1]
            expected = [f" {SHOWN[item]}" for item in shown] if form == "full" else []
            if form != "none":
                expected.append(response_text(SHOWN[answer], CATEGORIES[answer]) + "<eos>")
            assert texts == expected


def test_answers_are_the_ends_of_the_prompts(text_tokenizer):
    histories = [np.array([0, item]) for item in range(6)]
    batch, _ = make_batch(make_prompts(text_tokenizer), "training", histories)
    lengths = (batch.answers >= 0).sum(1)
    assert batch.answers.dtype == torch.int64 and batch.answers.shape[1] == lengths.max()
    for line, length in enumerate(lengths.tolist()):
        answer = batch.answers[line]
        assert (answer[:length] >= 0).all() and (answer[length:] == -1).all()
        assert answer[:length].tolist() == kept(batch, line)[0, -length:].tolist()
        assert text_tokenizer.decode(answer[:length]).startswith(" The user might l")
    for form, kind in [("none", "training"), ("none", "inference"), ("full", "inference")]:
        batch, _ = make_batch(make_prompts(text_tokenizer, text=form), kind, histories)
        assert batch.answers.shape == (6, 0)


def test_training_varies_over_the_templates_asked_for(text_tokenizer):
    histories = random_histories(*[3] * 40)

    def used(count, rng, kind="training"):
        prompts = make_prompts(text_tokenizer, templates=count)
        batch, parts = make_batch(prompts, kind, histories, rng)
        numbers = []
        for line, (_, shown) in enumerate(parts):
            text = said(text_tokenizer, batch, line, 2)
            (number,) = [n for n, (role, _) in enumerate(TEMPLATES) if text.startswith(role)]
            answer = histories[line][-1] if kind == "training" else None
            assert text == expected_text(prompts.config, 2, line, shown, TEMPLATES[number], answer)
            numbers.append(number)
        return numbers

    assert set(used(3, np.random.default_rng())) == {0, 1, 2}
    assert max(used(10, np.random.default_rng(4))) > 2
    assert used(10, np.random.default_rng(4)) == used(10, np.random.default_rng(4))
    assert set(used(1, np.random.default_rng())) == {0}
    assert set(used(10, None)) == {0} and set(used(10, None, "inference")) == {0}
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 10


@pytest.mark.parametrize("count", [0, 11])
def test_refuses_templates_that_do_not_exist(text_tokenizer, count):
    with refused(ValueError, "prompt.templates"):
        make_prompts(text_tokenizer, templates=count)


def test_the_latest_items_are_kept_and_a_short_configuration_is_respected(text_tokenizer):
    prompts = make_prompts(text_tokenizer, history=3, title_length=5)
    batch = prompts.inference_batch([np.arange(6, 12)])
    text = said(text_tokenizer, batch, 0, 2)
    assert re.findall(r"item (\d+)\.0", text) == ["9", "10", "11"]
    assert text.count(f" Thing{OPEN}") == 3 and "Thing " not in text
    assert batch.older.tolist() == [6, 7, 8]


def test_titles_cannot_forge_special_tokens(text_tokenizer):
    special = text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE, "<eos>"])
    batch = make_prompts(text_tokenizer).training_batch([Window(np.array([5, 5]), 0)])
    counts = [(batch.token_ids == token).sum().item() for token in special]
    assert counts == [1, 1, 1]  # one item read, one end of the answer


def test_moves_as_a_whole(text_tokenizer):
    batch, _ = make_batch(make_prompts(text_tokenizer), "training", random_histories(3, 4))
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
