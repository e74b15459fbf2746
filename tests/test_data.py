"""The folder reader and writer: round trips, every refusal, arbitrary bytes, real data."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_cases import assert_one_line, assert_same, datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contrec_fast.data import Dataset, Items, read_folder, write_folder

TRAIN = "0 10 20\n1 20\n"
TEST = "0 10 20 30\n1 20 10\n"
ITEMS = 'org_id remap_id title category\na 10 "Ten, red" Tea\nb 20 Twenty ""\nc 30 "Thir""ty" Tea\n'
USERS = "org_id remap_id\nann 0\nbob 1\n"


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path)
    return tmp_path


def write_texts(path: Path, **replaced):
    texts = {"train": TRAIN, "test": TEST, "item_list": ITEMS, "user_list": USERS} | replaced
    for name, text in texts.items():
        data = text if isinstance(text, bytes) else text.encode()
        (path / f"{name}.txt").write_bytes(data)


def test_reads_the_four_files(folder):
    data = read_folder(folder)
    assert data.items == Items(
        ["a", "b", "c"], ["Ten, red", "Twenty", 'Thir"ty'], ["Tea", "", "Tea"]
    )
    assert data.user_ids == ["ann", "bob"]
    assert [h.tolist() for h in data.histories] == [[0, 1], [1]]
    assert data.targets.tolist() == [2, 0]
    assert len(data.items) == 3


def test_validation_takes_the_last_training_item_and_keeps_users_and_items(folder):
    data = read_folder(folder, "validation")
    assert [h.tolist() for h in data.histories] == [[0], [1]]
    assert data.targets.tolist() == [1, -1]  # bob's only item stays his history
    assert (data.items, data.user_ids) == (read_folder(folder).items, ["ann", "bob"])


@settings(deadline=None, max_examples=50)
@given(data=datasets(lowest_target=-1))
def test_for_validation_moves_the_last_of_each_history_to_the_target(data):
    moved = data.for_validation()
    assert (moved.items, moved.user_ids) == (data.items, data.user_ids)
    for before, after, target in zip(data.histories, moved.histories, moved.targets, strict=True):
        expected = before if target < 0 else [*after, target]
        assert (len(before) == 1) == (target < 0)
        assert before.tolist() == list(expected) and (target >= 0 or list(after) == list(before))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(datasets(lowest_target=-1))
def test_complete_ends_each_history_with_its_target(data):
    whole = data.complete()
    assert (whole.items, whole.user_ids) == (data.items, data.user_ids)
    assert whole.targets.dtype == np.int64 and (whole.targets == -1).all()
    for before, after, target in zip(data.histories, whole.histories, data.targets, strict=True):
        assert after.tolist() == [*before, target][: len(before) + (target >= 0)]
        assert after.dtype == np.int64
    assert_same(whole.complete(), whole)


@pytest.mark.parametrize("holdout", ["test", "validation", "none"])
def test_hold_out_of_nobody(folder, holdout):
    nobody = read_folder(folder).of_users(np.array([], dtype=np.int64)).hold_out(holdout)
    assert nobody.user_ids == [] and nobody.targets.dtype == np.int64


def test_without_lists_numbers_are_the_ids(folder):
    (folder / "item_list.txt").unlink()
    (folder / "user_list.txt").unlink()
    data = read_folder(folder)
    assert data.items == Items(["10", "20", "30"], [""] * 3, [""] * 3)
    assert data.user_ids == ["0", "1"]
    assert data.targets.tolist() == [2, 0]


def test_catalog_is_the_union_of_list_and_interactions(folder):
    write_texts(folder, item_list="title remap_id org_id\nNew 25 n\nOld 10 o\n")
    items = read_folder(folder).items
    assert items == Items(["o", "20", "n", "30"], ["Old", "", "New", ""], [""] * 4)


def test_order_of_lines_does_not_matter(folder):
    expected = read_folder(folder)
    write_texts(folder, train="1 20\n0 10 20\n", user_list="remap_id org_id\n1 bob\n0 ann\n5 eve\n")
    assert_same(expected, read_folder(folder))


@pytest.mark.parametrize(
    "name, change",
    [
        ("train", lambda text: text.replace("\n", "\r\n")),
        ("train", lambda text: text + "\n\r\n  \n"),
        ("train", lambda text: text.rstrip("\n")),
        ("test", lambda text: "\ufeff" + text),
        ("item_list", lambda text: text.replace("\n", "\r\n") + "\r\n\r\n"),
        ("user_list", lambda text: text + "\n\n"),
    ],
)
def test_harmless_differences_are_read(folder, name, change):
    expected = read_folder(folder)
    path = folder / f"{name}.txt"
    path.write_bytes(change(path.read_text()).encode())
    assert_same(expected, read_folder(folder))


def test_newline_inside_quotes_is_part_of_the_title(folder):
    write_texts(folder, item_list='org_id remap_id title\na 10 "two\n lines"\nb x y\n')
    with pytest.raises(ValueError, match=r"item_list.txt, line 4: expected a whole number.*'x'"):
        read_folder(folder)
    write_texts(folder, item_list='org_id remap_id title\na 10 "two\n lines"\nb 20 y\n')
    assert read_folder(folder).items.titles == ["two\n lines", "y", ""]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("train", "", "train.txt: expected a line 'user item item ...', got an empty file"),
        ("train", " \n\n", "train.txt: .*got an empty file"),
        ("train", "0 10 20\n1 x\n", "train.txt, line 2: expected a whole number.*got 'x'"),
        ("train", "0 10 -2\n1 20\n", "train.txt, line 1: expected a whole number.*got '-2'"),
        ("train", "0 10 ٣\n1 20\n", "train.txt, line 1: expected a whole number"),
        ("train", "0 " + "9" * 5000, "train.txt, line 1: expected .* 18 digits, got '9{40}...'"),
        ("train", "0 10 20\n1\n", "train.txt, line 2: expected 'user item.*got user '1' without"),
        ("train", "0 10 20\n\n1 20\n", "train.txt, line 2: expected 'user item.*got an empty line"),
        ("train", "0 10 20\n1 20\n0 10 20\n", r"train.txt, line 3: .*got user 0 again.*line 1\)"),
        ("train", "0 10 20\n1 20\n7 20\n", "train.txt, line 3: expected a user of test.txt, got 7"),
        ("test", TEST + "7 20 30\n", "test.txt, line 3: expected a user of train.txt, got 7"),
        ("test", "0 10 20 30\n1 20\n", "test.txt, line 2: expected line 2 of train.*got 1 items"),
        ("test", "0 10 20 30\n1 20 1 2\n", "test.txt, line 2: .*user 1 .2 items.*got 3 items"),
        ("test", "0 10 30 20\n1 20 10\n", "test.txt, line 1: .*got item 30 instead of 20 at.* 2"),
        ("train", b"0 10 20\n1 \xff20\n", "train.txt, line 2: expected UTF-8, got byte 0xff.* 10"),
        ("test", "\ufeff0 10 20 30".encode("utf-16"), "test.txt: expected UTF-8, got UTF-16"),
        ("item_list", b"org_id remap_id\n\xe9 1\n", "line 2: .*UTF-8, got byte 0xe9 at offset 16"),
        ("item_list", "", "item_list.txt: expected a header .*got an empty file"),
        ("item_list", "org_id title\n", "item_list.txt, line 1: expected a header.*'org_id title'"),
        ("item_list", "org_id remap_id org_id\n", "item_list.txt, line 1: expected a header"),
        ("item_list", "org_id remap_id price\n", "item_list.txt, line 1: expected a header"),
        ("user_list", "org_id remap_id title\n", "user_list.txt, line 1: expected a header"),
        ("item_list", "org_id remap_id\na 1 b\n", "item_list.txt, line 2: expected 2 col.*got 3"),
        ("item_list", "org_id remap_id\na\n", "item_list.txt, line 2: expected 2 col.*got 1"),
        ("item_list", "org_id remap_id\n\na 1\n", "item_list.txt, line 2: expected a row, got an"),
        ("item_list", "org_id remap_id\na 1\nb 1\n", "line 3: expected each remap_id once, got 1"),
        ("item_list", "org_id remap_id\na 1\na 2\n", "line 3: .*org_id once, got 'a' .*line 2"),
        ("item_list", 'org_id remap_id\n"a 1\n', "line 2: expected space-separated columns, got"),
        ("item_list", 'org_id remap_id\n"a"b 1\n', "line 2: expected space-separated columns"),
        ("item_list", "org_id remap_id\n20 10\n", "row for item 20.*the org_id of item 10"),
        ("user_list", "org_id remap_id\nann 0\n", "train.txt, line 2: expected a user of user_li"),
    ],
)
def test_refuses(folder, name, text, message):
    write_texts(folder, **{name: text})
    with pytest.raises(ValueError, match=message) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


def test_refuses_what_is_not_a_folder_of_files(folder):
    with pytest.raises(ValueError, match="expected a folder, got nothing"):
        read_folder(folder / "none")
    with pytest.raises(ValueError, match="train.txt: expected a folder, got a file"):
        read_folder(folder / "train.txt")
    with pytest.raises(ValueError, match="holdout: expected one of test, .*none, got 'dev'"):
        read_folder(folder, "dev")
    (folder / "test.txt").unlink()
    with pytest.raises(ValueError, match="test.txt: expected a file, got nothing"):
        read_folder(folder)
    (folder / "test.txt").mkdir()
    with pytest.raises(ValueError, match="test.txt: expected a readable file"):
        read_folder(folder)


def test_dataset_refuses_what_breaks_its_contract():
    items = Items(["a", "b"], ["", ""], ["", ""])
    one = [np.array([0])]
    with pytest.raises(ValueError, match=r"titles: expected one per item \(2\), got 1"):
        Items(["a", "b"], [""], ["", ""])
    with pytest.raises(ValueError, match="items.ids: expected each id once, got 'a' twice"):
        Items(["a", "a"], ["", ""], ["", ""])
    for histories, targets, message in (
        ([], [1], r"histories: expected one per user \(1\), got 0"),
        (one, [], r"targets: expected one per user \(1\), got 0"),
        ([np.array([], dtype=np.int64)], [1], "histories: expected an item for user row 0"),
        ([np.array([2])], [1], "histories: expected item indices from 0 to 1, got 2 to 2"),
        ([np.array([-1])], [1], "histories: expected item indices"),
        (one, [2], "targets: expected item indices from -1 to 1, got 2 to 2"),
        (one, [-2], "targets: expected item indices from -1"),
        (one, [0.5], "targets: expected int64, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset(items, ["u"], histories, np.array(targets))


@settings(deadline=None, max_examples=150)
@given(data=datasets())
def test_written_folder_reads_back_the_same(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "new" / "folder"
    write_folder(data, folder)
    assert_same(data, read_folder(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]  # nothing temporary stays


FILES = ["train", "test", "item_list", "user_list"]
LIKELY = st.lists(
    st.sampled_from("0 1 10 20 30 x -1 org_id remap_id title category a\t".split(" "))
    | st.sampled_from([" ", " ", " ", "\n", "\n", "\r\n", '"', '""', "\r", "\0", "\ufeff"]),
    max_size=30,
).map(lambda parts: "".join(parts).encode())


@settings(deadline=None, max_examples=400)
@given(name=st.sampled_from(FILES), data=st.binary(max_size=60) | LIKELY, append=st.booleans())
def test_arbitrary_bytes_give_a_dataset_or_one_line(name, data, append, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_texts(folder)
    path = folder / f"{name}.txt"
    path.write_bytes((path.read_bytes() if append else b"") + data)
    try:
        assert isinstance(read_folder(folder), Dataset)
    except ValueError as error:
        assert_one_line(error, folder)


def test_write_folder_refuses_and_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    data = read_folder(folder)
    with pytest.raises(ValueError, match="expected a new or empty folder, got one that exists"):
        write_folder(data, folder)
    target = tmp_path / "inner" / "out"
    with pytest.raises(ValueError, match="expected a target for every user, got none for .*'bob'"):
        write_folder(read_folder(folder, "validation"), target)
    lone = Dataset(Items(["\ud800"], [""], [""]), ["u"], [np.array([0])], np.array([0]))
    with pytest.raises(ValueError, match="expected valid Unicode for item_list.txt"):
        write_folder(lone, target)
    assert not target.parent.exists()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_folder(data, target)
    assert list(target.parent.iterdir()) == []


def test_write_folder_takes_an_empty_folder(folder, tmp_path):
    target = tmp_path / "empty"
    target.mkdir()
    write_folder(read_folder(folder), target)
    assert_same(read_folder(folder), read_folder(target))


REAL = os.environ.get("CONTREC_DATA")


@pytest.mark.skipif(not REAL, reason="CONTREC_DATA (a folder of real data sets) is not set")
@pytest.mark.parametrize(
    "name, users, items, interactions",
    [
        ("software", 1351, 778, 9322),
        ("lastfm", 1091, 3685, 52670),
        ("beauty", 22363, 12101, 198502),
        ("ml1m", 6038, 3307, 835789),
    ],
)
def test_real_data_has_its_published_size(name, users, items, interactions):
    data = read_folder(Path(REAL) / name)
    assert (len(data.user_ids), len(data.items)) == (users, items)
    assert sum(map(len, data.histories)) + users == interactions
    assert (data.targets >= 0).all()
    validation = read_folder(Path(REAL) / name, "validation")
    assert validation.items == data.items
    for shorter, target, longer in zip(
        validation.histories, validation.targets, data.histories, strict=True
    ):
        np.testing.assert_array_equal(np.append(shorter, target), longer)
    assert all(title.strip() for title in data.items.titles)
    assert any(data.items.categories) == (name != "beauty")
