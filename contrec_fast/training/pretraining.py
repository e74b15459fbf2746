"""What is trained before the model: collaborative vectors, then the tokenizer on them."""

import numpy as np
import torch
from torch import Tensor

from contrec_fast.config import LightGCNConfig, TokenizerConfig
from contrec_fast.data.interactions import Dataset
from contrec_fast.models.lightgcn import LightGCN
from contrec_fast.models.tokenizer import SigmaVAE


def train_lightgcn(dataset: Dataset, config: LightGCNConfig, advance) -> Tensor:
    """Fit LightGCN by BPR with uniform negatives on the histories.

    Args:
        advance: called as `advance(loss=float)` after each epoch.

    Returns:
        Propagated item vectors [N, D].
    """
    lengths = [len(history) for history in dataset.histories]
    user = np.repeat(np.arange(len(lengths)), lengths)
    pairs = np.unique(np.stack([user, np.concatenate(dataset.histories)], axis=1), axis=0)
    items = len(dataset.items)
    model = LightGCN(pairs, len(lengths), items, config.dim, config.layers)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    pairs = torch.from_numpy(pairs)
    for _ in range(config.epochs):
        total = 0.0
        for part in torch.randperm(len(pairs)).split(config.batch_size):
            user, item = pairs[part].T
            negative = torch.randint(items, item.shape)
            loss = model.bpr_loss(user, item, negative, config.weight_decay)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
        advance(loss=total / len(pairs))
    with torch.no_grad():
        return model()[1].clone()


def train_tokenizer(
    tokenizer: SigmaVAE, vectors: Tensor, config: TokenizerConfig, advance
) -> float:
    """Fit the sigma-VAE to item vectors [N, D].

    Returns:
        The share of the vectors' variance that encoding and decoding keeps.
    """
    optimizer = torch.optim.AdamW(tokenizer.parameters(), config.learning_rate)
    tokenizer.train()
    for _ in range(config.epochs):
        total = 0.0
        for part in torch.randperm(len(vectors)).split(config.batch_size):
            if len(part) < 2:  # batch norm and correlations need two rows
                continue
            parts = tokenizer.losses(vectors[part])
            loss = (
                parts["reconstruction"]
                + config.mean_weight * parts["mean"]
                + config.redundancy_weight * parts["redundancy"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
        advance(loss=total / len(vectors))
    tokenizer.eval()
    with torch.no_grad():
        error = (tokenizer.decode(tokenizer.encode(vectors)) - vectors).square().mean()
    return 1 - float(error / vectors.var(0, correction=0).mean().clamp(min=1e-12))
