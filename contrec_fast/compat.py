"""Checkpoints of the released ContRec code (github.com/Quhaoh233/ContRec), in our modules.

`load_released` takes the diffusion module (`DreamRec.Tenc` there), alone or in a Lightning
checkpoint, `load_released_tokenizer` a tokenizer's own file. Nothing in a file is executed:
pickles are read with `weights_only=True`.

    released = load_released("last.ckpt")
    condition = released.condition_encoder(states)
    vectors = released.plan()(condition, seed=0)

The language model (`model.`) is not loaded, nor what the release never uses (`emb_mlp`,
`diff_mlp`) and the tokenizers of its first version and of DeftRec (`blocks.`), which are another
architecture. DeftRec's diffusion network is another one, too, and is refused; the tokenizers
that it trains on their own (its `vae.py`) load. Dropout is left out, as in inference.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from contrec_fast.models.condition import ConditionEncoder
from contrec_fast.models.denoisers import Denoiser, LinearDenoiser, MLPDenoiser
from contrec_fast.models.tokenizer import SigmaVAE
from contrec_fast.names import MAX_STEPS
from contrec_fast.ops.checks import FLOATS, check
from contrec_fast.ops.sampling import SamplingPlan, plan_sampling

PICKLES = (".pt", ".pth", ".ckpt")
SETTINGS = {"schedule": "exp", "timesteps": 200, "method": "ddpm", "guidance": 2.0}
NOT_LOADED = (
    "model.", "item_encoder.blocks.", "item_encoder.pos.", "user_encoder.blocks.",
    "user_encoder.pos.",
)  # fmt: skip
HYPER_PARAMETERS = {"schedule": "beta_sche", "timesteps": "timesteps", "guidance": "w"}


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


def load_released(
    source: str | Path | Mapping[str, Tensor], constant_noise: bool = True
) -> Released:
    """Load the diffusion module of the released code, and what comes with it.

    Args:
        source: a .pt, .pth, .ckpt or .safetensors file, or what `torch.load` makes of one: the
            state dict of `Tenc`, or a Lightning checkpoint (or the state dict in it), of which
            the tokenizers, the output decoder and the sampler's settings are taken, too.
        constant_noise: see `load_released_tokenizer`.

    Returns:
        Copies of the weights in their dtype on their device (a file's: the CPU), in eval mode.

    Raises:
        TypeError, ValueError: not such a file, a key that is missing or unknown, a wrong shape
        or dtype, a noise schedule other than exp and sqrt, no number of timesteps or guidance, in
        one line that names file and key.
    """
    where, content = _read(source)
    settings = dict(SETTINGS)
    if isinstance(content.get("state_dict"), Mapping):
        settings |= _settings(f"{where}: hyper_parameters", content.get("hyper_parameters"))
        content = content["state_dict"]
    weights = _Weights(where, content)
    prefix = "diffusion_net." if weights.any("diffusion_net.") else ""
    if weights.any(f"{prefix}c_remap."):
        raise ValueError(f"{where}: expected ContRec's diffusion network, got DeftRec's")
    dim = weights.shape(f"{prefix}none_embedding.weight")[1]
    if dim < 4 or dim % 2:
        raise ValueError(
            f"{where}: {prefix}none_embedding.weight: expected an even width of at least 4 "
            f"(the released time embedding has no other), got {dim}"
        )
    two_layers = weights.any(f"{prefix}diffuser.2.")
    positions = weights.shape(f"{prefix}positional_embeddings.weight")[0]
    with torch.device("meta"):  # no memory and no random numbers for what is filled next
        denoiser = MLPDenoiser(dim) if two_layers else LinearDenoiser(dim)
        condition_encoder = ReleasedConditionEncoder(dim, positions)
    names = {
        "null_condition": "none_embedding.weight",
        "time_embedding.expand": "step_mlp.1",
        "time_embedding.contract": "step_mlp.3",
        "hidden": "diffuser.0",
        "output": "diffuser.2" if two_layers else "diffuser.0",
    }
    weights.fill(denoiser, prefix, names)
    weights.fill(condition_encoder, prefix)
    decoder = _output_decoder(weights, positions, dim) if weights.any("output_decoder.") else None
    tokenizers = [
        _tokenizer(weights, own, constant_noise) if weights.any(f"{own}encoders.") else None
        for own in ("item_encoder.", "user_encoder.")
    ]
    weights.finish(f"{prefix}emb_mlp.", f"{prefix}diff_mlp.", *NOT_LOADED)
    released = Released(denoiser, condition_encoder, decoder, *tokenizers, settings)
    return released.eval()


def load_released_tokenizer(
    source: str | Path | Mapping[str, Tensor], constant_noise: bool = True
) -> SigmaVAE:
    """Load a tokenizer that the released code (or DeftRec's `vae.py`) saved on its own.

    Its layers are ours. What it adds to the inputs in training only, `pos.weight`, is left out:
    `encode` and `decode` are the released ones.

    Args:
        source: a .pt, .pth, .ckpt or .safetensors file, or a state dict.
        constant_noise: the release adds one constant vector to every token of a sigma-VAE (the
            product of two numbers drawn from seed 42, not in the state dict), and its language
            model has learned from tokens with it. It becomes a part of the encoders' last
            biases; False leaves it out, which is what the paper describes.

    Raises:
        TypeError, ValueError: as `load_released`.
    """
    weights = _Weights(*_read(source))
    tokenizer = _tokenizer(weights, "", constant_noise)
    weights.finish()
    return tokenizer.eval()


def _tokenizer(weights: "_Weights", prefix: str, constant_noise: bool) -> SigmaVAE:
    start = f"{prefix}encoders."
    ways = {key.removeprefix(start).split(".")[0] for key in weights.left if key.startswith(start)}
    dim = weights.shape(f"{start}0.0.weight")[1]
    hidden = weights.shape(f"{start}0.8.weight")[0]
    with torch.device("meta"):
        tokenizer = SigmaVAE(dim, hidden, len(ways), sigma=0.1, mask_ratio=0.1, dropout=0.5)
    for layers in (*tokenizer.encoders, tokenizer.decoder):
        layers[7].p = 0.2  # the second dropout, should training go on
    like = weights.tensors[f"{start}0.0.weight"]
    fixed = {"fill": like.new_zeros(dim), "position": like.new_zeros(len(ways), dim)}
    weights.fill(tokenizer, prefix, fixed=fixed)
    # Only the sigma-VAE has a position; without it this is the release's plain autoencoder.
    if weights.any(f"{prefix}pos."):
        weights.take(f"{prefix}pos.weight", (1, dim))
        if constant_noise:
            generator = torch.Generator().manual_seed(42)
            # In this order, in float32 and on the CPU, as there.
            epsilon = torch.randn(1, hidden, generator=generator, dtype=torch.float32)[0]
            sigma = torch.normal(0.0, 0.1, (1,), generator=generator, dtype=torch.float32)
            with torch.no_grad():
                for encoder in tokenizer.encoders:
                    encoder[8].bias += (sigma * epsilon).to(like)
    return tokenizer


def _output_decoder(weights: "_Weights", positions: int, dim: int) -> ReleasedOutputDecoder:
    prefix = "output_decoder."
    width_in = weights.shape(f"{prefix}dim_block.2.weight")[1]
    tokens = weights.shape(f"{prefix}length_block.3.weight")[1]
    with torch.device("meta"):
        decoder = ReleasedOutputDecoder(tokens, width_in, positions, dim)
    names = {"project": "dim_block.2", "mix": "length_block.0.layers.2"}
    weights.fill(decoder, prefix, names | {"shorten": "length_block.3"})
    return decoder


class _Weights:
    """A released state dict, of which every key is used or known to be ignored.

    Args:
        where: first words of every error, the file.
    """

    def __init__(self, where: str, tensors: Mapping[str, Tensor]):
        self.where, self.tensors = where, {str(key): value for key, value in tensors.items()}
        self.left = set(self.tensors)
        self.dtype = None  # of all weights, once the first is known

    def any(self, start: str) -> bool:
        """Whether a key starts so."""
        return any(key.startswith(start) for key in self.tensors)

    def shape(self, key: str) -> torch.Size:
        """Of a matrix."""
        self._require(key)
        check(f"{self.where}: {key}", self.tensors[key], ("rows", "columns"), FLOATS)
        return self.tensors[key].shape

    def take(self, key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this key, which has to have this shape, and the dtype of all others."""
        self._require(key)
        tensor = self.tensors[key]
        dtypes = (dtype,) if dtype else (self.dtype,) if self.dtype else FLOATS
        check(f"{self.where}: {key}", tensor, shape, dtypes)
        self.dtype = self.dtype or tensor.dtype
        self.left.discard(key)
        return tensor

    def fill(
        self,
        module: nn.Module,
        prefix: str,
        names: Mapping[str, str] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put copies of the weights into a module without storage.

        Args:
            names: the released name of each layer, where it is another one. fixed: values of
            what the release does not have.
        """
        values = dict(fixed or {})
        for name, own in module.state_dict().items():
            if name in values:
                continue
            key, shape = name, tuple(own.shape)
            for ours, theirs in (names or {}).items():
                if f"{name}.".startswith(f"{ours}."):
                    key = theirs + name.removeprefix(ours)
            if name == "null_condition":
                shape = (1, *shape)
            elif name.endswith(("w_1.weight", "w_2.weight")):
                shape = (*shape, 1)  # convolutions of width 1 there
            counter = None if own.dtype.is_floating_point else own.dtype
            values[name] = self.take(prefix + key, shape, counter).reshape(own.shape).clone()
        module.load_state_dict(values, assign=True)

    def finish(self, *ignored: str) -> None:
        """Refuse keys that were neither taken nor start with one of `ignored`."""
        left = sorted(key for key in self.left if not key.startswith(ignored))
        if left:
            raise ValueError(f"{self.where}: expected the released keys only, got {left[0]}")

    def _require(self, key: str) -> None:
        if key not in self.tensors:
            raise ValueError(f"{self.where}: expected the key {key}, got a state dict without it")


def _settings(where: str, hyper_parameters: Mapping | None) -> dict:
    """What a Lightning checkpoint says about the sampler, in our words."""
    if hyper_parameters is None:
        return {}
    if not isinstance(hyper_parameters, Mapping):
        kind = type(hyper_parameters).__name__
        raise TypeError(f"{where}: expected a mapping, got {kind}")
    settings = {
        ours: hyper_parameters[theirs]
        for ours, theirs in HYPER_PARAMETERS.items()
        if theirs in hyper_parameters
    }
    if settings.get("schedule", "exp") not in ("exp", "sqrt"):
        # "linear" and "cosine" are not quite ours: no scaling with T, another greatest beta.
        raise ValueError(f"{where}: beta_sche: expected exp or sqrt, got {settings['schedule']!r}")
    steps, w = ((SETTINGS | settings)[name] for name in ("timesteps", "guidance"))
    if not isinstance(steps, int) or not 1 <= steps < MAX_STEPS:
        raise ValueError(f"{where}: timesteps: expected 1 to {MAX_STEPS - 1}, got {steps!r}")
    if not isinstance(w, (int, float)) or not abs(w) < float("inf"):
        raise ValueError(f"{where}: w: expected a finite number, got {w!r}")
    return settings


def _read(source: str | Path | Mapping) -> tuple[str, Mapping]:
    """Name and content of what was given; a file's tensors are on the CPU."""
    if isinstance(source, Mapping):
        return "source", source
    if not isinstance(source, (str, Path)):
        kind = type(source).__name__
        raise TypeError(f"source: expected a path or a state dict, got {kind}")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got nothing")
    if path.suffix == ".safetensors":
        try:
            return str(path), load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file, got: {error}") from None
    if path.suffix not in PICKLES:
        kinds = ", ".join(PICKLES)
        raise ValueError(f"{path}: expected {kinds} or .safetensors, got {path.suffix!r}")
    try:
        # Mapped, so that the language model in a checkpoint is not read; not the old format.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        got = code[1] if code else f"a damaged file ({type(error).__name__})"
        raise ValueError(
            f"{path}: expected tensors and plain values (torch.load, weights_only), got {got}"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    return str(path), content
