"""The untrained model: language model, collaborative vectors, tokenizer, put together."""

import torch
from peft import PeftModel

from contrec_fast.config import Config
from contrec_fast.data.interactions import Dataset
from contrec_fast.data.templates import response_text
from contrec_fast.models.backbone import add_adapters, load_backbone, make_tiny_backbone
from contrec_fast.models.contrec import ContRec, make_tokenizer
from contrec_fast.models.lightgcn import whiten
from contrec_fast.training.pretraining import train_lightgcn, train_tokenizer


def build(
    dataset: Dataset, config: Config, progress, pretrain: bool = True
) -> tuple[ContRec, PeftModel | None]:
    """A model ready for the main training, and the adapters around its language model, if any.

    Args:
        pretrain: off leaves out LightGCN and the tokenizer's training: weights come from a
        checkpoint.
    """
    torch.manual_seed(config.seed)
    backbone, text_tokenizer = _backbone(dataset, config)
    adapters = None
    if config.backbone.lora_rank:
        adapters = add_adapters(backbone, text_tokenizer, config.backbone)
    vectors = torch.zeros(len(dataset.items), config.lightgcn.dim)
    if pretrain:
        advance = progress.stage("LightGCN", config.lightgcn.epochs, "epochs")
        vectors = whiten(train_lightgcn(dataset, config.lightgcn, advance)[1])
    tokenizer = make_tokenizer(config, vectors.shape[1], backbone.config.hidden_size)
    if pretrain:
        advance = progress.stage("Tokenizer", config.tokenizer.epochs, "epochs")
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


def _backbone(dataset: Dataset, config: Config):
    """The configured language model and its tokenizer."""
    if config.backbone.path != "tiny":
        return load_backbone(config.backbone.path)
    items = dataset.items
    texts = [response_text(*pair) for pair in zip(items.titles, items.categories)]
    return make_tiny_backbone(texts, config.backbone)
