"""The losses of the head against their formulas, row by row."""

import math

import pytest
import torch
from ops_cases import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def by_differences(z, tau):
    """The loss with all differences of rows, in the dtype of z [B, dim]."""
    row, column = torch.triu_indices(len(z), len(z), offset=1)
    distance = (z[row] - z[column]).square().mean(-1)
    return torch.logsumexp(-distance / tau, dim=0) - math.log(len(distance))


def spread_rows(count, dim):
    return torch.randn(count, dim)


def near_duplicates(count, dim):
    return torch.randn(dim) + 1e-3 * torch.randn(count, dim)


def far_clusters(count, dim):
    """Near each other in each of two clusters, and far from the mean of all."""
    return 100 * torch.randn(2, dim)[torch.arange(count) % 2] + 1e-2 * torch.randn(count, dim)


def repeated_rows(count, dim):
    return torch.randn(3, dim)[torch.arange(count) % 3]


def equal_rows(count, dim):
    return torch.randn(dim).repeat(count, 1)


@pytest.mark.parametrize(
    "make", [spread_rows, near_duplicates, far_clusters, repeated_rows, equal_rows]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count, dim", [(2, 1), (3, 127), (127, 3), (129, 64)])
def test_dispersive_loss_is_as_good_as_differences(make, dtype, count, dim):
    """Against float64: at most twice the error of all differences in the same precision."""
    rows, eps = make(count, dim).to(dtype), torch.finfo(dtype).eps

    def results(loss, dtype):
        z = rows.to(dtype).requires_grad_()
        value = loss(z, 0.5)
        return value.detach(), torch.autograd.grad(value, z)[0]

    exact = results(by_differences, torch.float64)
    plain, found = results(by_differences, dtype), results(dispersive_loss, dtype)
    assert found[0].dtype == found[1].dtype == dtype
    error, allowed = (abs(float(value) - float(exact[0])) for value in (found[0], plain[0]))
    assert error <= 2 * allowed + 4 * eps * (1 + abs(float(exact[0])))
    if exact[1].any():
        assert (
            relative_error(found[1], exact[1]) <= 2 * relative_error(plain[1], exact[1]) + 4 * eps
        )
    else:
        assert found[1].abs().max() <= 1e-12


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation gives out."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_dispersive_loss_holds_no_number_per_pair_and_dimension():
    z = torch.randn(60, 40, requires_grad=True)
    with Largest() as largest:
        dispersive_loss(z, 0.5).backward()
    assert largest.numbers == 60 * 60


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
