"""Logs as CSV, TSV, Parquet and RecBole: the split, the core, ties, every refusal, any bytes."""

import csv
import gzip
import io
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import assert_one_line, assert_same, mutated, text
from hypothesis import given, settings
from hypothesis import strategies as st

from contrec_fast.config import DataConfig
from contrec_fast.data import Dataset, read_data, read_folder, synthetic_shop, write_folder

LOGS = ["log.csv", "log.tsv", "log.csv.gz", "log.parquet", "log.inter"]
LOG = {"user_id": ["b", "a", "a", "b", "a"], "item_id": [*"xyzzx"], "timestamp": [5, 3, 1, 4, 2]}
ITEMS = {"item_id": ["y", "w", "x"], "title": ["Y", "W, w", "X"], "category": ["Tea", "", "Tea"]}
TYPES = {"timestamp": "float", "title": "token_seq", "category": "token"}


def encode(name: str, columns: dict) -> bytes:
    """A table as the content of a file of that name."""
    frame = pd.DataFrame(columns)
    if name.endswith(".parquet"):
        return frame.to_parquet()
    if name.endswith((".inter", ".item")):
        frame.columns = [f"{column}:{TYPES.get(column, 'token')}" for column in frame]
    sep = "," if ".csv" in name else "\t"
    data = frame.to_csv(sep=sep, index=False, quoting=csv.QUOTE_ALL).encode()
    return gzip.compress(data) if name.endswith(".gz") else data


def items_name(log: str) -> str:
    """What the items table beside a log of that name is called."""
    special = {"log.inter": "log.item", "log.parquet": "items.parquet"}
    return special.get(log, "items.csv")


def write(folder, name="log.csv", log=LOG, items=None):
    path = folder / name
    path.write_bytes(log if isinstance(log, bytes) else encode(name, log))
    if items is not None:
        (folder / items_name(name)).write_bytes(encode(items_name(name), items))
    return path


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
        split[user] = (own[:-1], own[-1]) if len(own) > 1 else (own, None)
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
@given(rows, listed, st.integers(0, 3), st.sampled_from(["test", "validation"]), st.data())
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
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|>'\"")),
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


@pytest.mark.parametrize("holdout", ["test", "validation"])
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
        ("categories", "['Women\\'s']", "Women\\'s"),
        ("class", ", Sci-Fi,", "Sci-Fi"),
        ("genre", "Science Fiction", "Science Fiction"),
        ("genre:token_seq", "Animation Children's Comedy", "Animation"),
        ("categories:token_seq", "Hotels & Travel, Tours", "Hotels & Travel"),
    ],
)
def test_one_category_is_taken(tmp_path, column, value, expected):
    write(tmp_path, "log.inter")
    frame = pd.DataFrame({"item_id:token": ["x"], column: [value], "name:token_seq": ["X 1"]})
    frame.to_csv(tmp_path / "log.item", sep="\t", index=False)
    items = read_data(tmp_path).items
    assert (items.titles[0], items.categories[0]) == ("X 1", expected)


def test_the_first_of_a_list_of_categories_is_taken(tmp_path):
    lists = [["A, B > C", "D"], [], None, ["", None, "E"]]
    ids = [*"wxyz"]
    write(tmp_path, "log.parquet", LOG, {"item_id": ids, "categories": lists, "name": ids})
    items = read_data(tmp_path / "log.parquet").items
    assert (items.titles, items.categories) == (ids, ["A, B > C", "", "", "E"])


HEADER = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("log.csv", "", "log.csv: expected columns user_id, item_id, timestamp, got an empty file"),
        ("log.csv", "\n \n", "line 2: expected columns .* got ' ' without user_id, item_id, time"),
        ("log.parquet", "", "log.parquet: expected columns user_id.*, got an empty file"),
        ("log.csv", HEADER, "log.csv: expected rows, got only the names of columns"),
        ("log.inter", "user_id:token\titem_id:token\n", "log.inter, line 1: .*without timestamp"),
        ("log.csv", "user,item_id,time\n", "line 1: .*'user, item_id, time' without user_id, time"),
        ("log.csv", "\n" + HEADER.replace("user", "item"), "csv, line 2: .*without user_id"),
        ("log.csv", "item_id," + HEADER, "log.csv, line 1: expected one column item_id, got 2"),
        ("log.csv", HEADER + "a,b,1\nc,d\n", "log.csv, line 3: expected 3 columns, got 2"),
        ("log.csv", HEADER + 'a,"b\n\n",1\n\nc,d,2,3\n', "csv, line 6: expected 3 columns, got 4"),
        ("log.tsv", HEADER.replace(",", "\t") + "a,b,1\n", "log.tsv, line 2: .*columns, got 1"),
        ("log.csv", HEADER + 'a,b,1\na,b,"2\nc,d,3', "log.csv, line 3: expected a row, got: unexp"),
        ("log.csv", HEADER + 'a,b,1\n"a"c,b"\n', "log.csv, line 3: expected a row, got: ',' exp"),
        ("log.csv", HEADER + "a,b,1\n,b,1\n", "line 3: expected an id as user_id, got ''"),
        ("log.csv", HEADER + 'a,"",1\n', "line 2: expected an id as item_id, got ''"),
        ("log.csv", HEADER + "a,b,1\na,b,\n", "line 3: expected a number, like .*, got ''"),
        ("log.csv", HEADER + "a,b,1\na,b,2024-01-01", "line 3: expected a number, like .*'2024-01"),
        ("log.csv", HEADER + "a,b,1\na,b,nan", "line 3: expected a number, like .*, got 'nan'"),
        ("log.csv", HEADER + "a,b,1\na,b,0x1F", "line 3: expected a number, like .*, got '0x1F'"),
        ("log.csv", HEADER + "a,b,1e999", "line 2: expected a finite number as timestamp, got '1e"),
        ("log.csv", HEADER + "a,b,today", "line 2: expected a number or an ISO .*, got 'today'"),
        ("log.csv", HEADER + "a,b,2023-02-29", "line 2: expected a number or an ISO 8601 date"),
        ("log.csv", HEADER + "a,b,2023-02-28\na,b,1", "line 3: expected a number or an ISO 8601"),
        ("log.csv", HEADER + "a,b,01/02/2023", "line 2: expected a number or an ISO 8601 date"),
        ("log.csv", (HEADER + "ä,b,1").encode("utf-16"), "log.csv: expected UTF-8, got UTF-16"),
        ("log.csv", (HEADER + "a,b,1\nä,b,1").encode("latin-1"), "line 3: .*UTF-8, got byte 0xe4"),
        ("log.csv.gz", HEADER + "a,b,1\n", "log.csv.gz: expected gzip, got .Not a gzipped file"),
        ("log.csv.gz", gzip.compress(b"a" * 99)[:-9], "log.csv.gz: expected gzip, got"),
        ("log.parquet", HEADER + "a,b,1\n", "log.parquet: expected Parquet, got"),
        ("log.json", "{}", "log.json: expected a file of type .csv, .* or .parquet, got .json"),
        ("log", "", "log: expected a file of type .csv, .* got none"),
    ],
)  # fmt: skip
def test_refuses_text(tmp_path, name, content, message):
    path = write(tmp_path, name, content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_data(path)
    assert_one_line(error.value, path)


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("user_id", ["a", None], "row 2: expected an id as user_id, got None"),
        ("item_id", ["", "b"], "row 1: expected an id as item_id, got ''"),
        ("item_id", [None, None], "row 1: expected an id as item_id, got None"),
        ("user_id", [1.0, 2.0], "row 1: expected strings or whole numbers as user_id, got a doub"),
        ("item_id", [b"a", b"b"], "row 1: expected strings or whole numbers as item_id, got a bin"),
        ("timestamp", [1.0, float("inf")], "row 2: expected a finite number as timestamp, got inf"),
        ("timestamp", pa.array([float("nan"), 1.0]), "row 1: expected a finite number .*got nan"),
        ("timestamp", [1, None], "row 2: expected a number or an ISO.* as timestamp, got None"),
        ("timestamp", [True, False], "row 1: expected a number or .* as timestamp, got a bool"),
        ("timestamp", ["1", "x"], "row 2: expected a number, like those before, .*, got 'x'"),
        ("timestamp", pd.Series([2**63, 0]), "row 1: expected a number or an .* got 'Integer"),
    ],
)  # fmt: skip
def test_refuses_parquet(tmp_path, column, values, message):
    columns = {"user_id": ["u", "v"], "item_id": ["x", "y"], "timestamp": [1, 2], column: values}
    pq.write_table(pa.table(columns), path := tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=message) as error:
        read_data(path)
    assert_one_line(error.value, path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("item_id,title\nx,X\nx,Y\n", "items.csv, line 3: expected each item_id once, got 'x' aga"),
        ("item_id\n", "items.csv: expected rows"),
        ("title\nX\n", "items.csv, line 1: expected columns item_id, got 'title' without item_id"),
        ("item_id,title\n,X\n", "items.csv, line 2: expected an id as item_id"),
        ("item_id,title\nx\n", "items.csv, line 2: expected 2 columns, got 1"),
        ('item_id,title\nx,"X\ny,Y\n', "items.csv, line 2: expected a row, got: unexpected end"),
    ],
)  # fmt: skip
def test_refuses_items(tmp_path, text, message):
    path = write(tmp_path)
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_data(path)
    assert_one_line(error.value, tmp_path / "items.csv")


def test_refuses_other_paths_and_settings(tmp_path):
    write_folder(synthetic_shop(20, 60), shop := tmp_path / "shop")
    (empty := tmp_path / "empty").mkdir()
    for path, config, message in (
        (tmp_path / "none.csv", {}, "none.csv: expected a file or folder, got nothing"),
        (empty, {}, "empty: expected a folder with train.txt and test.txt .* one with neither"),
        (shop, {"shuffle_ties": True}, "shop: expected no data.shuffle_ties for a folder of train"),
        (shop, {"items": "a.csv"}, "shop: expected no data.items for a folder .*got 'a.csv'"),
        (shop, {"holdout": "dev"}, "holdout: expected 'test' or 'validation', got 'dev'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_data(path, DataConfig(**config))
    write(empty, "one.inter")
    write(empty, "two.inter")
    with pytest.raises(ValueError, match="empty: expected a folder .*, got one with 2 .inter"):
        read_data(empty)
    (shop / "test.txt").unlink()
    with pytest.raises(ValueError, match="test.txt: expected a file, got nothing"):
        read_data(shop)


@settings(deadline=None, max_examples=400)
@given(name=st.sampled_from(LOGS), items=st.booleans(), data=st.data())
def test_any_bytes_give_a_dataset_or_one_line(tmp_path_factory, name, items, data):
    folder = tmp_path_factory.mktemp("bytes")
    path = write(folder, name, LOG, ITEMS)
    target = folder / items_name(name) if items else path
    content = target.read_bytes()
    if name.endswith(".gz") and not items and data.draw(st.booleans()):
        content = gzip.compress(data.draw(mutated(gzip.decompress(content))))
    else:
        content = data.draw(mutated(content))
    target.write_bytes(content)
    try:
        assert isinstance(read_data(path), Dataset)
    except ValueError as error:
        assert_one_line(error, target)


def test_a_long_file_is_read_whole(tmp_path):
    """Of more than one of the blocks that the parser reads at once."""
    count = 30_000
    out = io.StringIO(HEADER)
    out.seek(0, io.SEEK_END)
    out.writelines(f"u{row % 7},{'i' * 600}{row},{row}\n" for row in range(count))
    path = write(tmp_path, log=out.getvalue().encode())
    data = read_data(path)
    assert len(data.items) == count == sum(map(len, data.histories)) + 7
    path.write_bytes(path.read_bytes() + b"u,i\n")
    with pytest.raises(ValueError, match=f"line {count + 2}: expected 3 columns, got 2"):
        read_data(path)
