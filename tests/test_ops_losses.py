"""`catalog_cross_entropy` and `denoise`: values, gradients and errors."""

import math

import pytest
import torch
from ops_cases import KINDS, make_denoiser, refused, relative_error

from contrec_fast import ops
from contrec_fast.models import LinearDenoiser

SIMILARITIES = ["cosine", "dot"]
LOSS_BACKENDS = ops.backends()["catalog_cross_entropy"]
DENOISE_BACKENDS = ops.backends()["denoise"]


def loop(queries, vectors, targets, temperature, similarity):
    """The loss in Python floats, query by query."""
    losses = []
    for query, target in zip(queries.double(), targets.tolist()):
        scores = []
        for vector in vectors.double():
            score = float(query @ vector)
            if similarity == "cosine":
                score /= float(query.norm() * vector.norm())
            scores.append(score / temperature)
        top = max(scores)
        total = top + math.log(sum(math.exp(score - top) for score in scores))
        losses.append(total - scores[target])
    return torch.tensor(losses, dtype=torch.float64)


def make_inputs(batch, count, dim, dtype=torch.float64):
    queries, vectors = torch.randn(batch, dim), torch.randn(count, dim)
    return queries.to(dtype), vectors.to(dtype), torch.randint(0, count, (batch,))


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_loss_against_a_loop(similarity, backend):
    for batch, count, dim in [(1, 1, 1), (3, 127, 5), (4, 129, 127), (0, 3, 4)]:
        for temperature in (0.05, 1.0, 7):
            inputs = make_inputs(batch, count, dim)
            result = ops.catalog_cross_entropy(*inputs, temperature, similarity, backend)
            assert result.shape == (batch,)
            expected = loop(*inputs, temperature, similarity)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_low_precision(dtype, similarity, backend):
    queries, vectors, targets = make_inputs(33, 129, 64, dtype)
    exact = loop(queries, vectors, targets, 0.2, similarity)
    a, b = queries, vectors
    if similarity == "cosine":
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    logits = a @ b.T / 0.2
    plain = logits.logsumexp(1) - logits[torch.arange(33), targets]
    result = ops.catalog_cross_entropy(queries, vectors, targets, 0.2, similarity, backend)
    assert result.dtype == dtype
    bound = 2 * relative_error(plain, exact) + 4 * torch.finfo(dtype).eps
    assert relative_error(result, exact) <= bound


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_loss_gradients(similarity, backend):
    queries, vectors, targets = make_inputs(4, 9, 3)

    def loss(queries, vectors):
        return ops.catalog_cross_entropy(queries, vectors, targets, 0.7, similarity, backend)

    assert torch.autograd.gradcheck(loss, (queries.requires_grad_(), vectors.requires_grad_()))


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
def test_loss_is_stable_and_refuses_foreign_targets(backend):
    queries, vectors, targets = make_inputs(5, 6, 4)
    far = ops.catalog_cross_entropy(1e3 * queries, 1e3 * vectors, targets, 1e-3, "dot", backend)
    assert far.isfinite().all()
    for target in (-1, 6, -100):
        with pytest.raises(IndexError):
            ops.catalog_cross_entropy(
                queries, vectors, torch.full_like(targets, target), 1.0, backend=backend
            )


Q, V, TARGETS = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
BAD_LOSSES = [
    (TypeError, "queries", {"queries": Q.long()}),
    (ValueError, "queries", {"queries": Q[0]}),
    (TypeError, "vectors", {"vectors": V.double()}),
    (ValueError, "vectors", {"vectors": V[:, :3]}),
    (ValueError, "vectors", {"vectors": V[:0]}),
    (ValueError, "vectors", {"vectors": torch.empty(5, 4, device="meta")}),
    (TypeError, "targets", {"targets": TARGETS.int()}),
    (ValueError, "targets", {"targets": TARGETS[:2]}),
    (ValueError, "temperature", {"temperature": 0.0}),
    (ValueError, "temperature", {"temperature": -1.0}),
    (ValueError, "temperature", {"temperature": float("nan")}),
    (ValueError, "temperature", {"temperature": float("inf")}),
    (ValueError, "similarity", {"similarity": "euclidean"}),
    (ValueError, "backend", {"backend": "fastest"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_LOSSES)
def test_bad_losses(error, name, arguments):
    good = {"queries": Q, "vectors": V, "targets": TARGETS, "temperature": 1.0}
    with refused(error, name):
        ops.catalog_cross_entropy(**(good | arguments))


@pytest.mark.parametrize("backend", DENOISE_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_denoise_is_guided(kind, backend):
    for batch, dim in [(1, 1), (3, 127), (129, 3), (0, 5)]:
        denoiser = make_denoiser(kind, dim)
        x, condition = torch.randn(2, batch, dim, dtype=torch.float64)
        t = torch.randint(0, 200, (batch,))
        null = denoiser(x, denoiser.null_condition.expand_as(x), t)
        conditional = denoiser(x, condition, t)
        for guidance in (0, 1, 2, 0.5, -1):
            result = ops.denoise(denoiser, x, condition, t, guidance, backend)
            expected = (1 + guidance) * conditional - guidance * null
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        unconditional = ops.denoise(denoiser, x, None, t, backend=backend)
        torch.testing.assert_close(unconditional, null, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", DENOISE_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0, 2, None])
def test_denoise_gradients(kind, guidance, backend):
    """In x, the condition and every parameter: those of the formula, taken by autograd."""
    denoiser = make_denoiser(kind, 5)
    x, condition, outward = torch.randn(3, 4, 5, dtype=torch.float64)
    x, condition = x.clone().requires_grad_(), condition.clone().requires_grad_()
    t = torch.randint(0, 200, (4,))
    null = denoiser(x, denoiser.null_condition.expand_as(x), t)
    if guidance is None:
        wanted, result = null, ops.denoise(denoiser, x, None, t, backend=backend)
    else:
        wanted = (1 + guidance) * denoiser(x, condition, t) - guidance * null
        result = ops.denoise(denoiser, x, condition, t, guidance, backend)
    inputs = [x, condition, *denoiser.parameters()]
    found, expected = (
        torch.autograd.grad(y, inputs, outward, allow_unused=True) for y in (result, wanted)
    )
    for ours, theirs, tensor in zip(found, expected, inputs):
        ours, theirs = (torch.zeros_like(tensor) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)

    def function(x, condition):
        return ops.denoise(denoiser, x, condition, t, 2.0, backend)

    assert torch.autograd.gradcheck(function, (x, condition))


@pytest.mark.parametrize("backend", DENOISE_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_denoise_in_bfloat16(kind, backend):
    low = make_denoiser(kind, 64, torch.bfloat16)
    exact = KINDS[kind](64).double()
    exact.load_state_dict(low.state_dict())
    x, condition = torch.randn(2, 33, 64).bfloat16()
    t = torch.randint(0, 200, (33,))
    expected = ops.denoise(exact, x.double(), condition.double(), t)
    null = low.null_condition.expand_as(x)
    plain = 3 * low(x, condition, t) - 2 * low(x, null, t)
    result = ops.denoise(low, x, condition, t, 2.0, backend)
    assert result.dtype == torch.bfloat16
    bound = 2 * relative_error(plain, expected) + 4 * 2.0**-9
    assert relative_error(result, expected) <= bound


X, STEPS = torch.randn(3, 4), torch.tensor([0, 1, 2])
BAD_DENOISES = [
    (TypeError, "denoiser", {"denoiser": torch.nn.Linear(4, 4)}),
    (TypeError, "x", {"x": X.double()}),
    (ValueError, "x", {"x": X[:, :3]}),
    (ValueError, "x", {"x": torch.empty(3, 4, device="meta")}),
    (TypeError, "t", {"t": STEPS.float()}),
    (ValueError, "t", {"t": STEPS[:2]}),
    (TypeError, "condition", {"condition": X.double()}),
    (ValueError, "condition", {"condition": X[:2]}),
    (ValueError, "backend", {"backend": "fastest"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_DENOISES)
def test_bad_denoises(error, name, arguments):
    good = {"denoiser": LinearDenoiser(4), "x": X, "condition": X, "t": STEPS}
    with refused(error, name):
        ops.denoise(**(good | arguments))
