"""From users' histories to top-K lists, batch by batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from contrec_fast import ops
from contrec_fast.data.interactions import Dataset
from contrec_fast.data.prompts import CategoryMatcher, Prompts
from contrec_fast.models.contrec import ContRec


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


class Recommender:
    """Serves a trained model for the users of a dataset.

    The sampler's noise is keyed by the user's original id: it depends neither on the batch nor on
    the row a user has in the dataset. (The language model rounds differently in other batches.)

    Args:
        seed: key of the sampler's noise.
    """

    def __init__(self, model: ContRec, dataset: Dataset, seed: int = 0):
        self.model, self.dataset, self.seed = model.eval(), dataset, seed
        config = model.config
        self.prompts = Prompts(
            dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt
        )
        self.matcher = CategoryMatcher(dataset.items.categories)
        device = model.item_vectors.device
        self.catalog = ops.Catalog(model.item_vectors.detach(), self.matcher.groups.to(device))
        self.seen = ops.SeenLists.from_lists(dataset.histories, device)
        self.keys = torch.tensor([stable_id(user) for user in dataset.user_ids], device=device)
        head = config.head
        self.plan = ops.plan_sampling(
            model.head.denoiser, head.schedule, head.timesteps, head.method, head.steps,
            head.guidance,
        )  # fmt: skip

    def recommend(
        self, rows: Sequence[int], k: int, batch_size: int = 128, advance=None
    ) -> Recommendations:
        """Lists for some users of the dataset, items of their history left out.

        Args:
            rows: user rows. k: length of the lists. advance: called after each batch.

        Raises:
            ValueError: no rows, a row that no user has, or k not in 1..N, in one line.
        """
        rows, users, items = np.asarray(rows), len(self.dataset.histories), len(self.catalog)
        if not 1 <= k <= items:  # before the language model has read anything
            raise ValueError(f"k: expected 1 to the catalog's {items} items, got {k}")
        if not len(rows) or rows.min() < 0 or rows.max() >= users:
            raise ValueError(f"rows: expected user rows from 0 to {users - 1}, got {rows}")
        order = np.argsort([len(self.dataset.histories[row]) for row in rows], kind="stable")
        parts = []
        for start in range(0, len(rows), batch_size):
            parts.append(self._batch(rows[order[start : start + batch_size]], k))
            if advance:
                advance()
        back = np.argsort(order)
        columns = [np.concatenate(column)[back] for column in zip(*(part[:3] for part in parts))]
        texts = [text for part in parts for text in part[3]]
        return Recommendations(*columns, [texts[i] for i in back])

    @torch.inference_mode()
    def _batch(self, rows: np.ndarray, k: int):
        device = self.model.item_vectors.device
        batch = self.prompts.inference_batch([self.dataset.histories[row] for row in rows])
        config = self.model.config
        condition, texts = self.model.write(batch.to(device), config.prompt.response_tokens)
        user = torch.from_numpy(rows).to(device)
        vectors = self.plan(condition, seed=self.seed, user_ids=self.keys[user])
        matched = self.matcher.match(texts).to(device)
        scores, ids = ops.cosine_topk(
            vectors, self.catalog, k, matched, config.retrieval.bonus, self.seen, user
        )
        group = self.catalog.groups[ids.clamp(min=0)]
        named = matched.gather(1, group.clamp(min=0)) & (group >= 0) & (ids >= 0)
        return ids.cpu().numpy(), scores.cpu().numpy(), named.cpu().numpy(), texts


def stable_id(user_id: str) -> int:
    """A user's 64-bit noise key, made from the original id (signed, for int64 tensors)."""
    digest = hashlib.blake2b(user_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
