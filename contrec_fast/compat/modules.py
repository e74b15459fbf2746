"""The released modules that ours differ from, and what a checkpoint comes to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrec_fast.models.condition import ConditionEncoder
from contrec_fast.models.denoisers import Denoiser
from contrec_fast.models.tokenizer import SigmaVAE
from contrec_fast.ops.checks import check
from contrec_fast.ops.sampling import SamplingPlan, plan_sampling


class ReleasedConditionEncoder(ConditionEncoder):
    """The released condition encoder, `predict` of `Tenc`: like ours, but padding is recognised.

    Its states have the item space's width already, their number is fixed, and the last position
    is read, whatever it holds. A position whose state plus positional embedding sums to exactly
    zero is padding: no key, unless all are, and then attention is uniform. Likewise a normalised
    query that sums to exactly zero attends to nothing.

    Args:
        dim: D. positions: S.
    """

    def __init__(self, dim: int, positions: int):
        super().__init__(dim, dim, positions)
        self.project = nn.Identity()

    def forward(self, states: Tensor) -> Tensor:
        """States [B, S, D] in the parameters' dtype to conditions [B, D].

        Raises:
            TypeError, ValueError: wrong dtype, shape or device, in one line.
        """
        positions = self.positional_embeddings.weight
        check("states", states, ("B", *positions.shape), (positions.dtype,), like=positions)
        x = states + positions
        query = self.ln_1(x[:, -1])
        attention = self.mh_attn
        scores = attention["linear_k"](x) @ attention["linear_q"](query)[..., None]
        scores = scores.squeeze(-1) / x.shape[-1] ** 0.5  # [B, S]
        # Finite, so that a row of nothing but padding gets equal shares.
        shares = scores.masked_fill(x.sum(-1) == 0, torch.finfo(x.dtype).min).softmax(-1)
        shares = shares * (query.sum(-1, keepdim=True) != 0)
        mixed = (shares[:, None] @ attention["linear_v"](x)).squeeze(1)
        y = self.ln_2(mixed + query)
        feed_forward = self.feed_forward
        y = feed_forward["layer_norm"](feed_forward["w_2"](F.relu(feed_forward["w_1"](y))) + y)
        return self.ln_3(y)


class ReleasedOutputDecoder(nn.Module):
    """The released way from a response's token embeddings to the condition encoder's states.

    Args:
        tokens: L, to which responses are padded. width_in: H, of the embeddings. positions: S.
        dim: D.
    """

    def __init__(self, tokens: int, width_in: int, positions: int, dim: int):
        super().__init__()
        self.project = nn.Linear(width_in, dim)
        self.mix = nn.Linear(tokens, tokens)
        self.shorten = nn.Linear(tokens, positions)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, L, H] in the parameters' dtype to states [B, S, D].

        Raises:
            TypeError, ValueError: wrong dtype, shape or device, in one line.
        """
        weight = self.project.weight
        shape = ("B", self.mix.in_features, weight.shape[1])
        check("embeddings", embeddings, shape, (weight.dtype,), like=weight)
        x = F.relu(self.project(F.relu(embeddings))).transpose(1, 2)  # [B, D, L], not negative
        x = F.relu(self.mix(x) + x)
        return F.relu(self.shorten(x)).transpose(1, 2)


class Released(nn.Module):
    """What `load_released` found; `.to(device)` moves all of it.

    Attributes:
        denoiser: LinearDenoiser ("mlp1" there) or MLPDenoiser ("mlp2").
        condition_encoder: states [B, S, D] to conditions [B, D].
        output_decoder: token embeddings [B, L, H] to states [B, S, D], or None.
        item_tokenizer, user_tokenizer: SigmaVAE, or None.
        settings: of the sampler, as `plan_sampling` takes them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition_encoder: ReleasedConditionEncoder,
        output_decoder: ReleasedOutputDecoder | None,
        item_tokenizer: SigmaVAE | None,
        user_tokenizer: SigmaVAE | None,
        settings: dict,
    ):
        super().__init__()
        self.denoiser, self.condition_encoder = denoiser, condition_encoder
        self.output_decoder, self.settings = output_decoder, settings
        self.item_tokenizer, self.user_tokenizer = item_tokenizer, user_tokenizer

    def plan(self, **changes) -> SamplingPlan:
        """The released sampler: 200 ancestral steps of the exp schedule, guidance 2.

        Called with conditions, it follows that chain (`draw="path"`). Call `plan` again after
        moving or changing the denoiser.

        Args:
            changes: other arguments of `ops.plan_sampling`, e.g. `method="ddim", steps=10`.
        """
        return plan_sampling(self.denoiser, **(self.settings | changes))
