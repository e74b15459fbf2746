"""The diffusion head as a library: hidden states of any language model in, top-K lists out."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contrec_fast import ops
from contrec_fast.data import Dataset, load_dataset
from contrec_fast.data.prompts import CategoryMatcher
from contrec_fast.engine.index import CandidateIndex
from contrec_fast.environment import usable_device
from contrec_fast.models.latent import LatentPath, load_latent_path
from contrec_fast.ops.checks import FLOATS, check

BATCHES = (1, 8, 32, 128)  # sizes for which graphs are recorded


class Head:
    """Everything behind the language model: condition, sampler, item space, top-K.

    Nothing before the search waits for a GPU, and `record` lets the sampler run as CUDA graphs.
    The search waits at its end: lists are exact, so it looks at whether they are certain.

    Args:
        latent: a `ContRec` or what `load_latent_path` reads of one; evaluated as it is.
        catalog: what is searched; its groups are those of `matched`. seen: lists that
        `seen_rows` refer to. All on the device of `latent`.
        seed: key of the sampler's noise; an int64 scalar tensor on the device can be filled anew
        between calls, recorded ones, too.
        index: what finds candidates for the search, one of `CandidateIndex.build` of this very
        catalog or the kind of one to build; the search is exact if not given.

    Attributes:
        plan: the sampler, None without diffusion. dataset, matcher: of `Head.of`, else None;
        `matcher.match(texts)` gives `matched`.
    """

    def __init__(
        self,
        latent: LatentPath,
        catalog: ops.Catalog,
        seen: ops.SeenLists | None = None,
        seed: int | Tensor = 0,
        index: CandidateIndex | str | None = None,
    ):
        if isinstance(index, str):
            index = CandidateIndex.build(catalog, index)
        if index is not None and getattr(index, "catalog", None) is not catalog:
            raise ValueError("index: expected one of this head's catalog, got one of another")
        self.index = index
        self.latent, self.catalog, self.seen, self.seed = latent.eval(), catalog, seen, seed
        self.dataset = self.matcher = None
        self._recorded: dict[int, _Recorded] = {}
        head, self.plan = latent.config.head, None
        if head.diffusion:
            self.plan = ops.plan_sampling(
                latent.head.denoiser, head.schedule, head.timesteps, head.method, head.steps,
                head.guidance, head.prediction,
            )  # fmt: skip

    @classmethod
    def of(
        cls,
        latent: LatentPath,
        dataset: Dataset,
        seed: int | Tensor = 0,
        index: str | None = None,
    ) -> "Head":
        """With the items of a dataset as catalog and, if the model filters them, histories as
        seen lists, a row for each of its users."""
        device, matcher = latent.item_vectors.device, CategoryMatcher(dataset.items.categories)
        catalog = ops.Catalog(latent.item_vectors.detach(), matcher.groups.to(device))
        seen = None
        if latent.config.retrieval.filter_seen:
            seen = ops.SeenLists.from_lists(dataset.histories, device)
        head = cls(latent, catalog, seen, seed, index)
        head.dataset, head.matcher = dataset, matcher
        return head

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        seed: int | Tensor = 0,
        index: str | None = None,
    ) -> "Head":
        """Of the folder of a trained model, without its language model.

        With the folder's data, as `recommend` serves it: held-out items are in the histories.

        Raises:
            ValueError: a file is missing or does not fit, or `head.source` is not hidden, in one
            line.
        """
        folder = Path(folder)
        latent = load_latent_path(folder).to(usable_device(device))
        if not (folder / "data").exists():
            return cls(latent, ops.Catalog(latent.item_vectors.detach()), seed=seed, index=index)
        return cls.of(latent, load_dataset(folder / "data").complete(), seed, index)

    @torch.no_grad()
    def __call__(
        self,
        hidden: Tensor,
        user_ids: Tensor,
        k: int,
        matched: Tensor | None = None,
        seen_rows: Tensor | None = None,
        bag: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best items of each user.

        Args:
            hidden: [B, H] the language model's last hidden state, after its final norm, at the
                last continuous token of the history; of any float dtype.
            user_ids: [B] int64 stable ids (`stable_id`), which key the noise.
            k: 1 to N.
            matched: [B, G] bool, whether a user's text names group g; no bonus if not given.
            seen_rows: [B] int64 rows of the seen lists to leave out, -1 for none; no list is left
                out if not given.
            bag: [B, D] of `bags`, for a model that was trained with them (`head.bag`).

        Returns:
            scores [B, k] float32 descending, ids [B, k] int64 rows of the catalog; (-inf, -1)
            where there is no further item.

        Raises:
            TypeError, ValueError: wrong dtype, shape, device or value, in one line.
            RuntimeError: the denoiser changed since this was made.
        """
        return self.search(self.sample(hidden, user_ids, bag), k, matched, seen_rows)

    @torch.no_grad()
    def sample(self, hidden: Tensor, user_ids: Tensor, bag: Tensor | None = None) -> Tensor:
        """Item-space vectors [S, B, D], S draws per user, of hidden states; see `__call__`."""
        latent = self.latent
        if latent.config.head.source != "hidden":
            raise ValueError("hidden: expected a model that reads them, got head.source=response")
        vectors, weight = latent.item_vectors, latent.condition.weight
        check("hidden", hidden, ("B", weight.shape[1]), FLOATS, like=vectors)
        check("user_ids", user_ids, (len(hidden),), (torch.int64,), like=vectors)
        if (bag is None) != (latent.bag is None):
            expected, got = ("none", "one") if bag is not None else ("sums over histories", "none")
            raise ValueError(f"bag: expected {expected} (head.bag), got {got}")
        if bag is not None:
            check("bag", bag, (len(hidden), vectors.shape[1]), FLOATS, like=vectors)
        bag = None if bag is None else bag.to(weight.dtype)
        return self.vectors(latent.project(hidden.to(weight.dtype), bag), user_ids)

    def vectors(self, condition: Tensor, user_ids: Tensor) -> Tensor:
        """Conditions [B, D] and noise keys [B] to item-space vectors [S, B, D]."""
        for size, recorded in self._recorded.items():
            if len(condition) <= size:
                if self.plan is not None:
                    self.plan.check_fresh()
                return recorded.replay(condition, user_ids)
        return self._vectors(condition, user_ids)

    @property
    def recorded(self) -> list[int]:
        """The batch sizes of what `record` recorded."""
        return list(self._recorded)

    def _vectors(self, condition: Tensor, user_ids: Tensor) -> Tensor:
        draws, y = self.latent.config.retrieval.draws, condition
        if self.plan is not None:
            y = self.plan(condition, seed=self.seed, user_ids=user_ids, samples=draws)
        return self.latent.to_item_space(y if y.dim() == 3 else y[None])

    def search(
        self,
        vectors: Tensor,
        k: int,
        matched: Tensor | None = None,
        seen_rows: Tensor | None = None,
        seen: ops.SeenLists | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Vectors [S, B, D] to top-K lists by each item's best score; see `__call__`.

        `seen`: what `seen_rows` refer to, instead of the lists that the head was made with.
        """
        draws, batch = vectors.shape[:2]
        seen = self.seen if seen is None else seen
        arguments = (
            k,
            None if matched is None else matched.repeat(draws, 1),
            self.latent.config.retrieval.bonus,
            None if seen_rows is None else seen,
            None if seen_rows is None else seen_rows.repeat(draws),
        )
        if self.index is None:
            scores, ids = ops.cosine_topk(vectors.flatten(0, 1), self.catalog, *arguments)
        else:
            scores, ids = self.index.search(vectors.flatten(0, 1), *arguments)
        if draws > 1:
            shape = (draws, batch, k)
            scores, ids = best_of_draws(scores.reshape(shape), ids.reshape(shape))
        return scores, ids

    @torch.no_grad()
    def bags(self, histories: Iterable[Sequence[int]]) -> Tensor:
        """What a model was trained to know of whole histories besides hidden states.

        Args:
            histories: of each of B users, rows of the catalog, also of items that are too long
            ago to be in a prompt.

        Returns:
            [B, D] sums of item vectors over the square root of their number (0 if there is none).

        Raises:
            ValueError: an item that the catalog does not have, in one line.
        """
        vectors = self.latent.item_vectors
        rows = [torch.as_tensor(history, dtype=torch.int64) for history in histories]
        items, number = torch.cat([*rows, torch.empty(0, dtype=torch.int64)]), [*map(len, rows)]
        if len(items) and not 0 <= items.min() <= items.max() < len(vectors):
            raise ValueError(
                f"histories: expected items from 0 to {len(vectors) - 1}, got {items.min()} to "
                f"{items.max()}"
            )
        offsets = torch.tensor([0, *number], dtype=torch.int64).cumsum(0)[:-1]
        sums, number = self.latent.sums(items.to(vectors.device), offsets.to(vectors.device))
        return sums / number[:, None].clamp(min=1).to(sums.dtype).sqrt()

    @torch.no_grad()
    def record(self, batches: Sequence[int] = BATCHES) -> None:
        """Record `vectors`, and with it the sampler, as a CUDA graph for each of these batch sizes.

        From then on a call with B users replays the smallest graph that holds them; larger ones
        run as before. Results are those of the larger batch, which may round differently. A
        recorded head must not be called on several streams at once.

        Raises:
            ValueError: the head is not on a GPU.
        """
        self._recorded, recorded = {}, {}
        null = self.latent.head.denoiser.null_condition
        for size in sorted(batches):
            condition = null.new_zeros(size, len(null))
            user_ids = torch.zeros(size, dtype=torch.int64, device=null.device)
            call = functools.partial(self._vectors, condition, user_ids)
            recorded[size] = _Recorded(condition, user_ids, *as_graph(call, null.device))
        self._recorded = recorded


class _Recorded(NamedTuple):
    """A graph of one batch size: `run` makes `output` of what lies in the inputs."""

    condition: Tensor
    user_ids: Tensor
    run: Callable[[], None]
    output: Tensor

    def replay(self, condition: Tensor, user_ids: Tensor) -> Tensor:
        count = len(condition)
        self.condition[:count] = condition
        self.user_ids[:count] = user_ids
        self.run()
        return self.output[:, :count].clone()


def as_graph(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable, Tensor]:
    """A call as a CUDA graph: what runs it again, and the tensor that then holds its result."""
    if device.type != "cuda":
        raise ValueError(f"record: expected a head on a GPU, got one on {device}")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and kernels set themselves up beforehand
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return graph.replay, output


def best_of_draws(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Top-K lists of several draws to the top K by each item's best score.

    Exact: an item among the best K overall is among the best K of the draw it scores best in.

    Args:
        scores: [S, B, k] float32. ids: [S, B, k] int64, -1 (score -inf) where a list is over.

    Returns:
        scores [B, k] and ids [B, k]; ties go to the lower id.
    """
    k = scores.shape[2]
    scores, ids = (lists.movedim(0, 1).flatten(1) for lists in (scores, ids))
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, ids.gather(1, order).argsort(dim=1, stable=True))
    scores, ids = scores.gather(1, order), ids.gather(1, order)  # by id, its best score first
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    scores = scores.masked_fill(again, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores, ids = scores.gather(1, order), ids.gather(1, order)
    return scores, ids.masked_fill(scores == -torch.inf, -1)


def stable_id(user_id: str) -> int:
    """A user's 64-bit noise key, made from the original id (signed, for int64 tensors)."""
    digest = hashlib.blake2b(user_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
