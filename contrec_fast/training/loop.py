"""Training from a dataset to a ContRec model."""

import math
import tempfile

import numpy as np
import torch

from contrec_fast.config import Config
from contrec_fast.data.interactions import Dataset
from contrec_fast.data.prompts import Prompts, response_text
from contrec_fast.environment import default_device
from contrec_fast.models.backbone import load_backbone, make_tiny_backbone
from contrec_fast.models.contrec import ContRec, make_tokenizer
from contrec_fast.models.lightgcn import whiten
from contrec_fast.models.schedules import respaced_indices
from contrec_fast.training.pretraining import train_lightgcn, train_tokenizer


def train(dataset: Dataset, config: Config, progress) -> ContRec:
    """Train all stages on a dataset's histories; its held-out targets are not looked at.

    Args:
        progress: shows long work; `progress.stage(name, total)` returns the function that each
        stage calls after every unit of work with the figures to show.

    Raises:
        ValueError: no user has two items, or the configuration does not fit together.
        FloatingPointError: a loss is not finite.
    """
    torch.manual_seed(config.seed)
    if not any(len(history) > 1 for history in dataset.histories):
        raise ValueError("histories: expected a user with at least two items, found none")
    respaced_indices(config.head.timesteps, config.head.steps)  # refused now, not after pretraining
    backbone, text_tokenizer = _backbone(dataset, config)
    advance = progress.stage("LightGCN", config.lightgcn.epochs)
    vectors = whiten(train_lightgcn(dataset, config.lightgcn, advance)[1])

    tokenizer = make_tokenizer(config, vectors.shape[1], backbone.config.hidden_size)
    advance = progress.stage("Tokenizer", config.tokenizer.epochs)
    report = train_tokenizer(tokenizer, vectors, config.tokenizer, advance)
    progress.say(f"tokenizer keeps {report['explained']:.0%} of the variance of the item vectors")
    with torch.no_grad():
        tokens = tokenizer.encode(vectors)
        # Continuous tokens enter at the scale of the text embeddings beside them.
        text_scale = backbone.get_input_embeddings().weight.square().mean().sqrt()
        tokens *= text_scale / tokens.square().mean().sqrt().clamp(min=1e-12)
    model = ContRec(config, backbone, text_tokenizer, tokenizer, vectors, tokens)
    model.to(default_device())
    _train_model(model, dataset, config, progress)
    return model.eval()


def _backbone(dataset: Dataset, config: Config):
    """The configured language model; a tiny one goes through a folder like any other."""
    if config.backbone.path != "tiny":
        return load_backbone(config.backbone.path)
    items = dataset.items
    texts = [response_text(*pair) for pair in zip(items.titles, items.categories)]
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_backbone(texts, config.backbone, folder)
        return load_backbone(folder)


def _train_model(model: ContRec, dataset: Dataset, config: Config, progress) -> None:
    t = config.training
    prompts = Prompts(dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt)
    rng = np.random.default_rng(config.seed)
    per_epoch = len(_batches(dataset, config, np.random.default_rng(config.seed)))
    total = t.epochs * per_epoch
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, t.learning_rate, weight_decay=t.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_cosine(step, min(t.warmup_steps, total // 2), total)
    )
    weights = {
        "diffusion": t.diffusion_weight,
        "dispersive": t.dispersive_weight,
        "ranking": t.ranking_weight,
        "text": t.text_weight,
    }
    advance = progress.stage("ContRec", t.epochs)
    model.train()
    for epoch in range(t.epochs):
        sums, users = dict.fromkeys(weights, 0.0), 0
        for windows in _batches(dataset, config, rng):
            batch = prompts.training_batch(windows).to(model.item_vectors.device)
            losses = model.losses(batch)
            loss = sum(weights[name] * value for name, value in losses.items())
            if not math.isfinite(loss.item()):
                got = loss.item()
                raise FloatingPointError(f"epoch {epoch + 1}: expected a finite loss, got {got}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, t.clip_norm)
            optimizer.step()
            schedule.step()
            users += len(windows)
            for name, value in losses.items():
                sums[name] += value.item() * len(windows)
        advance(**{name: value / users for name, value in sums.items()})


def _batches(dataset: Dataset, config: Config, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """One epoch: histories cut into windows of at most `history` + 1 items, in batches.

    They cover every history; where a long one is cut is random, except that its last window
    ends with it. Windows of similar length share a batch, which saves padding.
    """
    size = config.prompt.history
    windows = []
    for history in dataset.histories:
        parts = math.ceil((len(history) - 1) / size)
        shift = int(rng.integers(max(parts * size - len(history) + 2, 1)))
        for part in range(parts):
            end = len(history) - part * size + (shift if part else 0)
            windows.append(history[max(0, end - size - 1) : end])
    order = rng.permutation(len(windows))
    chunk = 16 * config.training.batch_size
    batches = []
    for start in range(0, len(order), chunk):
        near = sorted(order[start : start + chunk], key=lambda i: len(windows[i]))
        for first in range(0, len(near), config.training.batch_size):
            batches.append([windows[i] for i in near[first : first + config.training.batch_size]])
    return [batches[i] for i in rng.permutation(len(batches))]


def _warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
