"""From histories, by row of a dataset, to top-K lists, batch by batch."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from contrec_fast import ops
from contrec_fast.data.interactions import Dataset
from contrec_fast.data.prompts import CategoryMatcher, Prompts
from contrec_fast.engine.ahead import ahead
from contrec_fast.engine.head import Head, stable_id
from contrec_fast.engine.reader import Reader
from contrec_fast.models.contrec import ContRec
from contrec_fast.ops.transfer import upload

BATCH = 512
# Devices beside which batches are prepared. A CPU does it sooner itself: the thread would take
# turns with those that compute.
BUSY_ELSEWHERE = ("cuda",)


@dataclass
class Recommendations:
    """Top-K lists of B users.

    ids: [B, k] int64 internal item indices, -1 where there is no further item. scores: [B, k]
    float32. matched: [B, k] bool, the item's category is named by the user's text. texts: B.
    """

    ids: np.ndarray
    scores: np.ndarray
    matched: np.ndarray
    texts: list[str]


class Engine:
    """Serves a trained model for the users of a dataset.

    The sampler's noise is keyed by the user's original id: it depends neither on the batch nor on
    the row a user has in the dataset. (The language model rounds differently in other batches,
    unless it is `deterministic`.)

    Args:
        dataset: the model's own, or other users of the same catalog.
        seed: key of the sampler's noise.
        text: off leaves out the text and its bonus (the latent path alone).
        dtype, deterministic, remembered, constrained, index: see `Recommender`.

    Raises:
        ValueError: `remembered` is less than a token takes or given with `deterministic`,
        `constrained` is wanted without text or of a language model that cannot be packed, or an
        unknown index.
    """

    def __init__(
        self,
        model: ContRec,
        dataset: Dataset,
        seed: int = 0,
        text: bool = True,
        dtype: torch.dtype | str | None = None,
        deterministic: bool = False,
        remembered: int | None = None,
        constrained: bool = False,
        index: str | None = None,
    ):
        if deterministic and remembered is not None:
            raise ValueError(
                f"remembered: expected None with deterministic, as who came before changes the "
                f"rounding, got {remembered}"
            )
        self.model, self.dataset, self.seed = model.eval(), dataset, seed
        config = model.config
        self.text = (text or config.head.source == "response") and config.prompt.text != "none"
        self.prompts = Prompts(
            dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt
        )
        if constrained and not self.text:
            raise ValueError("constrained: expected texts to be written, got a model without any")
        self.deterministic = deterministic
        self.reader = Reader(model, self.prompts, dtype, not deterministic, remembered, constrained)
        self.matcher = CategoryMatcher(dataset.items.categories)
        groups = self.matcher.groups.to(model.item_vectors.device)
        self.catalog = ops.Catalog(model.item_vectors.detach(), groups)
        self.head = Head(model, self.catalog, seed=seed, index=index)
        # All that decides lists beside model and users.
        self.settings = {
            "seed": seed, "text": self.text, "dtype": str(dtype or model.backbone.dtype),
            "deterministic": deterministic, "grows": remembered is not None,
            "constrained": constrained, "index": index,
            "device": model.item_vectors.device.type, "torch": torch.__version__,
        }  # fmt: skip

    def over(self, dataset: Dataset) -> "Engine":
        """The same, with all that it holds ready, for other users of the same catalog."""
        other = copy.copy(self)
        other.dataset = dataset
        return other

    def recommend(
        self, rows: Sequence[int], k: int, batch_size: int = BATCH, advance=None
    ) -> Recommendations:
        """Lists for some users of the dataset, items of their history left out.

        Args:
            rows: user rows. k: length of the lists. advance: called after each `batch_size` users.

        Raises:
            ValueError: no rows, a row that no user has, or k not in 1..N, in one line.
            TypeError: k is no whole number.
        """
        rows = np.asarray(rows)
        self.check(rows, k)  # before the language model has read anything
        k = int(k)
        order = np.argsort([len(self.dataset.histories[row]) for row in rows], kind="stable")
        parts = []
        size = 1 if self.deterministic else batch_size
        batches = np.split(rows[order], range(size, len(rows), size))
        several = len(batches) > 1 and self.model.item_vectors.device.type in BUSY_ELSEWHERE
        for batch in (ahead if several else map)(self._prepare, batches):
            parts.append(self._batch(*batch, k))
            done = size * len(parts)
            if advance and (done % batch_size == 0 or done >= len(rows)):
                advance()
        back, (*columns, texts) = np.argsort(order), zip(*parts)
        # Only here is a GPU waited for.
        columns = [torch.cat(column).cpu().numpy()[back] for column in columns]
        texts = [text for part in texts for text in part]
        return Recommendations(*columns, [texts[i] for i in back])

    def check(self, rows: np.ndarray, k: int) -> None:
        """Raise what `recommend` does for such arguments."""
        if not isinstance(k, Integral):
            raise TypeError(f"k: expected a whole number, got {k!r}")
        users, items = len(self.dataset.histories), len(self.catalog)
        if not 1 <= k <= items:
            raise ValueError(f"k: expected 1 to the catalog's {items} items, got {k}")
        if not len(rows) or rows.min() < 0 or rows.max() >= users:
            raise ValueError(f"rows: expected user rows from 0 to {users - 1}, got {rows}")

    def _prepare(self, rows: np.ndarray) -> tuple:
        """What a batch needs that the device has no part in."""
        histories = [self.dataset.histories[row] for row in rows]
        self.reader.packer.learn(self.reader.windows(histories))
        keys = torch.tensor([stable_id(self.dataset.user_ids[row]) for row in rows])
        seen = None
        if self.model.config.retrieval.filter_seen:
            seen = ops.SeenLists.from_lists(histories)
        return histories, keys, seen

    @torch.inference_mode()
    def _batch(self, histories: list[np.ndarray], keys: Tensor, seen: ops.SeenLists | None, k: int):
        device = self.model.item_vectors.device
        vectors, texts = self._sample(histories, keys)
        matched, user = upload(self.matcher.match(texts), device), None
        if seen is not None:
            seen, user = seen.to(device), torch.arange(len(keys), device=device)
        scores, ids = self.head.search(vectors, k, matched, user, seen)
        group = self.catalog.groups[ids.clamp(min=0)].long()
        named = matched.gather(1, group.clamp(min=0)) & (group >= 0) & (ids >= 0)
        return ids, scores, named, texts

    @torch.inference_mode()
    def sample(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Item-space vectors [S, B, D] of some users, S per user, and their texts."""
        return self._sample(*self._prepare(rows)[:2])

    def _sample(self, histories: list[np.ndarray], keys: Tensor) -> tuple[Tensor, list[str]]:
        users = keys.tolist()
        if self.text:
            condition, texts = self.reader.write(histories, users)
        else:
            condition, texts = self.reader.read(histories, users), [""] * len(histories)
        return self.vectors(condition, upload(keys, condition.device)), texts

    def vectors(self, condition: Tensor, keys: Tensor) -> Tensor:
        """Conditions [B, D] and noise keys [B] to item-space vectors [S, B, D]."""
        return self.head.vectors(condition, keys)


def table_of(dataset: Dataset, rows: np.ndarray, lists: Recommendations) -> pa.Table:
    """The lists of some user rows: columns as `Recommender.recommend` names them."""
    place, rank = np.nonzero(lists.ids >= 0)
    items, item = np.unique(lists.ids[place, rank], return_inverse=True)
    names = dataset.items
    return pa.table({
        "user_id": _repeated([dataset.user_ids[row] for row in rows], place),
        "item_id": _repeated([names.ids[i] for i in items], item),
        "title": _repeated([names.titles[i] for i in items], item),
        "score": lists.scores[place, rank],
        "rank": rank + 1,
        "matched": lists.matched[place, rank],
        "text": _repeated(lists.texts, place),
    })  # fmt: skip


def _repeated(texts: list[str], places: np.ndarray) -> pa.Array:
    # Large: those of everybody's lists may have more than 2 GiB.
    return pa.array(texts, pa.large_string()).take(pa.array(places))
