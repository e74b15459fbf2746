"""Top-K lists of very many users, a chunk at a time, into a Parquet file.

Chunks are fixed stretches of the users in their order, so that a list does not depend on where a
job was interrupted.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import contrec_fast
from contrec_fast.data.files import whole_file
from contrec_fast.data.interactions import Dataset
from contrec_fast.engine.ahead import ahead
from contrec_fast.engine.lists import Engine, table_of

CHUNK = 8192
SCHEMA = pa.schema({
    "user_id": pa.string(), "item_id": pa.string(), "title": pa.string(), "score": pa.float32(),
    "rank": pa.int64(), "matched": pa.bool_(), "text": pa.string(),
})  # fmt: skip


def chunks_of(dataset: Dataset, chunk: int) -> list[np.ndarray]:
    """The rows of a dataset's users, `chunk` of them at a time."""
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"chunk: expected at least one user, got {chunk}")
    rows = np.arange(len(dataset.user_ids))
    return np.split(rows, range(chunk, len(rows), chunk))


def write_chunks(engine: Engine, chunks: list[np.ndarray], path: Path, k: int, progress) -> None:
    """Write the lists of chunks of users to a Parquet file; see `Recommender.write_lists`."""
    folder = path.with_name(f".{path.name}.parts")
    job = _fingerprint(engine, k, len(chunks[0]))
    # The name says whose a part is, whoever else works in the folder.
    parts = [folder / f"{job}-{number:08d}.parquet" for number in range(len(chunks))]
    folder.mkdir(parents=True, exist_ok=True)
    for other in set(folder.iterdir()).difference(parts):
        other.unlink(missing_ok=True)
    todo = [(part, rows) for part, rows in zip(parts, chunks) if not part.exists()]
    advance = progress.stage("Users", len(chunks), "chunks", len(chunks) - len(todo))

    def computed():
        for part, rows in todo:
            begun = time.perf_counter()
            engine.reader.forget()  # what an interrupted job has not read
            lists = engine.recommend(rows, k)
            advance(rate=len(rows) / (time.perf_counter() - begun))
            yield part, rows, lists

    def write(chunk) -> None:
        part, rows, lists = chunk
        with whole_file(part) as partial:
            pq.write_table(table_of(engine.dataset, rows, lists).cast(SCHEMA), partial)

    for _ in ahead(write, computed()):
        pass
    with whole_file(path) as partial, pq.ParquetWriter(partial, SCHEMA) as file:
        for table in ahead(pq.read_table, parts):
            file.write_table(table)
    shutil.rmtree(folder)


def _fingerprint(engine: Engine, *arguments) -> str:
    """Of all that decides the lists."""
    digest = hashlib.blake2b(digest_size=16)

    def add(*values) -> None:
        digest.update((json.dumps(values) + "\n").encode())

    model, dataset = engine.model, engine.dataset
    add(contrec_fast.__version__, asdict(model.config), engine.settings, arguments)
    for name, tensor in model.state_dict().items():
        add(name, list(tensor.shape), str(tensor.dtype))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    items = dataset.items
    add(items.ids, items.titles, items.categories)
    for start in range(0, len(dataset.user_ids), CHUNK):
        some = slice(start, start + CHUNK)
        add(dataset.user_ids[some], [len(history) for history in dataset.histories[some]])
        digest.update(np.concatenate(dataset.histories[some]))
    return digest.hexdigest()
