"""From prompts to top-K lists, the released way, with the fast operations."""

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrec_fast.compat.ranking import Ranking
from contrec_fast.compat.responses import Responder
from contrec_fast.models.tokenizer import SigmaVAE
from contrec_fast.ops.checks import FLOATS, check

if TYPE_CHECKING:
    from contrec_fast.compat.whole import ReleasedModel


def item_tokens(ways: int) -> list[str]:
    """What stands in a prompt for the continuous tokens of an item."""
    return [f"<continuous_token_{k}>" for k in range(ways)]


def user_tokens(ways: int) -> list[str]:
    """What stands in a prompt for the continuous tokens of its user."""
    return [f"<user_continuous_token_{k}>" for k in range(ways)]


class Predictions(NamedTuple):
    """Lists of B users: scores [B, k] float32 descending (minus the distance for "mse") and ids
    [B, k] int64; (-inf, -1) where there are no more items. vectors: [B, D] as sampled.
    conditions: [B, D] that they were sampled for. texts: what the language model wrote."""

    scores: Tensor
    ids: Tensor
    vectors: Tensor
    conditions: Tensor
    texts: list[str]


class Predictor:
    """The released inference path: `ModelInterface.generate`, and the ranking after it.

    Prompts with continuous tokens -> greedy response -> its token embeddings -> output decoder ->
    condition encoder -> sampler -> the nearest items. Items' tokens, the sampler's plan and the
    catalog are made here, once: make another predictor when the model or the vectors change.

    Raises:
        TypeError, ValueError: vectors of a wrong dtype, shape or device, another measure, a
        language model that cannot be packed (`Responder`), in one line.
    """

    def __init__(
        self,
        model: "ReleasedModel",
        item_vectors: Tensor,
        user_vectors: Tensor | None = None,
        measure: str = "mse",
    ):
        weight = model.denoiser.null_condition
        check("item_vectors", item_vectors, ("N", len(weight)), FLOATS, like=weight)
        if user_vectors is not None:
            check("user_vectors", user_vectors, ("U", len(weight)), FLOATS, like=weight)
            user_vectors = user_vectors.to(weight.dtype)
        item_vectors = item_vectors.to(weight.dtype)
        self.model, self.user_vectors = model, user_vectors
        self.ranking = Ranking(item_vectors, measure)
        self.plan = model.plan()
        self.responder = Responder(model.language_model, model.output_decoder.mix.in_features)
        self.tokens = self._encode(model.item_tokenizer, item_vectors)  # [N, K, H]
        firsts = [*item_tokens(1), *user_tokens(1)]
        self.item_token, self.user_token = model.text_tokenizer.convert_tokens_to_ids(firsts)

    @torch.inference_mode()
    def predict(
        self,
        prompts: Sequence[str],
        histories: Sequence[Sequence[int]],
        users: Sequence[int] | None = None,
        k: int = 10,
        excluded: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        batch_padding: bool = False,
        zero_excluded: bool = False,
    ) -> Predictions:
        """Top-K lists for B prompts.

        Args:
            prompts: as the release writes them, a `<continuous_token_0>` ... of each item and
                perhaps a `<user_continuous_token_0>` ... (its `batch["input"]`). They are not cut;
                there, they are at 1,024 tokens.
            histories: the items that each prompt shows, in order (its `batch["items"]`).
            users: rows of `user_vectors`, which also key the noise; 0 to B - 1 if not given.
            k: 1 to N. excluded: items that no list has (its `batch["interacted"]`; by cosine, all;
                by the other measures, there, all but the last). The histories, if not given.
            seed: of the sampler's noise, which depends on it and the user alone. noise: scripted
                noise instead, [T, B, D], for equality with another program.
            batch_padding: as released; see `contrec_fast.compat`. zero_excluded: likewise.

        Raises:
            TypeError, ValueError, IndexError: lists of other lengths, items or users that do not
            exist, a prompt that shows another number of items, other arguments that do not fit,
            in one line.
        """
        excluded = histories if excluded is None else excluded
        if not isinstance(k, Integral):
            raise TypeError(f"k: expected a whole number, got {k!r}")
        if not 1 <= k <= len(self.tokens):  # before the language model has read anything
            raise ValueError(f"k: expected 1 to the catalog's {len(self.tokens)} items, got {k}")
        for name, lists in {"histories": histories, "users": users, "excluded": excluded}.items():
            if lists is not None and len(lists) != len(prompts):
                raise ValueError(f"{name}: expected {len(prompts)}, one a prompt, got {len(lists)}")
        for name, lists in {"histories": histories, "excluded": excluded}.items():
            shown = np.concatenate([*lists, []])
            if len(shown) and not 0 <= shown.min() <= shown.max() < len(self.tokens):
                raise ValueError(
                    f"{name}: expected items 0 to {len(self.tokens) - 1}, "
                    f"got {shown.min():g} to {shown.max():g}"
                )
        weight = self.model.denoiser.null_condition
        if not len(prompts):
            none = weight.new_empty(0, k), weight.new_empty(0, len(weight))
            return Predictions(none[0].float(), none[0].long(), none[1], none[1], [])
        pieces, tokens = self._pieces(prompts, histories, users)
        written = self.responder.write(pieces, tokens)
        lines = [line[line >= 0].tolist() for line in written.cpu().numpy()]
        texts = self.model.text_tokenizer.batch_decode(
            lines, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        padded = left_padded(written, self.model.text_tokenizer.pad_token_id, batch_padding)
        states = self.model.output_decoder(self.responder.table[padded].to(weight.dtype))
        conditions = self.model.condition_encoder(states)
        keys = None if users is None else torch.tensor(users, device=weight.device)
        vectors = self.plan(conditions, seed, keys, noise=noise)
        scores, ids = self.ranking(vectors, k, excluded, zero_excluded)
        return Predictions(scores, ids, vectors, conditions, texts)

    def _pieces(self, prompts, histories, users) -> tuple[list[np.ndarray], Tensor]:
        """Prompts as `Responder.write` takes them, and the table of the tokens they show."""
        ways = self.tokens.shape[1]
        shown, places = np.unique(np.concatenate([*histories, []]).astype(int), return_inverse=True)
        places = np.split(places, np.cumsum([len(items) for items in histories])[:-1])
        pieces, owners = [], []  # owners: users whose tokens are shown
        encoded = self.model.text_tokenizer(list(prompts)).input_ids
        for line, (ids, items) in enumerate(zip(encoded, places)):
            piece = np.array([ids, [-1] * len(ids)])
            at = np.flatnonzero(piece[0] == self.item_token)
            if len(at) != len(items):
                raise ValueError(
                    f"prompts: expected {len(items)} <continuous_token_0> in prompt {line}, one "
                    f"for each item of its history, got {len(at)}"
                )
            own = np.flatnonzero(piece[0] == self.user_token)
            if len(own):
                if users is None or self.user_vectors is None:
                    raise ValueError(
                        f"users, user_vectors: expected both for prompt {line}, which shows a user"
                    )
                owners.append(users[line])
            for k in range(ways):
                piece[1, at + k] = items * ways + k
                piece[1, own + k] = (len(shown) + len(owners) - 1) * ways + k
            pieces.append(piece)
        tokens = self.tokens[torch.from_numpy(shown).to(self.tokens.device)]
        if owners:
            if not 0 <= min(owners) <= max(owners) < len(self.user_vectors):
                raise ValueError(
                    f"users: expected 0 to {len(self.user_vectors) - 1}, got {min(owners)} to "
                    f"{max(owners)}"
                )
            own = self.user_vectors[torch.tensor(owners, device=self.tokens.device)]
            tokens = torch.cat([tokens, self._encode(self.model.user_tokenizer, own)])
        return pieces, tokens.flatten(0, 1)

    @torch.inference_mode()
    def _encode(self, tokenizer: SigmaVAE, vectors: Tensor) -> Tensor:
        return tokenizer.encode(vectors).to(self.responder.table.dtype)


def left_padded(written: Tensor, pad: int, batch_padding: bool) -> Tensor:
    """Responses [B, L], -1 behind their end, as the output decoder was trained: at the right end.

    Args:
        batch_padding: put all into the columns of the longest one, from its first column on.
    """
    counts = (written >= 0).sum(1, keepdim=True)
    width = written.shape[1]
    columns = torch.arange(width, device=written.device) - width
    columns = columns + (counts.max().expand_as(counts) if batch_padding else counts)
    inside = (columns >= 0) & (columns < counts)
    return written.gather(1, columns.clamp(min=0)).masked_fill(~inside, pad)
