"""What is trained before the model: collaborative vectors, then the tokenizer on them."""

import numpy as np
import torch
from torch import Tensor

from contrec_fast.config import LightGCNConfig, TokenizerConfig
from contrec_fast.data.interactions import Dataset
from contrec_fast.environment import default_device
from contrec_fast.models.lightgcn import LightGCN
from contrec_fast.models.quantizer import ResidualQuantizer
from contrec_fast.models.tokenizer import SigmaVAE, collapse_report

REPORT_ROWS = 8192  # tokens are as wide as the language model, times K


def train_lightgcn(dataset: Dataset, config: LightGCNConfig, advance) -> tuple[Tensor, Tensor]:
    """Fit LightGCN by BPR with uniform negatives on the histories, on the GPU where there is one.

    Args:
        advance: called as `advance(loss=float)` after each epoch.

    Returns:
        Propagated vectors of users [U, D] and of items [N, D], on the CPU.
    """
    lengths = [len(history) for history in dataset.histories]
    user = np.repeat(np.arange(len(lengths)), lengths)
    pairs = np.unique(np.stack([user, np.concatenate(dataset.histories)], axis=1), axis=0)
    items = len(dataset.items)
    device = default_device()
    model = LightGCN(pairs, len(lengths), items, config.dim, config.layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    pairs = torch.from_numpy(pairs)
    for _ in range(config.epochs):
        total = 0.0
        for part in torch.randperm(len(pairs)).split(config.batch_size):
            user, item = pairs[part].T
            negative = torch.randint(items, item.shape)
            triples = [ids.to(device) for ids in (user, item, negative)]
            loss = model.bpr_loss(*triples, config.weight_decay)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
        advance(loss=total / len(pairs))
    with torch.no_grad():
        users, items = model()
    return users.cpu().clone(), items.cpu().clone()


def train_tokenizer(
    tokenizer: SigmaVAE | ResidualQuantizer, vectors: Tensor, config: TokenizerConfig, advance
) -> dict[str, float]:
    """Fit a tokenizer to item vectors [N, D], on the GPU where there is one.

    Args:
        tokenizer: moved to the CPU and into evaluation mode in the end.
        advance: called as `advance(loss=float)` after each of `config.epochs` passes.

    Returns:
        `collapse_report` of the vectors, of at most `REPORT_ROWS` of them.
    """
    device = default_device()
    tokenizer.to(device)
    vectors = vectors.to(device)
    some = vectors[:: -(-len(vectors) // REPORT_ROWS)]
    if isinstance(tokenizer, ResidualQuantizer):
        tokenizer.fit(vectors, config.epochs, advance)
        reconstruction = tokenizer.quantise(some)
    else:
        _fit_sigma_vae(tokenizer, vectors, config, advance)
        with torch.no_grad():
            reconstruction = tokenizer.decode(tokenizer.encode(some))
    report = collapse_report(tokenizer.encode(some), some, reconstruction)
    tokenizer.cpu()
    return report


def _fit_sigma_vae(tokenizer: SigmaVAE, vectors: Tensor, config: TokenizerConfig, advance) -> None:
    optimizer = torch.optim.AdamW(tokenizer.parameters(), config.learning_rate)
    tokenizer.train()
    for _ in range(config.epochs):
        total = 0.0
        for part in torch.randperm(len(vectors)).split(config.batch_size):
            if len(part) < 2:  # batch norm and correlations need two rows
                continue
            parts = tokenizer.losses(vectors[part.to(vectors.device)])
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
