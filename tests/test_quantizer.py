"""The residual quantiser against a loop over items, and its fit against what k-means promises."""

import pytest
import torch
from ops_cases import relative_error

from contrec_fast.models import quantizer
from contrec_fast.models.quantizer import ResidualQuantizer


def fitted(vectors, hidden=6, tokens=3, codes=8, iterations=30):
    model = ResidualQuantizer(vectors.shape[1], hidden, tokens, codes)
    losses = []
    model.fit(vectors, iterations, lambda loss: losses.append(loss))
    assert len(losses) == iterations
    return model, losses


@pytest.mark.parametrize("count", [0, 1, 3, 127, 300])
def test_codes_are_the_nearest_of_each_residual(count, monkeypatch):
    monkeypatch.setattr(quantizer, "CHUNK", 128)
    model = ResidualQuantizer(5, 7, 3, 9)
    model.centroids.normal_()
    x = torch.randn(count, 5)
    codes, tokens, sums = model.codes_of(x), model.encode(x), model.quantise(x)
    assert codes.shape == (count, 3) and codes.dtype == torch.int64
    assert tokens.shape == (count, 3, 7) and sums.shape == (count, 5)
    for row in range(count):
        residual = x[row]
        for level in range(3):
            distances = (residual - model.centroids[level]).norm(dim=1)
            assert int(codes[row, level]) == int(distances.argmin())
            assert torch.equal(tokens[row, level], model.embedding[level, codes[row, level]])
            residual = residual - model.centroids[level, codes[row, level]]
        torch.testing.assert_close(x[row] - sums[row], residual)
        assert torch.equal(model.codes_of(x[row : row + 1])[0], codes[row])


def test_equally_near_centroids_give_the_first():
    model = ResidualQuantizer(3, 4, 2, 5)  # all its centroids are the same
    assert not model.codes_of(torch.randn(9, 3)).any()


def test_encode_has_a_gradient_in_the_embedding_only():
    model = ResidualQuantizer(5, 4, 2, 6)
    model.centroids.normal_()
    x = torch.randn(40, 5, requires_grad=True)
    model.encode(x).sum().backward()
    assert x.grad is None
    counts = torch.stack([torch.bincount(codes, minlength=6) for codes in model.codes_of(x).T])
    torch.testing.assert_close(model.embedding.grad, counts[..., None].expand(2, 6, 4).float())
    assert [name for name, _ in model.named_parameters()] == ["embedding"]
    assert set(model.state_dict()) == {"embedding", "centroids"}


def test_fit_finds_separate_clusters_of_clusters():
    """8 centres, far apart, of 4 offsets each: two levels describe them exactly."""
    centres, offsets = 100 * torch.eye(8), torch.randn(4, 8)
    offsets -= offsets.mean(0)
    x = (centres[:, None] + offsets).flatten(0, 1).repeat(5, 1)[torch.randperm(160)]
    model, losses = fitted(x, tokens=2)
    assert relative_error(model.quantise(x), x) < 1e-5
    assert len(model.codes_of(x).unique(dim=0)) == 32
    for centre in centres:
        assert (model.centroids[0] - centre).norm(dim=1).min() < 1e-3


def test_fit_ends_where_each_centroid_is_the_mean_of_its_rows():
    x = torch.randn(400, 4) + 3
    model, losses = fitted(x, tokens=2, codes=5, iterations=160)
    codes, residual = model.codes_of(x), x
    for level in range(2):
        for code in range(5):
            mine = residual[codes[:, level] == code]
            torch.testing.assert_close(
                mine.mean(0), model.centroids[level, code], rtol=1e-4, atol=1e-4
            )
        residual = residual - model.centroids[level][codes[:, level]]
    for level in (losses[:80], losses[80:]):  # Lloyd's algorithm never gets worse
        assert all(later <= earlier * 1.0001 for earlier, later in zip(level, level[1:]))
    assert losses[159] < losses[79]
    assert losses[-1] == pytest.approx(float((x - model.quantise(x)).square().mean()), rel=1e-4)


@pytest.mark.parametrize("count, different", [(1, 1), (3, 3), (7, 7), (50, 3), (50, 1)])
def test_fewer_different_vectors_than_codes_are_kept_exactly(count, different):
    x = torch.randn(different, 5)[torch.arange(count) % different]
    model, _ = fitted(x, codes=8)
    assert model.centroids.isfinite().all()
    torch.testing.assert_close(model.quantise(x), x, rtol=1e-5, atol=1e-5)
    assert len(model.codes_of(x).unique(dim=0)) == different


def test_codes_without_rows_are_seeded_anew(monkeypatch):
    """From the worst start, all centroids the same, every one comes to use."""
    monkeypatch.setattr(quantizer, "_spread_rows", lambda x, count: x[:1].repeat(count, 1))
    x = torch.randn(300, 4)
    model, _ = fitted(x, tokens=1, codes=16)
    assert len(model.codes_of(x).unique()) == 16


@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
def test_rounds_are_dealt_out_to_the_levels(iterations):
    x = torch.randn(60, 4)
    model, _ = fitted(x, iterations=iterations)
    assert all(len(codes.unique()) > 3 for codes in model.codes_of(x).T)


def test_the_seed_decides_the_fit():
    x, found = torch.randn(200, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(fitted(x)[0].state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["centroids"], found[2]["centroids"])
