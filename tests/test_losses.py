"""The losses of the head against their formulas, row by row."""

import math

import pytest
import torch

from contrec_fast.models.losses import bpr_loss, contrastive_denoising_loss, dispersive_loss


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("count, dim", [(2, 1), (3, 7), (17, 5)])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_dispersive_loss_equals_the_double_loop(count, dim, tau):
    z = doubles(count, dim)
    rows = z.detach()
    terms = [
        math.exp(-float((rows[i] - rows[j]).square().sum()) / (dim * tau))
        for i in range(count)
        for j in range(count)
        if i != j
    ]
    expected = math.log(sum(terms) / len(terms))
    assert dispersive_loss(z, tau).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_dispersive_loss_of_fewer_than_two_rows_is_zero(count):
    assert float(dispersive_loss(torch.randn(count, 3), 0.5)) == 0


@pytest.mark.parametrize("sign, spreads", [(1, True), (-1, False)], ids=["ours", "released"])
def test_only_our_sign_of_the_dispersive_loss_spreads_the_rows(sign, spreads):
    z = (0.3 * torch.randn(12, 6)).requires_grad_()
    distances = [float(torch.pdist(z.detach()).mean())]
    for _ in range(20):
        (gradient,) = torch.autograd.grad(sign * dispersive_loss(z, 0.5), z)
        z.data -= gradient
        distances.append(float(torch.pdist(z.detach()).mean()))
    assert distances == sorted(distances, reverse=not spreads)
    assert distances[-1] > 1.3 * distances[0] or not spreads
    assert distances[-1] < 0.8 * distances[0] or spreads


def minus_log_sigmoid(margin):
    return math.log1p(math.exp(-margin))


@pytest.mark.parametrize("count", [1, 3, 129])
def test_contrastive_denoising_loss_equals_its_formula(count):
    positive, negative = doubles(count), doubles(count)
    margins = (negative - positive).tolist()
    expected = [minus_log_sigmoid(margin) for margin in margins]
    loss = contrastive_denoising_loss(positive, negative)
    assert loss.item() == pytest.approx(sum(expected) / count, rel=1e-9)
    loss.backward()
    assert (positive.grad > 0).all() and (negative.grad < 0).all()


@pytest.mark.parametrize("count, dim", [(1, 2), (3, 7), (129, 5)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_bpr_loss_equals_its_formula(count, dim, temperature):
    queries, positives, negatives = (doubles(count, dim) for _ in range(3))

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    expected = [
        minus_log_sigmoid((cosine(q, p) - cosine(q, n)) / temperature)
        for q, p, n in zip(queries, positives, negatives)
    ]
    loss = bpr_loss(queries, positives, negatives, temperature)
    assert loss.item() == pytest.approx(sum(expected) / count, rel=1e-9)
    loss.backward()
    assert all((x.grad.norm(dim=1) > 0).all() for x in (queries, positives, negatives))


def test_losses_of_no_pairs_are_zero():
    none = torch.zeros(0, 4, requires_grad=True)
    losses = bpr_loss(none, none, none, 0.1), contrastive_denoising_loss(none[:, 0], none[:, 0])
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()


def test_losses_of_hopeless_pairs_stay_finite():
    far = torch.tensor([1e4], requires_grad=True)
    loss = contrastive_denoising_loss(far, torch.zeros(1))
    assert loss.item() == pytest.approx(1e4)
    loss.backward()
    assert float(far.grad) == pytest.approx(1)
