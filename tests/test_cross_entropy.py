"""`catalog_cross_entropy`: the reference against a loop, and C++ against the reference."""

import sys

import pytest
import torch
import torch.nn.functional as F
from loss_cases import ADVERSARIAL, Case, loop, random_case
from model_cases import random_model, training_batch
from ops_cases import needs_extension, refused
from torch.autograd import forward_ad

from contrec_fast import native, ops
from contrec_fast.ops import cross_entropy_cpp, dispatch

SETS = native.cross_entropy_instruction_sets()
SIMILARITIES = ["cosine", "dot"]
SHAPES = [(1, 1, 1), (3, 127, 5), (4, 129, 127), (0, 3, 4)]


@pytest.fixture
def threads():
    """threads(n): PyTorch, and with it the extension, works with n threads; restored later."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instructions(monkeypatch):
    """instructions(isa): what the extension uses from now on."""
    original = cross_entropy_cpp.catalog_cross_entropy

    def use(isa):
        found = dispatch._Implementation(
            lambda *arguments: original(*arguments, isa=isa), cross_entropy_cpp._obstacle, None, ()
        )
        monkeypatch.setitem(dispatch._implementations["catalog_cross_entropy"], "cpp", found)

    return use


def cpp(case):
    return case.call("cpp")


# The specification


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("longest", [None, 6])
def test_reference_against_a_loop(similarity, smoothing, longest):
    for batch, count, dim in SHAPES:
        for temperature in (0.05, 1.0, 7):
            case = random_case(
                batch, count, dim, torch.float64, longest,
                similarity=similarity, temperature=temperature, smoothing=smoothing,
            )  # fmt: skip
            torch.testing.assert_close(
                case.call("reference")[0], loop(case), rtol=1e-10, atol=1e-10
            )


def test_smoothing_is_that_of_torch():
    case = random_case(5, 20, 3, torch.float64, similarity="dot", temperature=1, smoothing=0.3)
    logits = case.queries @ case.vectors.T
    expected = F.cross_entropy(logits, case.targets, reduction="none", label_smoothing=0.3)
    nobody = torch.full((5,), -1)
    for histories, rows in [(None, None), ([[1]], nobody)]:
        case.histories, case.seen_rows = histories, rows
        torch.testing.assert_close(case.call("reference")[0], expected)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("longest", [None, 3])
def test_reference_gradients(similarity, longest):
    case = random_case(4, 9, 3, torch.float64, longest)
    seen = {}
    if longest is not None:
        seen = {"seen": ops.SeenLists.from_lists(case.histories), "seen_rows": case.seen_rows}

    def loss(queries, vectors):
        return ops.catalog_cross_entropy(
            queries, vectors, case.targets, 0.7, similarity, 0.1, **seen
        )

    inputs = case.queries.requires_grad_(), case.vectors.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


# The extension


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("longest", [None, 20])
@pytest.mark.parametrize("isa", SETS)
def test_random(isa, similarity, smoothing, longest, dtype, instructions):
    instructions(isa)
    for batch, count, dim in [*SHAPES, (33, 127, 64), (129, 1300, 3), (300, 200, 40)]:
        options = {"similarity": similarity, "smoothing": smoothing, "longest": longest}
        random_case(batch, count, dim, dtype, **options).check(cpp)


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name, isa, instructions):
    instructions(isa)
    ADVERSARIAL[name]().check(cpp)


@needs_extension
def test_losses_of_certain_queries_are_zero():
    for name in ("one item", "all but the target seen"):
        assert not ADVERSARIAL[name]().call("cpp")[0].any()
    assert ADVERSARIAL["zeros"]().call("cpp")[0].isfinite().all()


@needs_extension
@pytest.mark.parametrize("place", ["queries", "vectors"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(place, value):
    case = random_case(40, 500, 9)
    getattr(case, place)[17, 3] = value
    found, expected = (case.call(backend)[0].isnan() for backend in ("cpp", "reference"))
    assert torch.equal(found, expected) and found.any()


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("smoothing, longest", [(0.0, None), (0.1, 30)])
def test_bits_do_not_depend_on_threads_or_batch(isa, smoothing, longest, threads, instructions):
    """More chunks than threads, and more queries than are worked on at once."""
    instructions(isa)
    case = random_case(300, 17_000, 300, smoothing=smoothing, longest=longest)
    if isa == "portable":
        case = random_case(300, 2100, 20, smoothing=smoothing, longest=longest)
    expected = case.call("cpp")
    for number in (2, 3):
        threads(number)
        assert all(map(torch.equal, case.call("cpp"), expected))
    for rows in (torch.tensor([259]), torch.randperm(300)[:45]):
        loss, query_gradient, _ = case.call("cpp", rows=rows)
        assert torch.equal(loss, expected[0][rows])
        assert torch.equal(query_gradient, expected[1][rows])


@needs_extension
def test_auto_takes_it_where_it_serves():
    for dtype, expected in [(torch.float32, "cpp"), (torch.bfloat16, "cpp")] + [
        (dtype, "reference") for dtype in (torch.float64, torch.float16)
    ]:
        random_case(2, 5, 3, dtype).call("auto")
        assert ops.last_backend("catalog_cross_entropy") == expected
    with refused(ValueError, "backend"):
        random_case(2, 5, 3, torch.float64).call("cpp")


def test_transformed():
    """By torch.func or in forward mode: left to the reference."""
    queries, vectors, targets = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)

    def function(queries):
        return ops.catalog_cross_entropy(queries, vectors, targets, 0.2)

    leaf = queries.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda q: function(q).sum())(queries), expected)
    torch.testing.assert_close(torch.func.vmap(function)(queries[None])[0], function(queries))
    with forward_ad.dual_level():
        found = function(forward_ad.make_dual(queries, torch.ones_like(queries)))
        tangent = forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(tangent.sum(), expected.sum())


@needs_extension
def test_training_takes_it():
    ranking = random_model().train()(training_batch(random_model(), 3, 8))["ranking"]
    assert ops.last_backend("catalog_cross_entropy") == "cpp" and ranking.requires_grad


@needs_extension
def test_only_what_is_asked_for():
    """Gradients of one input only, of what is not contiguous, and no second derivative."""
    queries, vectors, targets = torch.randn(7, 6).T, torch.randn(7, 90).T, torch.arange(6)
    case = Case(queries, vectors, targets)
    case.gradient = torch.ones(6)
    expected = case.call("cpp")
    for number, wanted in enumerate((queries, vectors)):
        one = wanted.clone().requires_grad_()
        inputs = (one, vectors) if number == 0 else (queries, one)
        loss = ops.catalog_cross_entropy(*inputs, targets, 0.2, backend="cpp").sum()
        (found,) = torch.autograd.grad(loss, one, create_graph=True)
        assert torch.equal(found.double(), expected[1 + number])
        with pytest.raises(RuntimeError, match="^catalog_cross_entropy: expected at most one"):
            found.sum().backward()


def test_no_second_derivative_is_needed_for_a_second_backward():
    queries, vectors = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = ops.catalog_cross_entropy(queries, vectors, torch.arange(3), 0.2).sum()
    first = torch.autograd.grad(loss, queries, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, queries)[0])


@needs_extension
def test_unknown_instructions(instructions):
    instructions("sse9")
    with refused(ValueError, "isa"):
        random_case(2, 5, 3).call("cpp")


MEMORY = """
import torch
from contrec_fast import ops

def held(name):
    rows = open("/proc/self/status").read().splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith(name))

def call(batch, count, dim):
    queries, vectors = (torch.randn(n, dim).requires_grad_() for n in (batch, count))
    targets = torch.randint(count, (batch,))
    before = held("VmRSS")
    ops.catalog_cross_entropy(queries, vectors, targets, 0.1, backend="cpp").mean().backward()
    return held("VmHWM") - before - 4 * dim * (batch + count)  # beyond the gradients

call(2, 3, 4)
extra = call(512, 50_000, 16)
assert extra < 0.05 * 4 * 512 * 50_000, extra
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory(run_python):
    """Forward and backward hold less than a twentieth of one matrix of logits."""
    run_python(MEMORY)


# What is refused


BACKENDS = [
    "reference",
    pytest.param("cpp", marks=needs_extension),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_rows(backend):
    for target in (-1, 6, -100):
        case = random_case(5, 6, 4)
        case.targets[3] = target
        with pytest.raises(IndexError):
            case.call(backend)
    case = random_case(5, 6, 4, longest=2)
    case.seen_rows[2] = 3
    with pytest.raises(IndexError):
        case.call(backend)


LISTS = ops.SeenLists.from_lists([[0], [4]])
GOOD = {
    "queries": torch.randn(3, 4),
    "vectors": torch.randn(5, 4),
    "targets": torch.tensor([0, 4, 2]),
    "temperature": 1.0,
}
ROWS = GOOD["targets"] * 0
BAD = [
    (TypeError, "queries", {"queries": torch.ones(3, 4).long()}),
    (ValueError, "queries", {"queries": torch.ones(4)}),
    (TypeError, "vectors", {"vectors": torch.ones(5, 4).double()}),
    (ValueError, "vectors", {"vectors": torch.ones(5, 3)}),
    (ValueError, "vectors", {"vectors": torch.ones(0, 4)}),
    (ValueError, "vectors", {"vectors": torch.empty(5, 4, device="meta")}),
    (TypeError, "targets", {"targets": torch.ones(3).int()}),
    (ValueError, "targets", {"targets": torch.ones(2).long()}),
    (ValueError, "temperature", {"temperature": 0.0}),
    (ValueError, "temperature", {"temperature": -1.0}),
    (ValueError, "temperature", {"temperature": float("nan")}),
    (ValueError, "temperature", {"temperature": float("inf")}),
    (ValueError, "similarity", {"similarity": "euclidean"}),
    (ValueError, "label_smoothing", {"label_smoothing": 1.0}),
    (ValueError, "label_smoothing", {"label_smoothing": -0.1}),
    (ValueError, "label_smoothing", {"label_smoothing": float("nan")}),
    (ValueError, "seen, seen_rows", {"seen": LISTS}),
    (ValueError, "seen, seen_rows", {"seen_rows": ROWS}),
    (TypeError, "seen", {"seen": [[0]], "seen_rows": ROWS}),
    (TypeError, "seen_rows", {"seen": LISTS, "seen_rows": ROWS.double()}),
    (ValueError, "seen_rows", {"seen": LISTS, "seen_rows": ROWS[:2]}),
    (ValueError, "seen", {"seen": ops.SeenLists.from_lists([[5]]), "seen_rows": ROWS}),
    (ValueError, "vectors", {"queries": torch.ones(3, 0), "vectors": torch.ones(5, 0)}),
    (ValueError, "backend", {"backend": "fastest"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD)
def test_bad_arguments(error, name, arguments):
    with refused(error, name):
        ops.catalog_cross_entropy(**(GOOD | arguments))
