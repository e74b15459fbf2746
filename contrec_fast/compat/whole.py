"""A whole released checkpoint: the language model and everything around it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from contrec_fast.compat.backbone import BackboneCheckpoint
from contrec_fast.compat.checkpoint import add_constant_noise, released_parts, state_and_settings
from contrec_fast.compat.modules import Released
from contrec_fast.compat.prediction import Predictor, item_tokens, user_tokens
from contrec_fast.compat.state import Weights, read_source
from contrec_fast.models.backbone import load_language_model, load_text_tokenizer
from contrec_fast.models.tokenizer import fold_batch_norms


def load_released_checkpoint(
    source: str | Path | Mapping,
    base: str | Path,
    constant_noise: bool = True,
    lora_alpha: float = 32,
) -> "ReleasedModel":
    """Load a whole Lightning checkpoint of the released code; all sizes are read from its tensors.

    Args:
        source: a .pt, .pth, .ckpt or .safetensors file, or what `torch.load` makes of one: the
            checkpoint, or the state dict in it (then with the release's default settings).
        base: folder of the causal LM that was adapted, with its text tokenizer.
        constant_noise: see `load_released_tokenizer`.
        lora_alpha: see `load_released_backbone`.

    Returns:
        The model in eval mode on the CPU, adapters merged, BatchNorm folded; the language model
        in float32, the rest in the checkpoint's dtype.

    Raises:
        TypeError, ValueError: as `load_released`, in one line that names all keys of the whole
        checkpoint that are missing, unknown or of a wrong shape or dtype.
    """
    where, content = read_source(source)
    state, settings = state_and_settings(where, content)
    weights = Weights(where, state)
    released = released_parts(weights, settings, whole=True)
    language_model, text_tokenizer = load_language_model(base), load_text_tokenizer(base)
    checkpoint = BackboneCheckpoint(state, language_model, weights.problems)
    ways = len(released.item_tokenizer.encoders)
    text_tokenizer.add_tokens(["<diff>", "<\\diff>", *item_tokens(ways), *user_tokens(ways)])
    if not weights.problems:  # or sizes may be made up
        width = language_model.get_input_embeddings().embedding_dim
        rows, project = len(text_tokenizer), released.output_decoder.project
        _compare(weights, "the embeddings' rows", checkpoint.rows or rows, rows)
        _compare(weights, "output_decoder's width", project.in_features, width)
        for name in ("item", "user"):
            encoders = getattr(released, f"{name}_tokenizer").encoders
            sizes = encoders[0][0].in_features, len(encoders), encoders[0][-1].out_features
            expected = released.denoiser.dim, ways, width
            _compare(weights, f"{name}_encoder's dimension, tokens and width", sizes, expected)
    weights.problems.finish()
    if constant_noise:
        add_constant_noise(weights, released)
    checkpoint.load(lora_alpha)
    language_model.generation_config.eos_token_id = _ends(base, language_model)
    return ReleasedModel(released, language_model, text_tokenizer).eval()


def _ends(base: str | Path, language_model: PreTrainedModel) -> int | list[int] | None:
    """The tokens that end a text for transformers' `generate`, of the folder's settings."""
    try:
        return GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:  # there are none
        return GenerationConfig.from_model_config(language_model.config).eos_token_id


def _compare(weights: Weights, what: str, got, expected) -> None:
    if got != expected:
        weights.problems.wrong.append(f"{what}: expected {expected}, got {got}")


class ReleasedModel(Released):
    """What `load_released_checkpoint` found: a `Released` with its language model.

    Attributes:
        language_model: a plain Hugging Face causal LM. text_tokenizer: its tokenizer, which knows
        the release's tokens. The rest: see `Released`; nothing of it is None.
    """

    def __init__(
        self,
        released: Released,
        language_model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
    ):
        tokenizers = released.item_tokenizer, released.user_tokenizer
        super().__init__(
            released.denoiser,
            released.condition_encoder,
            released.output_decoder,
            *map(fold_batch_norms, tokenizers),
            released.settings,
        )
        self.language_model, self.text_tokenizer = language_model, text_tokenizer

    def predictor(
        self, item_vectors: Tensor, user_vectors: Tensor | None = None, measure: str = "mse"
    ) -> Predictor:
        """From prompts to top-K lists over these items; see `Predictor`.

        Args:
            item_vectors: [N, D], the release's `item_embeds` (LightGCN's `embedding_item.weight`).
            user_vectors: [U, D], its `user_embeds`, for prompts with a user's tokens.
            measure: how items are ranked, its `--eval`: "mse" (by Euclidean distance, there the
                default), "inner" (product) or "cos".

        Raises:
            TypeError, ValueError: see `Predictor`.
        """
        return Predictor(self, item_vectors, user_vectors, measure)
