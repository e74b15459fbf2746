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
NOT_LOADED = (
    "model.", "item_encoder.blocks.", "item_encoder.pos.", "user_encoder.blocks.",
    "user_encoder.pos.",
)  # fmt: skip
UNUSED = ("emb_mlp.", "diff_mlp.")  # of the diffusion module, by its own forward pass
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
        TypeError, ValueError: not such a file, a key that is missing or unknown, a wrong shape
        or dtype, a noise schedule other than exp and sqrt, no number of timesteps or guidance, in
        one line that names file and key.
    """
    where, content = read_source(source)
    settings = dict(SETTINGS)
    if isinstance(content.get("state_dict"), Mapping):
        settings |= _settings(f"{where}: hyper_parameters", content.get("hyper_parameters"))
        content = content["state_dict"]
    weights = Weights(where, content)
    prefix = "diffusion_net." if weights.any("diffusion_net.") else ""
    denoiser, condition_encoder = diffusion_modules(weights, prefix)
    shape = condition_encoder.positional_embeddings.weight.shape
    decoder = _output_decoder(weights, *shape) if weights.any("output_decoder.") else None
    tokenizers = [
        _tokenizer(weights, own, constant_noise) if weights.any(f"{own}encoders.") else None
        for own in ("item_encoder.", "user_encoder.")
    ]
    weights.finish(*(f"{prefix}{name}" for name in UNUSED), *NOT_LOADED)
    released = Released(denoiser, condition_encoder, decoder, *tokenizers, settings)
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
    tokenizer = _tokenizer(weights, "", constant_noise)
    weights.finish()
    return tokenizer.eval()


def diffusion_modules(
    weights: Weights, prefix: str = ""
) -> tuple[Denoiser, ReleasedConditionEncoder]:
    """The denoiser and the condition encoder of a `Tenc` whose keys begin with `prefix`."""
    if weights.any(f"{prefix}c_remap."):
        raise ValueError(f"{weights.where}: expected ContRec's diffusion network, got DeftRec's")
    dim = weights.shape(f"{prefix}none_embedding.weight")[1]
    if dim < 4 or dim % 2:
        raise ValueError(
            f"{weights.where}: {prefix}none_embedding.weight: expected an even width of at least 4 "
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
    return denoiser, condition_encoder


def _tokenizer(weights: Weights, prefix: str, constant_noise: bool) -> SigmaVAE:
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


def _output_decoder(weights: Weights, positions: int, dim: int) -> ReleasedOutputDecoder:
    prefix = "output_decoder."
    width_in = weights.shape(f"{prefix}dim_block.2.weight")[1]
    tokens = weights.shape(f"{prefix}length_block.3.weight")[1]
    with torch.device("meta"):
        decoder = ReleasedOutputDecoder(tokens, width_in, positions, dim)
    names = {"project": "dim_block.2", "mix": "length_block.0.layers.2"}
    weights.fill(decoder, prefix, names | {"shorten": "length_block.3"})
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
