"""The C++ `cosine_topk`: every instruction set and number of threads gives the reference's bits."""

import mmap
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrec_fast import native, ops
from contrec_fast.ops.dispatch import resolve

SETS = native.topk_instruction_sets()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(
    not SETS, reason=f"the C++ extension is absent: {native.why_missing()}"
)


@pytest.fixture
def threads():
    """threads(n): PyTorch, and with it the extension, works with n threads; restored later."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments(queries, catalog, k, matched=None, pi=0.0, histories=None):
    """The operator's tensors for a call."""
    seen = (None, None, None)
    if histories is not None:
        lists = ops.SeenLists.from_lists(histories)
        seen = (lists.offsets, lists.ids, torch.arange(len(queries)))
    return (
        queries, catalog.vectors, catalog.norms, catalog.scan, catalog.errors, catalog.groups,
        catalog.eligible, k, matched, pi, *seen,
    )  # fmt: skip


def compare(given, isas=SETS, expected=None):
    """Each instruction set's lists are the reference's, bit for bit."""
    if expected is None:
        expected = resolve("cosine_topk", "reference", *given)(*given)
    for isa in isas:
        found = native.cosine_topk(*given, isa=isa)
        assert torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32)), isa
        assert torch.equal(found[1], expected[1]), isa
    return expected


def shop(count, dim, batch, dtype=torch.float32, scale=1.0):
    """A random case: groups, stock, histories and a bonus."""
    vectors = (torch.randn(count, dim, dtype=torch.float64) * scale).to(dtype)
    vectors[~(vectors.double().square().sum(1) > 0)] = 1
    catalog = ops.Catalog(vectors, torch.randint(-1, 40, (count,)), torch.rand(count) < 0.8)
    histories = [torch.randint(0, count, (row % 60,)).tolist() for row in range(batch)]
    matched = torch.rand(batch, 41) < 0.1
    return torch.randn(batch, dim).to(dtype), catalog, matched, histories


def test_which_instruction_sets():
    found = native.build_info()["cpu_features"]
    needed = {
        "avx512_bf16": ("avx512f", "avx512bw", "avx512_bf16"),
        "avx512f": ("avx512f",),
        "avx2": ("avx2", "fma"),
        "portable": (),
    }
    assert SETS == [name for name, wants in needed.items() if all(found[want] for want in wants)]
    with pytest.raises(ValueError, match="^isa: expected .*, got sse9$"):
        native.cosine_topk(*arguments(torch.ones(1, 1), ops.Catalog(torch.ones(1, 1)), 1), "sse9")


# Batches of whole rows and of packed panels (16 and 64 queries at a time), odd widths.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, dim", [(1, 1), (1, 129), (3, 64), (17, 3), (65, 33), (130, 127)])
def test_shapes(batch, dim, dtype):
    for count in (1, 7, 129, 2000):
        queries, catalog, matched, histories = shop(count, dim, batch, dtype)
        for k in {1, min(20, count), min(500, count), count}:
            compare(arguments(queries, catalog, k, matched, 0.1, histories))


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_threads(number, threads):
    for batch in (1, 40):
        queries, catalog, matched, histories = shop(20_000, 40, batch)
        given = arguments(queries, catalog, 30, matched, 0.2, histories)
        threads(1)
        expected = compare(given, SETS[:1])
        threads(number)
        for _ in range(3):
            compare(given, SETS[:1], expected)


def test_more_queries_than_a_block_holds():
    queries, catalog, matched, histories = shop(300, 16, 777)
    compare(arguments(queries, catalog, 10, matched, 0.1, histories))
    # k so large that candidates of fewer than 16 queries fit the memory allowed for them
    queries, catalog = torch.randn(5, 4), ops.Catalog(torch.randn(700_000, 4))
    compare(arguments(queries, catalog, 345_000), SETS[:1])


@pytest.mark.parametrize("batch", [1, 50])
@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-6, 1e-4, 1e-2])
def test_near_ties(spread, batch):
    """Scores closer together than the scan's error, many more of them than are kept."""
    center = torch.randn(1, 24, dtype=torch.float64)
    vectors = center + spread * torch.randn(3000, 24, dtype=torch.float64)
    queries = center + 0.1 * torch.randn(batch, 24, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        catalog = ops.Catalog(vectors.to(dtype), torch.arange(3000) % 3)
        matched = torch.rand(batch, 3) < 0.5
        for sign, pi in [(1, 0.0), (1, 1e-4), (-1, 0.3)]:
            given = arguments(sign * queries.to(dtype), catalog, 10, matched, pi)
            compare(given, SETS)
            if spread <= 1e-6:
                assert native.topk_statistics()["crowded"] > 0


def test_statistics_of_an_easy_case():
    compare(arguments(torch.randn(40, 64), ops.Catalog(torch.randn(5000, 64)), 10), SETS[:1])
    found = native.topk_statistics()
    assert found["crowded"] == 0
    assert 40 * 10 <= found["rescored"] < found["kept"] < 40 * 5000 / 2


@pytest.mark.parametrize("dtype, scale", [
    (torch.float32, 1e-44), (torch.float32, 1e-38), (torch.float32, 1e37),
    (torch.float16, 1e-7), (torch.bfloat16, 1e-39), (torch.bfloat16, 1e37),
    (torch.float64, 1e-130), (torch.float64, 1e-150), (torch.float64, 1e130),
])  # fmt: skip
def test_extreme_norms(dtype, scale):
    """Denormal and huge elements; float64 beyond the norms that a scan copy is made of."""
    queries, catalog, matched, histories = shop(300, 19, 20, dtype)
    _, tiny, *_ = shop(300, 19, 1, dtype, scale)
    vectors = torch.where(torch.rand(300, 1) < 0.5, catalog.vectors, tiny.vectors)
    mixed = ops.Catalog(vectors, catalog.groups)
    small = (queries.double() * scale).to(dtype)
    for asked in (queries, small, torch.where(torch.rand(20, 1) < 0.5, queries, small)):
        compare(arguments(asked, mixed, 25, matched, 0.5, histories))


def test_large_bonus_and_many_groups():
    vectors = torch.randn(500, 8)
    catalog = ops.Catalog(vectors, torch.arange(500))
    for pi in (1e-12, 1.0, 1e6, 1e30):
        compare(arguments(torch.randn(33, 8), catalog, 9, torch.rand(33, 500) < 0.02, pi))


def test_queries_without_a_direction():
    queries, catalog, matched, histories = shop(400, 12, 20)
    queries[[0, 5]] = 0
    queries[7] = -0.0
    queries[3, 4], queries[11, 0], queries[19] = torch.inf, -torch.inf, torch.nan
    for k in (9, 400):
        scores, ids = compare(arguments(queries, catalog, k, matched, 0.5, histories))
        assert (ids[[3, 11, 19]] == -1).all() and scores[[3, 11, 19]].eq(-torch.inf).all()
        left = sorted(set(catalog.eligible.nonzero()[:, 0].tolist()) - set(histories[5]))[:k]
        assert ids[5, : len(left)].tolist() == left


def test_items_added_and_removed():
    queries, catalog, matched, _ = shop(100, 20, 30)
    for count in (1, 50, 500):
        ids = catalog.add(torch.randn(count, 20), torch.randint(-1, 40, (count,)))
        catalog.remove(ids[torch.rand(count) < 0.3])
        _, found = compare(arguments(queries, catalog, len(catalog), matched, 0.1))
        alive = catalog.eligible.nonzero()[:, 0]
        assert len(catalog.vectors) >= len(catalog) and torch.equal(
            found[:, : len(alive)].sort(dim=1).values, alive.expand(30, -1)
        )


def test_catalog_in_files(tmp_path):
    """Vectors and scan copy memory-mapped, one of them read-only."""
    queries, _, matched, histories = shop(3000, 48, 20)
    torch.randn(3000, 48).numpy().tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float32, "r", shape=(3000, 48))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        vectors = torch.from_numpy(mapped)
    file = str(tmp_path / "scan")
    scan = torch.from_file(file, shared=True, size=3000 * 48, dtype=torch.bfloat16)
    catalog = ops.Catalog(vectors, torch.arange(3000) % 40, scan=scan.reshape(3000, 48))
    compare(arguments(queries, catalog, 20, matched, 0.1, histories))


def unbacked(*shape, dtype):
    """A tensor of zeros that takes memory only where it is written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).reshape(shape)


@pytest.mark.parametrize("batch", [1, 20])
def test_more_than_two_to_the_31_elements(batch):
    """Items at the start, the middle and the end of 8 GB of vectors."""
    dim = 1 << 16
    count = (1 << 15) + 100
    items = torch.tensor([0, 1, 1 << 14, (1 << 15) - 1, 1 << 15, count - 1])
    vectors = unbacked(count, dim, dtype=torch.float32)
    scan = unbacked(count, dim, dtype=torch.bfloat16)
    assert vectors.numel() > 2**31
    small = ops.Catalog(torch.randn(len(items), dim))
    norms, errors = torch.ones(count, dtype=torch.float64), torch.zeros(count)
    eligible = torch.zeros(count, dtype=torch.bool)
    for tensor, of in [(vectors, "vectors"), (scan, "scan"), (norms, "norms"), (errors, "errors")]:
        tensor[items] = getattr(small, of)
    eligible[items] = True
    groups = torch.full((count,), -1, dtype=torch.int32)
    queries = torch.randn(batch, dim)
    given = arguments(queries, small, 6)
    expected = resolve("cosine_topk", "reference", *given)(*given)
    found = native.cosine_topk(
        queries, vectors, norms, scan, errors, groups, eligible, 6, None, 0.0, None, None, None
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], items[expected[1]])


def test_rows_beyond_the_seen_lists():
    seen, rows = ops.SeenLists.from_lists([[0], [1]]), torch.tensor([0, 2])
    catalog = ops.Catalog(torch.randn(5, 3))
    for backend in ("cpp", "reference"):
        with pytest.raises(IndexError):
            ops.cosine_topk(
                torch.ones(2, 3), catalog, 1, seen=seen, seen_rows=rows, backend=backend
            )


def test_auto_takes_it():
    ops.cosine_topk(torch.ones(2, 3), ops.Catalog(torch.ones(4, 3)), 1)
    assert ops.last_backend("cosine_topk") == "cpp"


def test_inputs_that_are_not_contiguous():
    catalog = ops.Catalog(torch.randn(9, 200).T, torch.arange(200) % 4)
    matched = (torch.rand(4, 6) < 0.5).T
    compare(arguments(torch.randn(9, 6).T, catalog, 7, matched, 0.3), SETS[:1])


@settings(max_examples=80, deadline=None, derandomize=False)
@given(data=st.data())
def test_any_case(data):
    draw = data.draw
    seed, count = draw(st.integers(0, 2**32)), draw(st.integers(1, 300))
    dim, batch = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    torch.manual_seed(seed)
    dtype = draw(st.sampled_from(DTYPES))
    levels = draw(st.sampled_from([2, 3, 50, 10_000]))  # few levels: ties and duplicates
    vectors = (torch.randint(-levels, levels + 1, (count, dim)) / levels).to(dtype)
    vectors[~vectors.any(1)] = 1
    queries = (torch.randint(-levels, levels + 1, (batch, dim)) / levels).to(dtype)
    groups, eligible = torch.randint(-1, 4, (count,)), torch.rand(count) < draw(st.floats(0, 1))
    matched, pi = torch.rand(batch, 4) < 0.4, draw(st.sampled_from([0.0, 0.05, 2.0]))
    histories = [torch.randint(0, count, (draw(st.integers(0, 9)),)).tolist()] * batch
    k = draw(st.integers(1, count))
    catalog = ops.Catalog(vectors, groups, eligible)
    isa = draw(st.sampled_from(SETS))
    compare(arguments(queries, catalog, k, matched, pi, histories), [isa])
