"""Top-K lists of very many users, a chunk at a time: to iterate over, or into a Parquet file.

Chunks are fixed stretches of the users in their order, so that a list does not depend on where a
job was interrupted.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import contrec_fast
from contrec_fast.data.files import whole_file
from contrec_fast.data.interactions import Dataset
from contrec_fast.engine.recommender import Recommender, served_dataset, table_of
from contrec_fast.models.contrec import ContRec
from contrec_fast.progress import Silent

CHUNK = 8192
SCHEMA = pa.schema({
    "user_id": pa.string(), "item_id": pa.string(), "title": pa.string(), "score": pa.float32(),
    "rank": pa.int64(), "matched": pa.bool_(), "text": pa.string(),
})  # fmt: skip


def recommend_iter(
    model: ContRec,
    users: Sequence[str] | None = None,
    histories: Mapping[str, Sequence[str]] | None = None,
    k: int = 10,
    chunk: int = CHUNK,
    text: bool = True,
    progress=None,
) -> Iterator[pd.DataFrame]:
    """The rows of `recommend`, for `chunk` users after the other.

    Lists are computed when they are asked for. Memory does not grow with the number of users
    beyond what names them and their histories.

    Args:
        users, histories, k, progress: see `recommend`. chunk: users at a time.
        text: off leaves out the text and its bonus (the latent path alone).

    Raises:
        ValueError, TypeError: as `recommend`, at the call or before the first chunk.
    """
    dataset = served_dataset(model, users, histories)
    chunks = _chunks(dataset, chunk)
    recommender = Recommender(model, dataset, text=text)
    advance = (progress or Silent()).stage("Users", len(chunks), "chunks")

    def tables():
        for rows in chunks:
            yield table_of(dataset, rows, _timed(recommender, rows, k, advance))

    return tables()


def write_lists(
    model: ContRec,
    path: str | Path,
    users: Sequence[str] | None = None,
    histories: Mapping[str, Sequence[str]] | None = None,
    k: int = 10,
    chunk: int = CHUNK,
    text: bool = True,
    progress=None,
) -> None:
    """Write the rows of `recommend_iter` to a Parquet file; called again, go on where it stopped.

    Finished chunks wait in the folder `.NAME.parts` beside the file, which appears whole. Chunks
    of another job (other weights, users, histories or arguments) are thrown away, so that one of
    two jobs at a time for one file fails. An interrupted job ends with the same bytes as one that
    was not.

    Args:
        path: of the file, which is replaced if it exists. The rest: see `recommend_iter`.

    Raises:
        ValueError, TypeError: as `recommend`, before anything is written.
    """
    path, progress = Path(path), progress or Silent()
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the folder {path}")
    dataset = served_dataset(model, users, histories)
    chunks = _chunks(dataset, chunk)
    recommender = Recommender(model, dataset, text=text)
    recommender.check(chunks[0], k)
    k = int(k)  # maybe NumPy's
    folder = path.with_name(f".{path.name}.parts")
    job = _fingerprint(model, dataset, k, chunk, text)
    # The name says whose a part is, whoever else works in the folder.
    parts = [folder / f"{job}-{number:08d}.parquet" for number in range(len(chunks))]
    folder.mkdir(parents=True, exist_ok=True)
    for other in set(folder.iterdir()).difference(parts):
        other.unlink(missing_ok=True)
    todo = [(part, rows) for part, rows in zip(parts, chunks) if not part.exists()]
    advance = progress.stage("Users", len(chunks), "chunks", len(chunks) - len(todo))
    # A chunk is written while the next one is computed.
    with ThreadPoolExecutor(1) as writer:
        waiting = None
        for part, rows in todo:
            lists = _timed(recommender, rows, k, advance)
            if waiting:
                waiting.result()
            waiting = writer.submit(_write_part, part, dataset, rows, lists)
        if waiting:
            waiting.result()
    with whole_file(path) as partial, pq.ParquetWriter(partial, SCHEMA) as file:
        for part in parts:
            file.write_table(pq.read_table(part))
    shutil.rmtree(folder)


def _chunks(dataset: Dataset, chunk: int) -> list[np.ndarray]:
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"chunk: expected at least one user, got {chunk}")
    rows = np.arange(len(dataset.user_ids))
    return np.split(rows, range(chunk, len(rows), chunk))


def _timed(recommender: Recommender, rows: np.ndarray, k: int, advance):
    begun = time.perf_counter()
    lists = recommender.recommend(rows, k)
    advance(rate=len(rows) / (time.perf_counter() - begun))
    return lists


def _write_part(part: Path, dataset: Dataset, rows: np.ndarray, lists) -> None:
    table = pa.Table.from_pandas(table_of(dataset, rows, lists), SCHEMA, preserve_index=False)
    with whole_file(part) as partial:
        pq.write_table(table, partial)


def _fingerprint(model: ContRec, dataset: Dataset, *arguments) -> str:
    """Of all that decides the lists."""
    digest = hashlib.blake2b(digest_size=16)

    def add(*values) -> None:
        digest.update((json.dumps(values) + "\n").encode())

    add(contrec_fast.__version__, asdict(model.config), arguments)
    for name, tensor in model.state_dict().items():
        add(name, list(tensor.shape), str(tensor.dtype))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    items = dataset.items
    add(items.ids, items.titles, items.categories)
    for user, history in zip(dataset.user_ids, dataset.histories):
        add(user, len(history))
        digest.update(np.ascontiguousarray(history))
    return digest.hexdigest()
