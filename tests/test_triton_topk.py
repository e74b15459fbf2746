"""The Triton top-K against the reference, bit for bit: on a GPU, or in triton's interpreter."""

from functools import partial

import pytest
import torch
from ops_cases import refused

from contrec_fast import ops
from contrec_fast.ops import triton_topk

pytest.importorskip("triton")
topk = pytest.importorskip("contrec_kernels.topk")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TILES = [  # held queries, or a loop over dimensions; parts of tiles
    topk.Tiles(16, 32, 64, 4, 2, 1, 64),
    topk.Tiles(16, 256, 16, 4, 2, 1, 256),
    topk.Tiles(64, 64, 32, 4, 2, 3, 128),
]


class Case:
    """Queries [B, D] and items [N, D] with whatever else a call takes, on the CPU."""

    def __init__(self, queries, vectors, k, histories=None, removed=(), **catalog):
        self.bonus = {name: catalog.pop(name) for name in ("matched", "pi") if name in catalog}
        self.queries, self.vectors, self.k, self.catalog = queries, vectors, k, catalog
        self.histories, self.removed = histories, removed

    def call(self, device="cpu", rows=slice(None), function=ops.cosine_topk, where=None, **options):
        """Lists of some queries, on the CPU; the catalog lies elsewhere where `where` says so."""

        def to(tensor, device=device):
            return tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor

        where = where or device
        moved = {name: to(tensor, where) for name, tensor in self.catalog.items()}
        catalog = ops.Catalog(to(self.vectors, where), **moved)
        if len(self.removed):
            catalog.remove(torch.as_tensor(self.removed, device=where))
        bonus = {name: to(part) for name, part in self.bonus.items()}
        if "matched" in bonus:
            bonus["matched"] = bonus["matched"][rows]
        if self.histories is not None:
            bonus["seen"] = ops.SeenLists.from_lists(self.histories, device)
            bonus["seen_rows"] = torch.arange(len(self.queries), device=device)[rows]
        queries = to(self.queries)[rows]
        lists = function(queries, catalog, self.k, **bonus, **options)
        return tuple(tensor.cpu() for tensor in lists)

    def check(self, device):
        """The reference's lists; returned."""
        expected = self.call(backend="reference")
        same(self.call(device, backend="triton"), expected)
        assert ops.last_backend("cosine_topk") == "triton"
        return expected


def same(found, expected):
    """Ids are equal and scores are the same bits."""
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32))


def everything(batch, count, dim, k, dtype=torch.float32, longest=60, pi=0.1):
    """A case with all that a call can have."""
    return Case(
        torch.randn(batch, dim).to(dtype),
        torch.randn(count, dim).to(dtype),
        k,
        [torch.randint(count, (n,)).tolist() for n in torch.randint(longest, (batch,))],
        groups=torch.randint(-1, 6, (count,)),
        eligible=torch.rand(count) < 0.8,
        capacity=count + 37,
        removed=torch.randperm(count)[: count // 9],
        matched=torch.rand(batch, 8) < 0.4,
        pi=pi,
    )


@pytest.fixture
def attempts(monkeypatch):
    """How far each call of `search` had widened."""
    found, search = [], topk.search

    def record(*arguments, **options):
        found.append(options["widening"])
        return search(*arguments, **options)

    monkeypatch.setattr(topk, "search", record)
    return found


SHAPES = [(1, 1, 1, 1), (3, 127, 3, 127), (5, 129, 127, 3), (7, 3000, 33, 20), (3, 9000, 64, 200)]


@pytest.mark.parametrize("batch, count, dim, k", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(kernel_device, batch, count, dim, k, dtype):
    everything(batch, count, dim, k, dtype).check(kernel_device)


def test_without_anything_else(kernel_device):
    Case(torch.randn(3, 64), torch.randn(3000, 64), 20).check(kernel_device)


def one_repeated_vector():
    return Case(torch.randn(2, 9), torch.randn(1, 9).repeat(3000, 1), 7)


def equal_scores():
    few = torch.randint(-1, 2, (3000, 3)).float()
    few[~few.any(1)] = 1.0
    return Case(torch.randint(-1, 2, (4, 3)).float(), few, 40)


def near_ties():
    queries = torch.randn(3, 32, dtype=torch.float64)
    vectors = queries.sum(0) + 1e-5 * torch.randn(3000, 32, dtype=torch.float64)
    return Case(queries, vectors, 10)


def all_seen():
    lists = [list(range(3000)), list(range(2999)), list(range(0, 3000, 16)), []]
    return Case(torch.randn(4, 5), torch.randn(3000, 5), 6, lists)


def all_best_seen():
    vectors = torch.randn(3000, 5)
    return Case(vectors[:1], vectors, 6, [(vectors @ vectors[0]).topk(2500).indices.tolist()])


def none_eligible():
    return Case(torch.randn(2, 5), torch.randn(3000, 5), 6, eligible=torch.zeros(3000).bool())


def three_eligible():
    eligible = torch.zeros(3000).bool()
    eligible[[7, 512, 2999]] = True
    return Case(torch.randn(2, 5), torch.randn(3000, 5), 6, eligible=eligible)


def negative_cosines(pi=0.5, k=3000):
    groups, matched = torch.arange(3000) % 3, torch.tensor([[True, False, False], [True] * 3])
    items = -torch.rand(3000, 5) - 0.1
    return Case(torch.ones(2, 5), items, k, groups=groups, matched=matched, pi=pi)


def few_negative_cosines():
    return negative_cosines(pi=3.0, k=5)


def a_huge_bonus():
    return everything(3, 3000, 8, 9, pi=1e30)


def norms(size):
    vectors = torch.randn(3000, 19)
    mixed = torch.where(torch.rand(3000, 1) < 0.5, vectors, vectors * size)
    return Case(torch.randn(3, 19) * size, mixed, 25)


def norms_beyond_squares():
    case = norms(1.0)
    case.vectors = case.vectors.double() * 10.0 ** torch.randint(-140, 140, (3000, 1)).double()
    case.queries = case.queries.double() * torch.tensor([[1e-130], [1.0], [1e130]])
    return case


def queries_without_direction():
    queries = torch.randn(4, 6)
    queries[0], queries[1, 2], queries[2, 0] = 0.0, torch.inf, torch.nan
    return Case(queries, torch.randn(3000, 6), 9)


def negative_zeros():
    return Case(-torch.ones(1, 2), torch.tensor([[0.0, 1.0], [1.0, -1.0], [1.0, 0.0]]), 3)


def sorted_items():
    """All that one query wants lies together."""
    vectors = torch.randn(4000, 8)
    return Case(vectors[:2], vectors[(vectors @ vectors[0]).argsort()], 12)


def nothing_matches_anything():
    return Case(torch.randn(2, 4), torch.randn(99, 4), 5, matched=torch.zeros(2, 0).bool(), pi=0.2)


def no_queries():
    return everything(0, 50, 4, 3)


ADVERSARIAL = [
    one_repeated_vector, equal_scores, near_ties, all_seen, all_best_seen, none_eligible,
    three_eligible, negative_cosines, few_negative_cosines, a_huge_bonus, partial(norms, 1e-42),
    partial(norms, 1e37), norms_beyond_squares, queries_without_direction, negative_zeros,
    sorted_items, nothing_matches_anything, no_queries,
]  # fmt: skip


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial(kernel_device, case):
    case().check(kernel_device)


@pytest.mark.parametrize("tiles", TILES)
def test_independent_of_tiles_and_marks(kernel_device, tiles, monkeypatch):
    case = everything(17, 3000, 40, 9, longest=9)
    monkeypatch.setattr(topk, "_tiles", lambda queries: tiles)
    monkeypatch.setattr(topk, "MARKS", 17 * 40)  # three spans, the last one shorter
    case.check(kernel_device)


def test_independent_of_the_batch(kernel_device):
    case = everything(33, 3000, 12, 9)
    expected = case.call(backend="reference")
    for rows in (torch.tensor([4]), torch.randperm(33)[:17]):
        found = case.call(kernel_device, rows, backend="triton")
        same(found, (expected[0][rows], expected[1][rows]))


def test_well_separated_items_need_one_attempt(kernel_device, attempts):
    Case(torch.randn(9, 64), torch.randn(6000, 64), 20).check(kernel_device)
    assert set(attempts) == {0}


@pytest.mark.parametrize("case", [one_repeated_vector, near_ties, all_best_seen])
def test_no_list_is_taken_that_is_not_certain(kernel_device, attempts, case):
    case().check(kernel_device)
    assert max(attempts) > 0


@pytest.mark.parametrize("pi", [0.0, 0.3])
def test_bounds_are_bounds(kernel_device, pi):
    """With the last score itself as the threshold, no item of a list may be missing."""
    case = everything(16, 3000, 50, 30, pi=pi)
    expected = case.call(backend="reference")

    def with_floors(queries, catalog, k, seen, seen_rows, matched, pi):
        scores, ids, certified = topk.search(
            queries, catalog.vectors, catalog.norms, catalog.scan, catalog.errors, catalog.groups,
            catalog.eligible, k, matched, pi, seen.offsets, seen.ids, seen_rows,
            floors=expected[0][:, -1].to(queries.device),
        )  # fmt: skip
        assert certified.all()
        return scores, ids

    same(case.call(kernel_device, function=with_floors), expected)


@pytest.mark.parametrize("count, chunk", [(7, 1), (300, 97), (5000, 2400), (700, 10**6)])
def test_streamed_catalogs(kernel_device, count, chunk, tmp_path):
    case = everything(3, count, 16, min(9, count))
    stored = torch.from_file(str(tmp_path / "vectors"), shared=True, size=case.vectors.numel())
    case.vectors = stored.view_as(case.vectors).copy_(case.vectors)
    expected = case.call(backend="reference")
    same(case.call(kernel_device, function=ops.stream_topk, where="cpu", chunk=chunk), expected)


@pytest.mark.parametrize("case", [equal_scores, all_seen, near_ties, queries_without_direction])
def test_streamed_adversarial(kernel_device, case):
    case = case()
    expected = case.call(backend="reference")
    same(case.call(kernel_device, function=ops.stream_topk, where="cpu", chunk=2300), expected)


@pytest.mark.parametrize("k, split", [(1, 1), (9, 5), (30, 20), (60, 59)])
def test_merged_lists(kernel_device, k, split):
    """Of the two parts of a catalog, with many equal scores and short lists."""
    vectors = torch.randint(1, 3, (60, 2)).float()
    eligible = torch.rand(60) < 0.7
    queries = torch.randn(7, 2)

    def lists(rows):
        part = Case(queries, vectors[rows], min(k, len(vectors[rows])), eligible=eligible[rows])
        return part.call(backend="reference")

    first, second = lists(slice(split)), lists(slice(split, None))
    second = second[0], second[1] + torch.where(second[1] < 0, 0, split)
    same(topk.merge_lists(first, second, k), lists(slice(None)))


STREAM = {
    "queries": torch.ones(3, 2),
    "catalog": ops.Catalog(torch.ones(4, 2), torch.tensor([0, 1, 2, -1])),
    "k": 2,
}
LISTS, BEYOND = (ops.SeenLists.from_lists(lists) for lists in ([[0], [3]], [[4]]))
BAD_STREAMS = [
    (TypeError, "catalog", {"catalog": torch.ones(4, 2)}),
    (ValueError, "queries", {"queries": torch.ones(3, 5)}),
    (TypeError, "queries", {"queries": torch.ones(3, 2).long()}),
    (ValueError, "k", {"k": 5}),
    (ValueError, "chunk", {"chunk": 0}),
    (ValueError, "pi", {"pi": -1.0}),
    (ValueError, "matched", {"matched": torch.ones(3, 2).bool()}),
    (ValueError, "seen, seen_rows", {"seen": LISTS}),
    (TypeError, "seen_rows", {"seen": LISTS, "seen_rows": torch.ones(3)}),
    (
        ValueError,
        "seen",
        {"seen": ops.SeenLists.from_lists([[4]]), "seen_rows": torch.ones(3).long()},
    ),
]


@pytest.mark.parametrize("error, name, arguments", BAD_STREAMS)
def test_bad_streams(error, name, arguments):
    with refused(error, name):
        ops.stream_topk(**STREAM | arguments)


def test_what_it_cannot_serve_is_refused(monkeypatch):
    wide = Case(torch.ones(1, 5000), torch.ones(2, 5000), 1)
    with refused(ValueError, "backend"):
        wide.call(backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refused(ValueError, "backend"):
        Case(torch.ones(1, 2), torch.ones(2, 2), 1).call(backend="triton")


def test_buckets():
    def bucket(batch, count, dim, k, pi=0.0):
        queries, vectors = torch.empty(batch, dim), torch.empty(count, dim, device="meta")
        matched = torch.ones(batch, 1).bool()
        return triton_topk._bucket(queries, vectors, *[None] * 5, k, matched, pi, *[None] * 3)

    assert bucket(64, 1_000_000, 512, 20) == "D=512 float32 queries<=64 items<=1048576 k<=32"
    assert "bonus queries>1024 items>16777216 k>1024" in bucket(1025, 2**24 + 1, 8, 3000, 0.1)


COMPILED = """
from bench.aot_table import aot, top_k
names = set()
for kernel in aot.compiled(top_k(BATCH, DIM), CAPABILITY):
    row, ptx = aot.figures(kernel), kernel.asm["ptx"]
    names.add(row["kernel"])
    assert not aot.faults(row, CAPABILITY), row
    if row["kernel"] in ("prepare_queries", "rescore"):  # no product may be fused with a sum
        assert "mul.f64" in ptx.replace(".rn", "") and "fma.rn.f64" not in ptx, row
        assert "div.rn.f64" in ptx and ("sqrt.rn.f64" in ptx) == (row["kernel"] != "rescore"), row
    if row["kernel"] in ("sample_maxima", "mark_candidates"):
        matrix = "HGMMA" if CAPABILITY == 90 and BATCH > 32 else "HMMA"
        assert row["instructions"][matrix] and row["instructions"]["LDGSTS"], row
assert len(names) == 7, names
"""


@pytest.mark.slow
@pytest.mark.parametrize("batch, dim, capability", [(64, 512, 90), (1024, 512, 90), (1, 64, 80)])
def test_compiled_code(run_python, batch, dim, capability):
    """No spills, tensor cores and asynchronous copies; exact arithmetic where it must be."""
    run_python(f"BATCH, DIM, CAPABILITY = {batch}, {dim}, {capability}\n{COMPILED}")
