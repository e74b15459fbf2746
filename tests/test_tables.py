"""Logs as CSV, TSV, Parquet and RecBole: the split, the core, ties, categories."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from data_cases import ITEMS, LOG, LOGS, assert_one_line, assert_same, encode, text, write
from hypothesis import given, settings
from hypothesis import strategies as st

from contrec_fast.config import NAMES, DataConfig
from contrec_fast.data import Dataset, read_data, read_folder, synthetic_shop, write_folder


def naive(rows, listed: dict, core=0, holdout="test"):
    """{item: (title, category)} and {user: (history, target)}, row by row."""
    rows = list(dict.fromkeys(rows))
    while core:
        users, items = Counter(user for user, _, _ in rows), Counter(item for _, item, _ in rows)
        kept = [r for r in rows if users[r[0]] >= core and items[r[1]] >= core]
        if len(kept) == len(rows):
            break
        rows = kept
    names = {item for _, item, _ in rows} | (set() if core else {*listed})
    split = {}
    for user in {user for user, _, _ in rows}:
        own = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        own = [item for _, item, _ in own]
        if holdout == "validation" and len(own) > 1:
            own = own[:-1]
        held_out = holdout != "none" and len(own) > 1
        split[user] = (own[:-1], own[-1]) if held_out else (own, None)
    return {item: listed.get(item, ("", "")) for item in names}, split


def named(data: Dataset):
    """The same of a dataset, whose users and items must be in order."""
    items, ids = data.items, data.items.ids
    assert ids == sorted(ids) and data.user_ids == sorted(data.user_ids)
    targets = [None if target < 0 else ids[target] for target in data.targets]
    histories = [[ids[item] for item in history] for history in data.histories]
    catalog = dict(zip(ids, zip(items.titles, items.categories)))
    return catalog, dict(zip(data.user_ids, zip(histories, targets)))


@pytest.mark.parametrize("name", LOGS)
def test_reads_every_form(tmp_path, name):
    said = []
    log = {**LOG, "rating": [1, 2, 3, 4, 5]}
    data = read_data(write(tmp_path, name, log, ITEMS), say=said.append)
    assert data.items.ids == ["w", "x", "y", "z"]
    assert data.items.titles == ["W, w", "X", "Y", ""]
    assert data.items.categories == ["", "Tea", "Tea", ""]
    assert data.user_ids == ["a", "b"]
    assert [history.tolist() for history in data.histories] == [[3, 1], [3]]
    assert data.targets.tolist() == [2, 1]
    assert said == ["2 users, 4 items, 5 interactions"]
    if name == "log.inter":
        assert_same(data, read_data(tmp_path))


rows = st.lists(
    st.tuples(st.sampled_from("abcde"), st.sampled_from("uvwxyz"), st.integers(-2, 2)), min_size=1
)
listed = st.dictionaries(st.sampled_from("stuvw"), st.tuples(text, st.sampled_from(["Tea", ""])))


@settings(deadline=None, max_examples=150)
@given(rows, listed, st.integers(0, 3), st.sampled_from(NAMES["holdout"]), st.data())
def test_equals_the_naive_loop(tmp_path_factory, rows, listed, core, holdout, draw):
    folder = tmp_path_factory.mktemp("log")
    name = draw.draw(st.sampled_from(LOGS))
    log = dict(zip(LOG, map(list, zip(*rows))))
    items = {
        "item_id": [*listed],
        "title": [title for title, _ in listed.values()],
        "category": [category for _, category in listed.values()],
    }
    path = write(folder, name, log, items if listed else None)
    expected = naive(rows, listed, core, holdout)
    config = DataConfig(core=core, holdout=holdout)
    if not expected[1]:
        message = f"expected users and items with {core} interactions among each other"
        with pytest.raises(ValueError, match=message) as error:
            read_data(path, config)
        return assert_one_line(error.value, path)
    assert named(read_data(path, config)) == expected


@settings(deadline=None, max_examples=100)
@given(
    ids=st.lists(text.filter(bool), min_size=2, max_size=8, unique=True),
    titles=st.lists(text, min_size=8, max_size=8),
    categories=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|>'\"[")),
        min_size=8,
        max_size=8,
    ),
    name=st.sampled_from(LOGS),
)
def test_any_text_comes_back(tmp_path_factory, ids, titles, categories, name):
    columns = [column[: len(ids)] for column in (ids, titles, categories)]
    log = {"user_id": ids[::-1], "item_id": ids, "timestamp": range(len(ids))}
    path = write(tmp_path_factory.mktemp("text"), name, log, dict(zip(ITEMS, columns)))
    catalog, users = named(read_data(path))
    assert catalog == dict(zip(ids, zip(*columns[1:])))
    assert users == {user: ([item], None) for user, item in zip(ids[::-1], ids)}


@pytest.mark.parametrize("ids", [["007", "7"], ["1e5", "100000"], ["NA", "nan"], [" a", "a "]])
def test_ids_stay_as_they_are(tmp_path, ids):
    log = {"user_id": ids, "item_id": ids[::-1], "timestamp": [0, 1]}
    for name in LOGS:
        data = read_data(write(tmp_path, name, log))
        assert (data.user_ids, data.items.ids) == (sorted(ids), sorted(ids))


@pytest.mark.parametrize("kind", ["int8", "int64", "uint64", "category"])
def test_whole_numbers_of_parquet_become_decimal_strings(tmp_path, kind):
    ids = pd.Series([10, 9, 9]).astype(kind)
    log = {"user_id": ids, "item_id": ids, "timestamp": [0, 1, 2]}
    data = read_data(write(tmp_path, "log.parquet", log))
    assert data.user_ids == data.items.ids == ["10", "9"]


DATES = ["2024-02-29", "2024-02-28T23:59:59Z", "2024-03-01 00:30+01:00", "2024-02-29T01:00:00.5"]


@pytest.mark.parametrize(
    "times, order",
    [
        ([3, 1, 2, -1], "3120"),
        (["1.5", "-1e3", "1e0", "007"], "1203"),
        (["9007199254740993", "9007199254740992", "0", "1"], "2310"),  # beyond float64's
        (["1700000000000000001", "1700000000000000000", "0", "1"], "2310"),  # nanoseconds
        (["99999999999999999999", "1", "2", "3"], "1230"),  # beyond int64's
        (DATES, "1032"),
        (["2024-03-01", "1999-12-31", "2024-02-29", "2262-01-01"], "1203"),
    ],
)
def test_times_sort_by_value(tmp_path, times, order):
    log = {"user_id": ["u"] * 4, "item_id": [*"0123"], "timestamp": times}
    for name in LOGS:
        data = read_data(write(tmp_path, name, log))
        assert [*data.histories[0], *data.targets] == [*map(int, order)]


@pytest.mark.parametrize(
    "times",
    [
        pd.Series([0.25, 0.5, 0.75]).astype("float32"),
        pd.Series([2, 3, 4]).astype("uint8"),
        pd.to_datetime(["1969-01-01", "1970-01-01", "1970-01-02"]),
        pd.to_datetime(["1999-01-01", "1999-01-02", "1999-01-03"], utc=True).as_unit("s"),
        pd.to_datetime(["1999-01-01", "1999-01-02", "1999-01-03"]).date,
        pd.Series(["2", "10", "11"]).astype("category"),
    ],
)
def test_times_of_parquet(tmp_path, times):
    log = {"user_id": ["u"] * 3, "item_id": [*"cab"], "timestamp": times}
    order = np.random.permutation(3)
    data = read_data(write(tmp_path, "log.parquet", pd.DataFrame(log).iloc[order]))
    assert [*data.histories[0], *data.targets] == [2, 0, 1]


def test_ties_are_stable_or_drawn_by_seed_whatever_other_rows_there_are(tmp_path):
    count = 40
    own = pd.DataFrame(
        {
            "user_id": "u",
            "item_id": [f"i{item:02}" for item in np.random.permutation(count)],
            "timestamp": np.arange(count) // 10,
        }
    )
    other = own.assign(user_id=["t", "v"] * 20, item_id="j" + own["item_id"])

    def order(log, seed=0, shuffle_ties=True):
        config = DataConfig(shuffle_ties=shuffle_ties)
        return sum(named(read_data(write(tmp_path, log=log), config, seed))[1]["u"][:1], [])

    stable, drawn = order(own, shuffle_ties=False), order(own)
    assert stable == own["item_id"].tolist()[:-1]
    shuffled = pd.concat([other, own]).sample(frac=1)
    assert order(shuffled) == order(own) == drawn
    assert len({tuple(order(own, seed)) for seed in (0, 1, 2, -1, 2**40)} | {tuple(stable)}) == 6
    tie = own["item_id"][:10].tolist()
    assert drawn[:10] != tie and sorted(drawn[:10]) == sorted(tie)


def test_every_order_of_a_tie_is_as_likely(tmp_path):
    users = [f"user-{user}" for user in range(6000)]
    log = {"user_id": users * 3, "item_id": np.repeat([*"abc"], 6000), "timestamp": 0}
    data = read_data(write(tmp_path, log=log), DataConfig(shuffle_ties=True))
    counts = Counter(map(bytes, map(np.uint8, np.column_stack([data.histories, data.targets]))))
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 30  # p = 1.5e-5


def test_duplicates_are_dropped_and_repeats_kept(tmp_path):
    log = {"user_id": [*"uuuu"], "item_id": [*"xxyx"], "timestamp": ["1.0", "1", "2", "3"]}
    said = []
    data = read_data(write(tmp_path, log=log), say=said.append)
    assert [*data.histories[0], *data.targets] == [0, 1, 0]
    assert said == ["1 users, 2 items, 3 interactions; 1 duplicate rows dropped"]


@pytest.mark.parametrize("holdout", NAMES["holdout"])
def test_folder_in_every_form_is_the_same_data(tmp_path, holdout):
    shop = synthetic_shop(30, 60)
    write_folder(shop, tmp_path / "shop")
    config = DataConfig(holdout=holdout)
    expected = read_data(tmp_path / "shop", config)
    assert_same(expected, read_folder(tmp_path / "shop", holdout))
    pairs = [
        (user, shop.items.ids[item], time)
        for user, history, target in zip(shop.user_ids, shop.histories, shop.targets)
        for time, item in enumerate([*history, target])
    ]
    log = dict(zip(LOG, zip(*pairs)))
    items = dict(zip(ITEMS, (shop.items.ids, shop.items.titles, shop.items.categories)))
    for name in LOGS:
        (folder := tmp_path / name.replace(".", "-")).mkdir()
        assert_same(expected, read_data(write(folder, name, log, items), config))
    for core in (3, 6):
        said = []
        config.core = core
        data = read_data(tmp_path / "shop", config, say=said.append)
        assert named(data) == named(read_data(tmp_path / "log-csv" / "log.csv", config))
        assert said[0].endswith(f"{core}-core of 30 users and 60 items")
    with pytest.raises(ValueError, match="shop: expected users and items with 31 interactions"):
        read_data(tmp_path / "shop", DataConfig(core=31))


def test_items_of_another_place(tmp_path):
    path = write(tmp_path, items=ITEMS)
    (tmp_path / "other.parquet").write_bytes(
        pd.DataFrame({"item_id": ["x"], "title": [None]}).to_parquet()
    )
    data = read_data(path, DataConfig(items=str(tmp_path / "other.parquet")))
    assert data.items.ids == ["x", "y", "z"] and data.items.titles == [""] * 3
    (tmp_path / "items.parquet").write_bytes(encode("items.parquet", ITEMS))
    with pytest.raises(ValueError, match="items.csv: expected it or items.parquet or data.items"):
        read_data(path)
    with pytest.raises(ValueError, match="none.csv: expected a file, got nothing"):
        read_data(path, DataConfig(items="none.csv"))


def test_a_log_called_items_is_not_its_own_items_table(tmp_path):
    assert read_data(write(tmp_path, "items.csv")).items.titles == [""] * 3


BLANKS = " " * 100_000


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("category", "Home > Kitchen > Pots, Pans", "Pots, Pans"),
        ("category", "Drama|Romance", "Drama"),
        ("category", "Arts, Crafts", "Arts, Crafts"),
        ("category", " [unknown]", " [unknown]"),
        ("category", " > ", ""),
        ("categories", "Arts, Crafts", "Arts"),
        ("categories", "'Toys & Games', 'Puzzles'", "Toys & Games"),
        ("categories", "['Women\\'s']", "Women's"),
        ("class", ", Sci-Fi,", "Sci-Fi"),
        ("genres", "Science Fiction", "Science Fiction"),
        ("genre:token", "Science Fiction", "Science Fiction"),
        ("genre:token_seq", "Animation Children's Comedy", "Animation"),
        ("category:token_seq", "Arts, Crafts", "Arts"),
        ("categories:token_seq", "Hotels & Travel, Tours", "Hotels & Travel"),
        ("categories:token_seq", "Books & Comics", "Books & Comics"),
        ("categories:token_seq", "'Toys & Games'", "Toys & Games"),
        (
            "categories:token_seq",
            "'Patio, Lawn & Garden', \"Men's > Shoes\"",
            "Patio, Lawn & Garden",
        ),
        ("category", "['Men\\'s > Shoes', 'Socks']", "Men's > Shoes"),
        ("category", '["a \\"b\\"", "c"]', 'a "b"'),
        ("category", "[ ]", ""),
        ("categories", " \t['A' , 'B'] ", "A"),
        # Of so many blanks each is looked at a few times, not once for each of the others.
        pytest.param("category", f"{BLANKS}x", f"{BLANKS}x", id="blanks"),
        pytest.param("category", f"[{BLANKS}x", f"[{BLANKS}x", id="bracket and blanks"),
        pytest.param("category", f"'A'{BLANKS}x", f"'A'{BLANKS}x", id="quotes and blanks"),
    ],
)
def test_one_category_is_taken(tmp_path, column, value, expected):
    write(tmp_path, "log.inter")
    frame = pd.DataFrame({"item_id:token": ["x"], column: [value], "name:token_seq": ["X 1"]})
    frame.to_csv(tmp_path / "log.item", sep="\t", index=False)
    items = read_data(tmp_path).items
    assert (items.titles[0], items.categories[0]) == ("X 1", expected)


@pytest.mark.parametrize(
    "values, expected, several",
    [
        (["Comedy Drama", "War", "Sci-Fi War"], ["Comedy", "War", "Sci-Fi"], 2),
        (["Active Life", "Food, Bars", "Bars"], ["Active Life", "Food", "Bars"], 1),
        (["Active Life", "Bars & Cafes", ""], ["Active Life", "Bars & Cafes", ""], 0),
        (["'Toys & Games', 'Dolls'", "'Dolls'", ""], ["Toys & Games", "Dolls", ""], 1),
    ],
)
def test_a_column_tells_whether_blanks_separate_and_what_is_left_out_is_said(
    tmp_path, values, expected, several
):
    frame = {"item_id:token": [*"xyz"], "genre:token_seq": values}
    pd.DataFrame(frame).to_csv(tmp_path / "log.item", sep="\t", index=False)
    said = []
    data = read_data(write(tmp_path, "log.inter"), say=said.append)
    assert data.items.categories == expected
    line = "2 users, 3 items, 5 interactions"
    if several:
        row = next(row for row in range(3) if values[row] != expected[row])
        line += f"; {several} items with several categories in genre, of which one is kept "
        line += f"({expected[row]!r} of {values[row]!r})"
    assert said == [line]


def test_the_first_of_a_list_of_categories_is_taken(tmp_path):
    lists = [["A, B > C", "D"], [], None, ["", None, "E"]]
    ids = [*"wxyz"]
    write(tmp_path, "log.parquet", LOG, {"item_id": ids, "categories": lists, "name": ids})
    items = read_data(tmp_path / "log.parquet").items
    assert (items.titles, items.categories) == (ids, ["A, B > C", "", "", "E"])
