"""What serves a trained model: lists for users or histories, by their original ids."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from contrec_fast.data.interactions import Dataset
from contrec_fast.engine.index import KINDS
from contrec_fast.engine.lists import BATCH, Engine, table_of
from contrec_fast.engine.served import Histories, served_dataset
from contrec_fast.engine.stream import CHUNK, chunks_of, write_chunks
from contrec_fast.environment import usable_device
from contrec_fast.models.contrec import ContRec
from contrec_fast.progress import Silent


class Recommender:
    """Top-K lists of known users or of new histories, with everything held ready between calls.

    The model must not change as long as this is used; `accelerate` makes another one when it does.

    Args:
        model: a trained model with a dataset, or its folder.
        device: where to; a given model is moved there. By default it stays (a folder's: the CPU).
        dtype: that the language model computes in, its own by default; the rest stays float32.
            bfloat16 leaves conditions 2 to 3 digits and may change words of the texts; "fp8" is
            bfloat16 with linear layers in 8 bits (`engine.fp8`), for GPUs: slow on a CPU.
        deterministic: a list's bits then depend on nothing but model, seed, user id and history
            (on the same machine with as many threads): each user is read and written alone, and
            drafts are not learned from others. Without it others change the rounding of the
            language model. Far slower where the language model and prompts are small (25 times,
            for the default model).
        text: off leaves out the written text and its bonus (the latent path alone): faster.
        seed: key of the sampler's noise.
        remembered: bytes for what was read of users, so that of one who comes back only the new
            items are read. The window onto a history then grows to twice `prompt.history` items
            before it is cut back (`Reader`). By default nobody is remembered.
        constrained: texts are then responses of the catalog: category and title exist.
        index: "flat", "ivf" or "hnsw" lets faiss find candidates, which are scored exactly
            (`CandidateIndex`); the search is exact by default.

    Raises:
        ValueError: a folder that holds no model, a model without a dataset, an unknown index or
            device, or options that do not go together, in one line.
        TypeError: `model` is neither, `dtype` neither a float dtype nor "fp8", or `seed` no int64.
        ImportError: an index is wanted and faiss is not installed.
    """

    def __init__(
        self,
        model: ContRec | str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        deterministic: bool = False,
        text: bool = True,
        seed: int = 0,
        remembered: int | None = None,
        constrained: bool = False,
        index: str | None = None,
    ):
        if index not in (None, *KINDS):
            raise ValueError(f"index: expected None, {', '.join(KINDS)}, got {index!r}")
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise TypeError(f"seed: expected a whole number of 64 bits, got {seed!r}")
        device = None if device is None else usable_device(device)
        if isinstance(model, (str, Path)):
            model = ContRec.from_pretrained(model)
        if not isinstance(model, ContRec):
            got = type(model).__name__
            raise TypeError(f"model: expected a ContRec or the path of its folder, got {got}")
        if dtype not in (None, "fp8") and not getattr(dtype, "is_floating_point", False):
            raise TypeError(f"dtype: expected a float dtype of torch or 'fp8', got {dtype!r}")
        if model.dataset is None:
            raise ValueError("model: expected one with a dataset, which names users and items")
        self.model = model if device is None else model.to(device)
        self.engine = Engine(
            model, model.dataset, seed, text, dtype, deterministic, remembered, constrained, index
        )
        self._made_of = _state(model)

    @property
    def fresh(self) -> bool:
        """Whether the model is what it was (steps of a fused optimizer leave no trace)."""
        now = _state(self.model)
        return len(now) == len(self._made_of) and all(
            before is after and version == other
            for (before, version), (after, other) in zip(self._made_of, now)
        )

    def _served(self, users, histories) -> Dataset:
        if not self.fresh:
            raise RuntimeError("model: expected no changes, got some: make another Recommender")
        return served_dataset(self.model.dataset, users, histories)

    def warm_up(self) -> None:
        """Capture CUDA graphs for users like the model's own, of whom there must be some.

        Nothing is captured later: longer prompts or more users at once are served without.

        Raises:
            ValueError: the model is not on a GPU, or has no users.
        """
        engine, histories = self.engine, sorted(self.model.dataset.complete().histories, key=len)
        if not histories:
            raise ValueError("model: expected one with users to warm up with, got none")
        engine.head.record()
        if engine.text:
            engine.reader.warm_up(histories[-BATCH:])

    def recommend(
        self,
        users: Sequence[str] | None = None,
        histories: Histories | None = None,
        k: int = 10,
        progress=None,
    ) -> pd.DataFrame:
        """Top-K lists of known users (all of them by default) or of new ones with a history.

        Args:
            users: original ids of users that the model was trained with. histories: instead, the
            original item ids that each new user chose, oldest first: by user, or a DataFrame with
            the columns user_id and item_id, which takes less memory. k: items per user.
            progress: shows long work (`progress.ProgressBars`).

        Returns:
            Columns user_id, item_id, title, score (float), rank (from 1), matched (the item's
            category is named by the text) and text; a user's rows together, best first.

        Raises:
            ValueError: an unknown user or item, an empty history, no users, or k not in 1..N.
            TypeError: ids that are no strings, no list where several belong, `histories` that
            name no users, or k no whole number. All in one line.
        """
        dataset = self._served(users, histories)
        rows = np.arange(len(dataset.user_ids))
        advance = None
        if progress:
            advance = progress.stage("Users", math.ceil(len(rows) / BATCH), "batches")
        lists = self.engine.over(dataset).recommend(rows, k, advance=advance)
        return table_of(dataset, rows, lists).to_pandas()

    def recommend_iter(
        self,
        users: Sequence[str] | None = None,
        histories: Histories | None = None,
        k: int = 10,
        chunk: int = CHUNK,
        progress=None,
    ) -> Iterator[pd.DataFrame]:
        """The rows of `recommend`, for `chunk` users after the other.

        Lists are computed when they are asked for. Memory does not grow with the number of users
        beyond what names them and their histories.

        Args:
            users, histories, k, progress: see `recommend`. chunk: users at a time.

        Raises:
            ValueError, TypeError: as `recommend`, at the call or before the first chunk.
        """
        dataset = self._served(users, histories)
        engine, chunks = self.engine.over(dataset), chunks_of(dataset, chunk)
        advance = (progress or Silent()).stage("Users", len(chunks), "chunks")

        def tables():
            for rows in chunks:
                begun = time.perf_counter()
                lists = engine.recommend(rows, k)
                advance(rate=len(rows) / (time.perf_counter() - begun))
                yield table_of(dataset, rows, lists).to_pandas()

        return tables()

    def write_lists(
        self,
        path: str | Path,
        users: Sequence[str] | None = None,
        histories: Histories | None = None,
        k: int = 10,
        chunk: int = CHUNK,
        progress=None,
    ) -> None:
        """Write the rows of `recommend_iter` to a Parquet file; called again, go on where it
        stopped.

        Finished chunks wait in the folder `.NAME.parts` beside the file, which appears whole.
        Chunks of another job (other weights, users, histories or arguments) are thrown away, so
        that one of two jobs at a time for one file fails. An interrupted job ends with the same
        bytes as one that was not, on the same machine with as many threads: for that, `remembered`
        users are forgotten.

        Args:
            path: of the file, which is replaced if it exists. The rest: see `recommend_iter`.

        Raises:
            ValueError, TypeError: as `recommend`, before anything is written.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"path: expected a file, got the folder {path}")
        dataset = self._served(users, histories)
        chunks, engine = chunks_of(dataset, chunk), self.engine.over(dataset)
        engine.check(chunks[0], k)
        write_chunks(engine, chunks, path, int(k), progress or Silent())  # k: maybe NumPy's


def _state(model: ContRec) -> list:
    """What decides lists: the dataset, and all tensors with how often they were written to."""
    tensors = (*model.parameters(), *model.buffers())
    return [(model.dataset, 0)] + [
        (tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors
    ]
