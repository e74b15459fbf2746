"""The untrained model: language model, collaborative vectors, tokenizer, put together."""

import torch
from peft import PeftModel

from contrec_fast.config import Config
from contrec_fast.data.interactions import Dataset
from contrec_fast.data.templates import response_text
from contrec_fast.models.backbone import add_adapters, load_backbone, make_tiny_backbone
from contrec_fast.models.contrec import ContRec, make_tokenizer
from contrec_fast.models.lightgcn import whiten
from contrec_fast.models.schedules import respaced_indices
from contrec_fast.training.pretraining import train_lightgcn, train_tokenizer


def build(
    dataset: Dataset, config: Config, progress, pretrain: bool = True
) -> tuple[ContRec, PeftModel | None]:
    """A model ready for the main training, and the adapters around its language model, if any.

    Args:
        pretrain: off leaves out LightGCN and the tokenizer's training: weights come from a
        checkpoint.

    Raises:
        ValueError: settings that contradict one another, before anything is trained.
    """
    _require_fit(config)
    torch.manual_seed(config.seed)
    backbone, text_tokenizer = _backbone(dataset, config)
    adapters = None
    if config.backbone.lora_rank:
        adapters = add_adapters(backbone, text_tokenizer, config.backbone)
    vectors = torch.zeros(len(dataset.items), config.lightgcn.dim)
    if pretrain:
        advance = progress.stage("LightGCN", config.lightgcn.epochs)
        vectors = whiten(train_lightgcn(dataset, config.lightgcn, advance)[1])
    tokenizer = make_tokenizer(config, vectors.shape[1], backbone.config.hidden_size)
    if pretrain:
        advance = progress.stage("Tokenizer", config.tokenizer.epochs)
        report = train_tokenizer(tokenizer, vectors, config.tokenizer, advance)
        progress.say(
            f"tokenizer keeps {report['explained']:.0%} of the variance of the item vectors; "
            f"effective rank {report['rank']:.0f} of tokens, {report['rank_of_vectors']:.0f} of "
            "vectors"
        )
    model = ContRec(config, backbone, text_tokenizer, tokenizer, vectors, dataset)
    if pretrain:
        model.calibrate()
    return model, adapters


def _require_fit(config: Config) -> None:
    head, reads_text = config.head, config.prompt.text != "none"
    respaced_indices(head.timesteps, head.steps)
    if head.source == "response" and not reads_text:
        raise ValueError("head.source: expected 'hidden' where prompt.text is 'none'")
    if head.space == "tokenizer" and config.tokenizer.kind == "residual-quantizer":
        raise ValueError("head.space: expected 'item' with discrete tokens, got 'tokenizer'")
    losses = ["ranking", "bpr"] + ["diffusion", "dispersive", "contrastive"] * head.diffusion
    weights = [f"{name}_weight" for name in losses + ["text"] * reads_text]
    if not any(getattr(config.training, weight) for weight in weights):
        raise ValueError(f"training: expected one of {', '.join(weights)} above 0, got none")


def _backbone(dataset: Dataset, config: Config):
    """The configured language model and its tokenizer."""
    if config.backbone.path != "tiny":
        return load_backbone(config.backbone.path)
    items = dataset.items
    texts = [response_text(*pair) for pair in zip(items.titles, items.categories)]
    return make_tiny_backbone(texts, config.backbone)
