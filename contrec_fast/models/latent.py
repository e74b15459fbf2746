"""What follows the language model: hidden states to conditions, samples to vectors of items."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from contrec_fast.config import Config, load_config
from contrec_fast.models.condition import ConditionEncoder
from contrec_fast.models.diffusion import DiffusionHead
from contrec_fast.models.quantizer import ResidualQuantizer
from contrec_fast.models.tokenizer import SigmaVAE

SAVED = ("condition.", "bag.", "head.", "tokenizer.", "token_rms", "item_vectors")


class LatentPath(nn.Module):
    """The latent half of a `ContRec`, which is one; `load_latent_path` reads it alone.

    Attributes:
        config: of the model. condition: hidden states to conditions. bag: sums over histories to
        what is added to conditions, or None. head: the `DiffusionHead`. item_vectors: [N, D].
        tokenizer, token_rms: needed where `head.space` is not "item".
    """

    def add_head(self, width: int) -> None:
        """Make condition, bag and head for hidden states of this width; the rest is there."""
        head, dim = self.config.head, self.item_vectors.shape[1]
        head_dim = dim if head.space == "item" else self.config.tokenizer.tokens * width
        self.bag = None
        if head.source == "response":
            positions = self.config.prompt.response_tokens
            self.condition = ConditionEncoder(width, head_dim, positions)
        else:
            self.condition = nn.Linear(width, head_dim)
            self.bag = nn.Linear(dim, head_dim, bias=False) if head.bag else None
        self.head = DiffusionHead(head_dim, head)

    def project(self, hidden: Tensor, bags: Tensor | None) -> Tensor:
        """Hidden states [P, H], and bags [P, D] if the model has any, to conditions [P, D]."""
        condition = self.condition(hidden)
        return condition if self.bag is None else condition + self.bag(bags)

    def sums(
        self, items: Tensor, offsets: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums of item vectors [B, D] over histories, and the number of items in each [B].

        Args:
            items: [M] all histories' items. offsets: [B] where each begins. weights: [M] factors.
        """
        total = torch.full_like(offsets, len(items))
        number = torch.cat([offsets[1:], total[:1]]) - offsets
        vectors = self.item_vectors
        return F.embedding_bag(
            items, vectors, offsets, mode="sum", per_sample_weights=weights
        ), number

    def to_item_space(self, y: Tensor) -> Tensor:
        """What the head sampled, [..., D of the head], to vectors [..., D] of item space."""
        if self.config.head.space == "item":
            return y
        codes = (y * self.token_rms).flatten(0, -2).unflatten(1, (self.config.tokenizer.tokens, -1))
        return self.tokenizer.decode(codes).unflatten(0, y.shape[:-1])


def make_tokenizer(config: Config, dim: int, width: int) -> SigmaVAE | ResidualQuantizer:
    """An untrained tokenizer of the configured kind, D to K tokens of the backbone's width."""
    c = config.tokenizer
    if c.kind == "residual-quantizer":
        return ResidualQuantizer(dim, width, c.tokens, c.codes)
    return SigmaVAE(dim, width, c.tokens, c.sigma, c.mask_ratio, c.dropout)


def saved_config(path: Path, *others: str) -> Config:
    """The configuration in the folder of a trained model.

    Raises:
        ValueError: not such a folder, or one of the other files is missing, in one line.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: expected the folder of a trained model, found none")
    for name in ("config.yaml", "model.safetensors", *others):
        if not (path / name).exists():
            raise ValueError(f"{path}: expected a trained model, found no {name}")
    return load_config(path / "config.yaml")


def load_latent_path(folder: str | Path) -> LatentPath:
    """Read the latent half of what `ContRec.save_pretrained` wrote; the rest is not looked at.

    Raises:
        ValueError: a file is missing or does not fit, or conditions come from the response
        (`head.source`) instead of a hidden state, in one line that names the file.
    """
    folder = Path(folder)
    config = saved_config(folder)
    if config.head.source != "hidden":
        raise ValueError(
            f"{folder / 'config.yaml'}: head.source: expected hidden, got {config.head.source}"
        )
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys() if name.startswith(SAVED)}
        latent, width = LatentPath(), state["condition.weight"].shape[1]
        latent.config = config
        latent.item_vectors = nn.Parameter(state["item_vectors"], requires_grad=False)
        latent.tokenizer = make_tokenizer(config, latent.item_vectors.shape[1], width)
        latent.register_buffer("token_rms", torch.ones(()))
        latent.add_head(width)
        latent.load_state_dict(state)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'model.safetensors'}: does not fit: {reason}") from None
    return latent.requires_grad_(False).eval()
