"""The language model: any Hugging Face causal LM folder, or a tiny one made on the spot."""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from contrec_fast.config import BackboneConfig
from contrec_fast.data.prompts import CLOSE, OPEN
from contrec_fast.data.templates import TEMPLATES


def make_tiny_backbone(texts: Iterable[str], config: BackboneConfig):
    """An untrained Qwen3 of the given sizes with a byte-level BPE tokenizer of its own.

    Args:
        texts: what the tokenizer is trained on (titles, categories). Uses torch's global random
        state.

    Returns:
        (model in float32, tokenizer).
    """
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=["<pad>", "<eos>", OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeated, so that the words of every prompt become single tokens.
    fixed = [text for template in TEMPLATES for text in template] * 100
    pieces.train_from_iterator([*fixed, *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=[OPEN, CLOSE],
        padding_side="left",
    )
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            head_dim=config.hidden // config.heads,
            max_position_embeddings=4096,
            initializer_range=0.05,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    return model, tokenizer


def load_language_model(path: str | Path):
    """Load the model of a causal LM folder, in float32.

    Raises:
        ValueError: not the folder of a causal LM with all of its weights.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path}: expected a Hugging Face model folder, found no config.json")
    # Whatever a checkpoint was stored in: small updates vanish in 16-bit weights.
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, found = _read(path, AutoModelForCausalLM, **options)
    if found["missing_keys"]:  # which would be made up
        missing = min(found["missing_keys"])
        raise ValueError(f"{path}: expected all weights of a causal LM, found no {missing}")
    return model


def _read(path: str | Path, kind: type, **options):
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # of any kind: a folder holds many formats
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected a causal language model, got: {reason}") from None


def load_text_tokenizer(path: str | Path):
    """Load the tokenizer of a causal LM folder; without a padding token it pads with its end.

    Raises:
        ValueError: not such a folder, or its tokenizer cannot end a text.
    """
    tokenizer = _read(path, AutoTokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: expected a tokenizer with an end-of-text token, found none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(path: str | Path):
    """Load a causal LM folder and make sure it knows `<diff>` and `</diff>`.

    The folder's settings of generation are left out: responses are what greedy decoding writes,
    without a penalty or a ban, as in training.

    Returns:
        (model in float32, tokenizer).

    Raises:
        ValueError: not the folder of a causal LM with all of its weights, or its tokenizer cannot
        end a text.
    """
    model, tokenizer = load_language_model(path), load_text_tokenizer(path)
    model.generation_config = GenerationConfig()
    if tokenizer.add_tokens([OPEN, CLOSE], special_tokens=True):
        table = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > table:
            model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def add_adapters(model, text_tokenizer, config: BackboneConfig) -> PeftModel:
    """Freeze a causal LM but for low-rank adapters (LoRA, arXiv 2106.09685), in place.

    All linear layers get one; the embeddings of `<diff>` and `</diff>`, which no checkpoint
    knows, learn as well. `.merge_and_unload()` of what is returned gives back a plain model.
    """
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        trainable_token_indices=text_tokenizer.convert_tokens_to_ids([OPEN, CLOSE]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)
