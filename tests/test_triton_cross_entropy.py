"""The Triton cross-entropy against the reference: on a GPU, or in triton's interpreter."""

from functools import partial

import pytest
import torch
from loss_cases import ADVERSARIAL, random_case
from ops_cases import refused

from contrec_fast import ops
from contrec_fast.ops import triton_cross_entropy

pytest.importorskip("triton")
cross_entropy = pytest.importorskip("contrec_kernels.cross_entropy")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BEYOND_SQUARES = ("huge",)  # rows whose squares float32 does not hold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("smoothing, longest", [(0.0, None), (0.1, None), (0.0, 20), (0.1, 20)])
def test_random(kernel_device, similarity, smoothing, longest, dtype):
    for batch, count, dim in [(1, 1, 1), (3, 127, 5), (129, 129, 127), (20, 700, 40), (0, 3, 4)]:
        options = {"similarity": similarity, "smoothing": smoothing, "longest": longest}
        case = random_case(batch, count, dim, dtype, **options)
        case.check(partial(type(case).call, backend="triton", device=kernel_device))


@pytest.mark.parametrize("name", [name for name in ADVERSARIAL if name not in BEYOND_SQUARES])
def test_adversarial(kernel_device, name):
    case = ADVERSARIAL[name]()
    case.check(partial(type(case).call, backend="triton", device=kernel_device))


@pytest.mark.parametrize("tiles", [(32, 32, 16, 32), (64, 32, 16, 64), (16, 64, 64, 32)])
def test_any_tiles(kernel_device, tiles, monkeypatch):
    """Rows held or read again, parts of tiles, several tiles of columns."""
    chosen = cross_entropy.Tiles(*tiles, 4, 2)
    monkeypatch.setattr(cross_entropy, "tiles_for", lambda *call: chosen)
    for dim in (33, 64):
        case = random_case(37, 130, dim, smoothing=0.1, longest=20)
        case.check(partial(type(case).call, backend="triton", device=kernel_device))


def test_the_same_bits_again(kernel_device):
    case = random_case(30, 500, 20, smoothing=0.1, longest=9)
    first, second = (case.call("triton", device=kernel_device) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("wanted", ["queries", "vectors"])
def test_only_what_is_asked_for(kernel_device, wanted):
    case = random_case(5, 70, 6)
    case.gradient = torch.ones(5)
    names = "queries", "vectors"
    inputs = {name: getattr(case, name).to(kernel_device, copy=True) for name in names}
    inputs[wanted].requires_grad_()
    targets = case.targets.to(kernel_device)
    loss = ops.catalog_cross_entropy(**inputs, targets=targets, temperature=0.2, backend="triton")
    (found,) = torch.autograd.grad(loss.sum(), inputs[wanted], create_graph=True)
    expected = case.call("triton", device=kernel_device)[1 + (wanted == "vectors")]
    assert torch.equal(found.detach().double().cpu(), expected)
    with pytest.raises(RuntimeError, match="^catalog_cross_entropy: expected at most one"):
        found.sum().backward()


def test_what_it_cannot_serve_is_refused(monkeypatch):
    with refused(ValueError, "backend"):
        random_case(2, 5, 3, torch.float64).call("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refused(ValueError, "backend"):
        random_case(2, 5, 3).call("triton")


def test_buckets():
    def bucket(batch, count, dim, smoothing=0.0, rows=None):
        queries, vectors = (torch.empty(n, dim, device="meta") for n in (batch, count))
        return triton_cross_entropy._bucket(
            queries, vectors, None, 0.1, "cosine", smoothing, None, None, rows
        )

    assert bucket(256, 100_000, 64) == "D=64 float32 queries<=256 items<=131072"
    assert bucket(8193, 2**20 + 1, 8, 0.1, 1) == (
        "D=8 float32 seen smoothed queries>8192 items>1048576"
    )


COMPILED = """
import torch
from bench.aot_table import aot, loss
kernels = aot.compiled(loss(getattr(torch, DTYPE), 256, DIM), CAPABILITY)
assert len(kernels) == 6, len(kernels)  # three, without and with lists and smoothing
for row in map(aot.figures, kernels):
    assert not aot.faults(row, CAPABILITY), row
    assert row["instructions"]["HGMMA" if CAPABILITY == 90 else "HMMA"], row
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, dim, capability", [("bfloat16", 64, 90), ("bfloat16", 512, 90), ("float32", 64, 80)]
)
def test_compiled_code(run_python, dtype, dim, capability):
    """No spills, and products on tensor cores."""
    run_python(f"DTYPE, DIM, CAPABILITY = {dtype!r}, {dim}, {capability}\n{COMPILED}")
