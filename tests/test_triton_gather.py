"""`gather_tokens` in Triton against a loop and the reference: on a GPU, or interpreted."""

import pytest
import torch
from gather_cases import DTYPES, assert_as_good, factored_loop, loop, make_factored, make_inputs
from ops_cases import refused

from contrec_fast import ops
from contrec_fast.ops import triton_gather

pytest.importorskip("triton")
gather = pytest.importorskip("contrec_kernels.gather")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def on(device, inputs):
    """Inputs on a device; gradients are of copies there."""
    ids, rows, text, table = inputs
    if isinstance(table, ops.FactoredTable):
        table = ops.FactoredTable(*(part.to(device) for part in table))
    else:
        table = table.to(device)
    return ids.to(device), rows.to(device), text.to(device), table


def run(device, inputs, out=None):
    """The result, on the CPU."""
    result = ops.gather_tokens(*on(device, inputs), out=out, backend="triton")
    assert ops.last_backend("gather_tokens") == "triton"
    return result.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_against_a_loop(kernel_device, dtype, integers):
    for batch, length, width in [(1, 1, 1), (3, 5, 127), (5, 29, 3), (2, 40, 129), (2, 0, 4)]:
        ids, rows, *tables = make_inputs(batch, length, width, dtype=dtype)
        found = run(kernel_device, (ids.to(integers), rows.to(integers), *tables))
        assert torch.equal(found, loop(ids, rows, *tables))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("make", [make_inputs, make_factored])
def test_text_alone_and_tokens_alone(kernel_device, make, share):
    inputs = make(4, 9, 6, share=share)
    expected = ops.gather_tokens(*inputs, backend="reference")
    torch.testing.assert_close(run(kernel_device, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layers, inner", [(1, 1), (2, 3), (3, 64), (2, 130)])
def test_factored_against_a_loop(kernel_device, dtype, layers, inner):
    for width in (1, 3, 129):
        inputs = make_factored(3, 17, width, inner, layers, dtype=dtype)
        ids, rows, text, table = inputs
        exact = ops.FactoredTable(*(part.double() for part in table))
        exact = factored_loop(ids, rows, text.double(), exact)
        out = torch.full((3, 17, width), torch.nan, dtype=dtype, device=kernel_device)
        plain = loop(ids, rows, text, table.whole())
        assert_as_good(run(kernel_device, inputs, out), plain, exact, dtype)


def test_tiles_change_nothing_but_rounding(kernel_device):
    """Parts of tiles in every direction."""
    inputs = make_factored(5, 40, 70, inner=50, layers=3)
    ids, rows, text, table = on(kernel_device, inputs)
    expected = ops.gather_tokens(*inputs, backend="reference")
    for tiles in [gather.Tiles(16, 16, 16), gather.Tiles(64, 64, 32)]:
        out = torch.full((5, 40, 70), torch.nan, device=kernel_device)
        gather.gather_tokens(ids, rows, text, *table, out, tiles=tiles)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_out_of_strides(kernel_device):
    for make in (make_inputs, make_factored):
        inputs = make(3, 5, 7)
        big = torch.full((3, 10, 9), torch.nan, device=kernel_device)
        found = run(kernel_device, inputs, big[:, ::2, 1:8])
        torch.testing.assert_close(found, ops.gather_tokens(*inputs, backend="reference"))
        assert big[:, 1::2].isnan().all() and big[:, :, [0, 8]].isnan().all()


@pytest.mark.parametrize("make", [make_inputs, make_factored])
def test_bitwise_independent_of_the_batch(kernel_device, make):
    ids, rows, *tables = make(33, 7, 33)
    full = run(kernel_device, (ids, rows, *tables))
    for size in (1, 3, 17):
        some = torch.randperm(33)[:size]
        assert torch.equal(run(kernel_device, (ids[some], rows[some], *tables)), full[some])


def gradients(inputs, outward, wanted, backend):
    """Of the text table and the (parts of the) token table, as far as wanted."""
    ids, rows, text, table = inputs
    parts = table if isinstance(table, ops.FactoredTable) else (table,)
    leaves = [part.detach().requires_grad_(want) for part, want in zip((text, *parts), wanted)]
    given = ops.FactoredTable(*leaves[1:]) if len(parts) > 1 else leaves[1]
    result = ops.gather_tokens(ids, rows, leaves[0], given, backend=backend)
    found = torch.autograd.grad(result, [x for x in leaves if x.requires_grad], outward)
    assert ops.last_backend("gather_tokens_backward") == backend
    return [part.cpu() for part in found]


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(kernel_device, dtype, chunk, monkeypatch):
    """Rows that one, a few and most positions show; runs of one, two and many chunks."""
    monkeypatch.setattr(gather, "CHUNK", chunk)
    for batch, length, width, words in [(1, 1, 1, 1), (3, 43, 129, 40), (2, 65, 3, 1)]:
        ids, rows, *tables = inputs = make_inputs(batch, length, width, words, dtype=dtype)
        ids[rows == -1] = (ids * ids)[rows == -1] % words
        ids[0, :] = 0
        outward = torch.randn(batch, length, width).to(dtype)
        exact = ids, rows, *(part.double() for part in tables)
        for wanted in [(True, True), (False, True), (True, False)]:
            there = on(kernel_device, inputs)
            found = gradients(there, outward.to(kernel_device), wanted, "triton")
            plain = gradients(inputs, outward, wanted, "reference")
            best = gradients(exact, outward.double(), wanted, "reference")
            for part, rough, right in zip(found, plain, best):
                assert part.dtype == dtype and part.shape == rough.shape
                assert_as_good(part, rough, right, dtype)


def test_gradients_of_a_factored_table(kernel_device):
    inputs, outward = make_factored(3, 17, 12), torch.randn(3, 17, 12)
    found = gradients(on(kernel_device, inputs), outward.to(kernel_device), [True] * 4, "triton")
    expected = gradients(inputs, outward, [True] * 4, "reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_serve_is_refused(monkeypatch):
    with refused(ValueError, "backend"):
        ops.gather_tokens(*make_factored(1, 2, 3, dtype=torch.float64), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refused(ValueError, "backend"):
        ops.gather_tokens(*make_inputs(1, 2, 3), backend="triton")


def test_buckets():
    ids, text = torch.empty(16, 1024), torch.empty(5, 2048, dtype=torch.bfloat16)
    weight = torch.empty(2, 2048, 256)
    whole = triton_gather._bucket(ids, ids, text, text, None, None, None)
    assert whole == "H=2048 bfloat16 positions<=16384"
    factored = triton_gather._bucket(ids[:, :1], ids, text, None, weight, None, None)
    assert factored == "H=2048 bfloat16 positions<=1024 F=256"
    gradient = torch.empty(300, 1000, 7, device="meta")
    found = triton_gather._backward_bucket(gradient, gradient)
    assert found == "H=7 float32 positions>262144"


COMPILED = """
from bench.aot_table import aot, gathered, torch
names = set()
for dtype in (torch.bfloat16, torch.float32):
    for factored in (False, True):
        for kernel in aot.compiled(gathered(dtype, factored), CAPABILITY):
            row = aot.figures(kernel)
            names.add(row["kernel"])
            assert not aot.faults(row, CAPABILITY), row
            assert row["instructions"]["STG.E.128"], row
            if row["kernel"] != "multiply_rows":
                assert row["instructions"]["LDG.E.128"], row
                continue
            assert row["instructions"]["LDGSTS"], row
            matrix = "HGMMA" if CAPABILITY == 90 else "HMMA"
            assert dtype == torch.float32 or row["instructions"][matrix], row
assert names == {"copy_rows", "multiply_rows", "sum_chunks", "sum_partials"}, names
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_code(run_python, capability):
    """No spills; 16 bytes at a time; tensor cores."""
    run_python(f"CAPABILITY = {capability}\n{COMPILED}")
