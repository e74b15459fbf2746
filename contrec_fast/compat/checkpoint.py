"""The diffusion module, tokenizers and output decoder of a released checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from contrec_fast.compat.modules import Released, ReleasedConditionEncoder, ReleasedOutputDecoder
from contrec_fast.compat.state import Weights, read_source
from contrec_fast.models.denoisers import Denoiser, LinearDenoiser, MLPDenoiser
from contrec_fast.models.tokenizer import SigmaVAE
from contrec_fast.names import MAX_STEPS

SETTINGS = {"schedule": "exp", "timesteps": 200, "method": "ddpm", "guidance": 2.0}
FIRST_VERSION = (
    "item_encoder.blocks.", "item_encoder.pos.", "user_encoder.blocks.", "user_encoder.pos.",
)  # fmt: skip
UNUSED = ("emb_mlp.", "diff_mlp.")  # of the diffusion module, by its own forward pass
TOKENIZERS = {"item_tokenizer": "item_encoder.", "user_tokenizer": "user_encoder."}
HYPER_PARAMETERS = {"schedule": "beta_sche", "timesteps": "timesteps", "guidance": "w"}


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
        TypeError, ValueError: not such a file, keys that are missing or unknown, wrong shapes or
        dtypes, a noise schedule other than exp and sqrt, no number of timesteps or guidance, in
        one line that names the file and all such keys.
    """
    where, content = read_source(source)
    state, settings = state_and_settings(where, content)
    weights = Weights(where, state)
    released = released_parts(weights, settings)
    weights.problems.finish()
    if constant_noise:
        add_constant_noise(weights, released)
    return released.eval()


def load_released_tokenizer(
    source: str | Path | Mapping[str, Tensor], constant_noise: bool = True
) -> SigmaVAE:
    """Load a tokenizer that the released code (or DeftRec's `vae.py`) saved on its own.

    Its layers are ours; `fold_batch_norms` makes fewer of them, for inference. What it adds to the
    inputs in training only, `pos.weight`, is left out: `encode` and `decode` are the released
    ones.

    Args:
        source: a .pt, .pth, .ckpt or .safetensors file, or a state dict.
        constant_noise: the release adds one constant vector to every token of a sigma-VAE (the
            product of two numbers drawn from seed 42, not in the state dict), and its language
            model has learned from tokens with it. It becomes a part of the encoders' last
            biases; False leaves it out, which is what the paper describes.

    Raises:
        TypeError, ValueError: as `load_released`.
    """
    weights = Weights(*read_source(source))
    tokenizer = _tokenizer(weights, "")
    weights.close()
    weights.problems.finish()
    if constant_noise and weights.any("pos."):
        _add_constant(tokenizer)
    return tokenizer.eval()


def state_and_settings(where: str, content: Mapping) -> tuple[Mapping[str, Tensor], dict]:
    """The state dict in what was read, and the sampler's settings, in our words."""
    if not isinstance(content.get("state_dict"), Mapping):
        return content, dict(SETTINGS)
    settings = _settings(f"{where}: hyper_parameters", content.get("hyper_parameters"))
    return content["state_dict"], SETTINGS | settings


def released_parts(weights: Weights, settings: dict, whole: bool = False) -> Released:
    """Everything but the language model. Problems are noted, and left for the caller to raise.

    Args:
        whole: a checkpoint has to have every part; otherwise only the diffusion module.
    """
    prefix = "diffusion_net." if whole or weights.any("diffusion_net.") else ""
    denoiser, condition_encoder = diffusion_modules(weights, prefix)
    shape = condition_encoder.positional_embeddings.weight.shape
    decoder = None
    if whole or weights.any("output_decoder."):
        decoder = _output_decoder(weights, *shape)
    tokenizers = {
        name: _tokenizer(weights, start) if whole or weights.any(f"{start}encoders.") else None
        for name, start in TOKENIZERS.items()
    }
    ignored = ("model.",) if whole else ("model.", *FIRST_VERSION)
    weights.close(*(f"{prefix}{name}" for name in UNUSED), *ignored)
    return Released(denoiser, condition_encoder, decoder, settings=settings, **tokenizers)


def add_constant_noise(weights: Weights, released: Released) -> None:
    """To the tokens of sigma-VAEs; see `load_released_tokenizer`."""
    for name, start in TOKENIZERS.items():
        # Only the sigma-VAE has a position; without it this is the release's plain autoencoder.
        tokenizer = getattr(released, name)
        if tokenizer is not None and weights.any(f"{start}pos."):
            _add_constant(tokenizer)


@torch.no_grad()
def _add_constant(tokenizer: SigmaVAE) -> None:
    generator = torch.Generator().manual_seed(42)
    last = [encoder[8] for encoder in tokenizer.encoders]
    # In this order, in float32 and on the CPU, as there.
    epsilon = torch.randn(1, len(last[0].bias), generator=generator, dtype=torch.float32)[0]
    sigma = torch.normal(0.0, 0.1, (1,), generator=generator, dtype=torch.float32)
    for layer in last:
        layer.bias += (sigma * epsilon).to(layer.bias)


def diffusion_modules(
    weights: Weights, prefix: str = ""
) -> tuple[Denoiser, ReleasedConditionEncoder]:
    """The denoiser and the condition encoder of a `Tenc` whose keys begin with `prefix`."""
    if weights.any(f"{prefix}c_remap."):
        raise ValueError(f"{weights.where}: expected ContRec's diffusion network, got DeftRec's")
    tables = [f"{prefix}{name}.weight" for name in ("none_embedding", "positional_embeddings")]
    norms = [(f"{prefix}ln_{i}.weight", 0) for i in (1, 2, 3)]
    dim = weights.size(*((table, 1) for table in tables), *norms)
    if dim < 4 or dim % 2:
        raise ValueError(
            f"{weights.where}: {tables[0]}: expected an even width of at least 4 "
            f"(the released time embedding has no other), got {dim}"
        )
    two_layers = weights.any(f"{prefix}diffuser.2.")
    positions = weights.size((tables[1], 0), ("output_decoder.length_block.3.weight", 0))
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
    return denoiser, condition_encoder


def _tokenizer(weights: Weights, prefix: str) -> SigmaVAE:
    start = f"{prefix}encoders."
    numbers = {key[len(start) :].split(".")[0] for key in weights.left if key.startswith(start)}
    ways = max(1, len(numbers))
    firsts, lasts = ([f"{start}{k}.{layer}.weight" for k in range(ways)] for layer in (0, 8))
    dim = weights.size(*((key, 1) for key in firsts), (f"{prefix}decoder.8.weight", 0))
    hidden = weights.size(*((key, 0) for key in lasts), (f"{prefix}decoder.0.weight", 1))
    with torch.device("meta"):
        tokenizer = SigmaVAE(dim, hidden, ways, sigma=0.1, mask_ratio=0.1, dropout=0.5)
    for layers in (*tokenizer.encoders, tokenizer.decoder):
        layers[7].p = 0.2  # the second dropout, should training go on
    like = weights.tensors.get(firsts[0])
    like = like if isinstance(like, Tensor) else torch.empty(0)
    fixed = {"fill": like.new_zeros(dim), "position": like.new_zeros(ways, dim)}
    weights.fill(tokenizer, prefix, fixed=fixed)
    if weights.any(f"{prefix}pos."):
        weights.take(f"{prefix}pos.weight", (1, dim))
    return tokenizer


def _output_decoder(weights: Weights, positions: int, dim: int) -> ReleasedOutputDecoder:
    prefix, layers = "output_decoder.", ("dim_block.2", "length_block.0.layers.2", "length_block.3")
    project, mix, shorten = (f"{prefix}{layer}.weight" for layer in layers)
    tokens = weights.size((shorten, 1), (mix, 0), (mix, 1))
    with torch.device("meta"):
        decoder = ReleasedOutputDecoder(tokens, weights.size((project, 1)), positions, dim)
    weights.fill(decoder, prefix, dict(zip(("project", "mix", "shorten"), layers)))
    return decoder


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
