"""What is wrong with a table is told in one line that names the place; no bytes do worse."""

import gzip
import io

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import ITEMS, LOG, LOGS, assert_one_line, items_name, mutated, write
from hypothesis import given, settings
from hypothesis import strategies as st

from contrec_fast.config import DataConfig
from contrec_fast.data import Dataset, read_data, synthetic_shop, write_folder

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
        (shop, {"holdout": "dev"}, "holdout: expected one of test, validation, none, got 'dev'"),
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
