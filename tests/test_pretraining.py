"""LightGCN and both tokenizers trained on made-up data; reports of collapsed and healthy tokens."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import small_shop

from contrec_fast.config import LightGCNConfig, TokenizerConfig
from contrec_fast.models.quantizer import ResidualQuantizer
from contrec_fast.models.tokenizer import SigmaVAE, collapse_report, effective_rank
from contrec_fast.training import pretraining
from contrec_fast.training.pretraining import train_lightgcn, train_tokenizer

REPORTED = ["explained", "rank", "rank_of_vectors", "redundancy", "active"]


def test_lightgcn_learns_whom_to_prefer():
    shop, losses = small_shop(), []
    config = LightGCNConfig(dim=16, epochs=40, batch_size=64)
    users, items = train_lightgcn(shop, config, lambda loss: losses.append(loss))
    assert users.shape == (len(shop.user_ids), 16) and items.shape == (len(shop.items), 16)
    assert not users.requires_grad and users.device == items.device == torch.device("cpu")
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]
    scores = users @ items.T
    chosen = torch.stack(
        [row[torch.from_numpy(history)].mean() for row, history in zip(scores, shop.histories)]
    )
    assert (chosen > scores.mean(1)).float().mean() > 0.9


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("count, dim", [(300, 12), (9, 40)])
def test_effective_rank_counts_equal_directions(rank, count, dim):
    left = torch.linalg.qr(torch.randn(count, rank + 1).double())[0]
    mean = torch.full((count, 1), count**-0.5, dtype=torch.float64)
    left = torch.linalg.qr(torch.cat([mean, left], dim=1))[0][:, 1 : rank + 1]
    right = torch.linalg.qr(torch.randn(dim, rank).double())[0]
    assert effective_rank(3 * left @ right.T + 5) == pytest.approx(rank, rel=1e-6)


def test_effective_rank_weighs_directions_by_their_entropy():
    values = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    x = torch.cat([values.diag(), -values.diag()])
    share = values**2 / (values**2).sum()
    expected = torch.exp(-(share * share.log()).sum())
    assert effective_rank(x) == pytest.approx(float(expected), rel=1e-9)


def report_of(tokens, vectors):
    """The best linear map back to the vectors stands for the decoder."""
    flat = torch.cat([tokens.flatten(1), torch.ones(len(tokens), 1)], dim=1).double()
    rebuilt = flat @ torch.linalg.pinv(flat, rtol=1e-6) @ vectors.double()
    report = collapse_report(tokens, vectors, rebuilt.float())
    assert list(report) == REPORTED and all(type(value) is float for value in report.values())
    return report


def test_a_healthy_tokenizer_is_shown_as_such():
    vectors = torch.randn(500, 8)
    report = report_of((vectors @ torch.randn(8, 20)).unflatten(1, (2, 10)), vectors)
    assert report["explained"] > 0.999
    assert report["rank"] > 4 and report["rank_of_vectors"] > 7.5
    assert report["redundancy"] < 0.6 and report["active"] == 1


def test_constant_tokens_are_shown_as_collapsed():
    report = report_of(torch.randn(2, 10).expand(500, 2, 10), torch.randn(500, 8))
    assert report["explained"] == pytest.approx(0, abs=1e-3)
    assert (report["rank"], report["redundancy"], report["active"]) == (0, 1, 0)


def test_tokens_along_one_line_are_shown_as_collapsed():
    vectors = torch.randn(500, 8)
    report = report_of((vectors[:, :1] @ (torch.rand(1, 20) + 0.5)).unflatten(1, (2, 10)), vectors)
    assert report["explained"] < 0.3
    assert report["rank"] == pytest.approx(1, abs=1e-3)
    assert report["redundancy"] == pytest.approx(1, abs=1e-3) and report["active"] == 1


def test_the_report_counts_dead_dimensions_and_equal_codes():
    tokens = torch.randn(400, 3, 6)
    tokens[:, :, 4:] *= 1e-4
    tokens[:, 1] = -2 * tokens[:, 0]
    report = report_of(tokens, torch.randn(400, 8))
    assert report["active"] == pytest.approx(4 / 6)
    third = torch.corrcoef(torch.cat([tokens[:, 0], tokens[:, 2]], dim=1).T)[:6, 6:]
    expected = (1 + 2 * float(third.diagonal().abs().mean())) / 3
    assert report["redundancy"] == pytest.approx(expected, rel=1e-4)
    assert report_of(tokens[:, :1], torch.randn(400, 8))["redundancy"] == 0


@pytest.mark.parametrize("count", [1, 2])
def test_the_report_of_hardly_any_items_is_finite(count):
    report = collapse_report(*(torch.randn(count, *shape) for shape in ((2, 3), (4,), (4,))))
    assert all(value == value for value in report.values())


def ignore(loss):
    pass


def made_tokenizer(kind, hidden=24):
    if kind == "sigma-vae":
        return SigmaVAE(8, hidden, 2, sigma=0.1, mask_ratio=0.0, dropout=0.0)
    return ResidualQuantizer(8, hidden, 2, codes=32)


@pytest.mark.parametrize("kind, least", [("sigma-vae", 0.7), ("residual-quantizer", 0.6)])
def test_training_makes_tokens_that_keep_the_vectors(kind, least):
    vectors, losses = torch.randn(300, 8), []
    tokenizer = made_tokenizer(kind)
    config = TokenizerConfig(epochs=40, mean_weight=0.01, redundancy_weight=0.0)
    report = train_tokenizer(tokenizer, vectors, config, lambda loss: losses.append(loss))
    assert list(report) == REPORTED
    assert len(losses) == 40 and losses[-1] < losses[0]
    assert not tokenizer.training or kind == "residual-quantizer"
    with torch.no_grad():
        tokens = tokenizer.encode(vectors)
        rebuilt = tokenizer.decode(tokens) if kind == "sigma-vae" else tokenizer.quantise(vectors)
    assert report["explained"] > least
    expected = 1 - F.mse_loss(rebuilt, vectors) / vectors.var(0, correction=0).mean()
    assert report["explained"] == pytest.approx(float(expected), abs=1e-5)
    assert report["rank"] == pytest.approx(effective_rank(tokens.flatten(1)))


def test_a_sigma_vae_whose_means_are_forced_to_zero_is_reported():
    config = TokenizerConfig(epochs=60, mean_weight=1e3)
    report = train_tokenizer(made_tokenizer("sigma-vae"), torch.randn(200, 8), config, ignore)
    assert report["explained"] < 0.2


@pytest.mark.parametrize("kind", ["sigma-vae", "residual-quantizer"])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_training_on_hardly_any_vectors(kind, count, monkeypatch):
    monkeypatch.setattr(pretraining, "REPORT_ROWS", 10)
    config = TokenizerConfig(epochs=2)
    report = train_tokenizer(made_tokenizer(kind), torch.randn(count, 8), config, ignore)
    assert all(value == value for value in report.values())
