"""`accelerate`: a trained ContRec whose inference runs on the engine, under the same interface."""

from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from contrec_fast import native, ops
from contrec_fast.data.prompts import PromptBatch
from contrec_fast.engine.recommender import Recommender
from contrec_fast.models.contrec import ContRec


class Part(NamedTuple):
    """What serves a part of the model; `why` says what of it was not replaced, and why not."""

    name: str
    served_by: str
    why: str


def accelerate(model: ContRec, *, report: bool = False, **options) -> "AcceleratedContRec":
    """The same model, weights shared, whose `read`, `write` and `recommend` are the engine's.

    In float32 results are the reference's up to rounding: with the same seed, the same top-K ids
    wherever scores are further apart than that. Everything else (training, `add_items`,
    `save_pretrained`, ...) is the model's own. What is prepared is prepared again when weights
    have changed since.

    Args:
        model: a trained model. report: print what was replaced, what was not and why; it is also
            in the result's `report`. options: those of `Recommender` (device, dtype, ...).

    Raises:
        TypeError, ValueError: as `Recommender`.
    """
    accelerated = AcceleratedContRec(model, options)
    if report:
        table = Table("part", "served by", "why", box=None)
        for part in accelerated.report:
            table.add_row(*map(escape, part))
        Console().print(table)
    return accelerated


class AcceleratedContRec(ContRec):
    """See `accelerate`.

    Attributes:
        recommender: what serves, made again when weights have changed. report: list of `Part`.
    """

    def __init__(self, model: ContRec, options: dict):
        nn.Module.__init__(self)
        if not isinstance(model, ContRec):
            raise TypeError(f"model: expected a ContRec, got {type(model).__name__}")
        # The same tensors and modules, but containers of its own: items that are added here are
        # not added to the model.
        own = {name: dict(value) for name, value in vars(model).items() if type(value) is dict}
        vars(self).update(vars(model) | own)
        self._options, self._recommender = options, None
        self.eval()
        self.recommender  # noqa: B018 (mistakes show now)

    def __getstate__(self) -> dict:
        return vars(self) | {"_recommender": None}  # a copy makes its own

    @property
    def recommender(self) -> Recommender:
        if self._recommender is None or not self._recommender.fresh:
            self._recommender = Recommender(self, **self._options)
            if self.item_vectors.is_cuda and self.dataset.user_ids:
                self._recommender.warm_up()
        return self._recommender

    def train(self, mode: bool = True) -> "AcceleratedContRec":
        if mode:
            self._recommender = None  # a fused optimizer changes weights without a trace
        return super().train(mode)

    @torch.inference_mode()
    def read(self, batch: PromptBatch) -> Tensor:
        histories = histories_of(batch, self.config.prompt.history)
        if histories is None:
            return super().read(batch)
        return self.recommender.engine.reader.read(histories)

    @torch.inference_mode()
    def write(self, batch: PromptBatch) -> tuple[Tensor, list[str]]:
        histories = histories_of(batch, self.config.prompt.history)
        if histories is None:
            return super().write(batch)
        return self.recommender.engine.reader.write(histories)

    def recommend(self, users=None, histories=None, k: int = 10, progress=None):
        return self.recommender.recommend(users, histories, k, progress)

    @property
    def report(self) -> list[Part]:
        engine = self.recommender.engine
        reader, head = engine.reader, engine.head
        with torch.inference_mode():  # of one user, to see what serves
            condition = reader.read([np.zeros(1, dtype=np.int64)])
            key = torch.zeros(1, dtype=torch.int64, device=condition.device)
            head.search(head.vectors(condition, key), 1)
        on_gpu = condition.device.type == "cuda"
        size = reader.tokens.numel() * reader.tokens.element_size() / 2**20
        packed = reader.packed.suits
        parts = [
            Part(
                "prompts",
                "packed without padding, behind a shared cache" if packed else "transformers",
                "" if packed else "an attention that is not transformers' own, or a sliding window",
            ),
            Part(
                "text",
                "drafted and verified" if packed and engine.text else
                "transformers' generate" if engine.text else "nothing: no text is written",
                "",
            ),
            Part("item tokens", f"precomputed, {size:.1f} MiB", ""),
            Part(
                "language model", engine.settings["dtype"].removeprefix("torch."),
                reader.packed.compiled,
            ),
            Part(
                "CUDA graphs",
                "the sampler, decoding" if reader.counters["captures"] else
                "the sampler" if head.recorded else "none",
                "" if head.recorded else "no users to warm up with" if on_gpu else "no GPU",
            ),
        ]  # fmt: skip
        served = ["gather_tokens", "cosine_topk"] + ["sample"] * (head.plan is not None)
        return parts + [_served(operation, on_gpu) for operation in sorted(served)]


def _served(operation: str, on_gpu: bool) -> Part:
    name, why = ops.last_backend(operation), ""
    if name == "reference":
        why = "no stored run on such a GPU showed a kernel faster"
        if not on_gpu:
            why = native.why_missing() or "C++ does not serve such a call, or is slower"
    return Part(f"ops.{operation}", name, why)


def histories_of(batch: PromptBatch, most: int) -> list[np.ndarray] | None:
    """The histories that `Prompts.inference_batch` made a batch of; None for another batch.

    Args:
        most: how many items the engine shows of each.
    """
    shown, older = batch.shown.cpu().numpy(), batch.older.cpu().numpy()
    counts = (shown >= 0).sum(1)
    answered = (batch.next_items >= 0).any()
    if answered or not np.array_equal(batch.read_item.cpu().numpy(), counts - 1):
        return None  # prompts of training, whose conditions are read elsewhere, too
    before = np.split(older, batch.older_offsets.cpu().numpy()[1:])
    if any(n != min(len(old) + n, most) for old, n in zip(before, counts)):
        return None  # other windows
    return [np.append(old, new[:n]) for old, new, n in zip(before, shown, counts)]
