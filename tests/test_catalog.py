"""`Catalog` and `SeenLists`: what they hold, items that come and go, errors."""

import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from ops_cases import refused

from contrec_fast import ops


def test_catalog_attributes():
    vectors = torch.randn(6, 3).bfloat16()
    catalog = ops.Catalog(vectors, torch.tensor([2, -1, 0, 2, 5, -1], dtype=torch.int32))
    assert len(catalog) == 6 and catalog.num_groups == 6
    torch.testing.assert_close(catalog.norms, vectors.double().norm(dim=1), rtol=1e-14, atol=0)
    dtypes = {"norms": torch.float64, "scan": torch.bfloat16, "errors": torch.float32}
    dtypes |= {"vectors": torch.bfloat16, "groups": torch.int32, "eligible": torch.bool}
    assert {name: getattr(catalog, name).dtype for name in dtypes} == dtypes
    assert catalog.vectors.data_ptr() == vectors.data_ptr()
    assert catalog.eligible.all() and ops.Catalog(vectors).num_groups == 0
    assert not ops.Catalog(torch.randn(2, 2, requires_grad=True)).vectors.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-7, 6e4])
def test_error_bounds(size, dtype):
    """||unit vector - scan row||, in 60 digits, is below the bound and not far below."""
    vectors = (torch.rand(9, 33) * size).to(dtype)
    vectors[0] = 0
    vectors[0, 0] = size
    vectors[1] = size
    catalog = ops.Catalog(vectors)
    with localcontext() as context:
        context.prec = 60
        for row in range(9):
            exact = [Decimal(x) for x in vectors[row].double().tolist()]
            norm = sum(x * x for x in exact).sqrt()
            scan = [Decimal(x) for x in catalog.scan[row].double().tolist()]
            error = sum((x / norm - y) ** 2 for x, y in zip(exact, scan)).sqrt()
            bound = Decimal(float(catalog.errors[row]))
            assert error <= bound <= error * Decimal("1.0001") + Decimal(2) ** -39


@pytest.mark.parametrize("size", [1e-130, 1e130])
def test_rows_that_only_exact_scores_can_judge(size):
    vectors = torch.rand(3, 5, dtype=torch.float64)
    vectors[1] *= size
    catalog = ops.Catalog(vectors)
    assert catalog.errors.isinf().tolist() == [False, True, False] and not catalog.scan[1].any()


def same(catalog, expected):
    count = len(catalog)
    assert count == len(expected) and catalog.num_groups == expected.num_groups
    for name in ("vectors", "norms", "scan", "errors", "groups", "eligible"):
        assert torch.equal(getattr(catalog, name)[:count], getattr(expected, name)), name
        assert len(getattr(catalog, name)) == len(catalog.vectors)
    assert not catalog.eligible[count:].any()


@pytest.mark.parametrize("capacity", [None, 5, 64])
def test_items_added_are_as_if_there_from_the_start(capacity):
    vectors, groups = torch.randn(64, 7), torch.randint(-1, 9, (64,))
    eligible = torch.rand(64) < 0.5
    catalog = ops.Catalog(vectors[:5], groups[:5], eligible[:5], capacity)
    start, places = 5, set()
    for count in (0, 1, 3, 25, 30):
        part = slice(start, start + count)
        ids = catalog.add(vectors[part], groups[part], eligible[part])
        assert ids.dtype == torch.int64 and ids.tolist() == list(range(64))[part]
        start += count
        places.add(len(catalog.vectors))
        same(catalog, ops.Catalog(vectors[:start], groups[:start], eligible[:start]))
    assert places == ({64} if capacity == 64 else {5, 10, 34, 68})
    assert catalog.add(torch.ones(1, 7)).tolist() == [64]
    assert catalog.groups[64] == -1 and catalog.eligible[64]


def test_items_removed_and_out_of_stock():
    catalog = ops.Catalog(torch.randn(6, 3), capacity=8)
    catalog.remove(torch.tensor([1, 4], dtype=torch.int32))
    assert len(catalog) == 6 and catalog.eligible.nonzero().flatten().tolist() == [0, 2, 3, 5]
    catalog.set_eligible(torch.tensor([0, 2]), False)
    catalog.set_eligible(torch.tensor([2, 3]), torch.tensor([True, False]))
    assert catalog.eligible.nonzero().flatten().tolist() == [2, 5]
    for ids in ([1], [6], [-1], [2, 4]):
        with refused(ValueError, "ids"):
            catalog.set_eligible(torch.tensor(ids), True)
        with refused(ValueError, "ids"):
            catalog.remove(torch.tensor(ids))
    with refused(TypeError, "ids"):
        catalog.remove([2])
    with refused(ValueError, "eligible"):
        catalog.set_eligible(torch.tensor([2]), torch.tensor([True, False]))
    assert catalog.eligible.nonzero().flatten().tolist() == [2, 5]
    assert catalog.add(torch.randn(3, 3)).tolist() == [6, 7, 8]
    assert catalog.eligible.nonzero().flatten().tolist() == [2, 5, 6, 7, 8]


def test_the_given_tensors_are_never_written_to():
    vectors, groups = torch.randn(4, 3), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    eligible = torch.ones(4, dtype=torch.bool)
    before = [given.clone() for given in (vectors, groups, eligible)]
    catalog = ops.Catalog(vectors, groups, eligible)
    catalog.remove(torch.tensor([0]))
    catalog.add(catalog.vectors[:2], catalog.groups[:2])
    assert torch.equal(catalog.vectors[4:6], vectors[:2])
    catalog.set_eligible(torch.tensor([2]), False)
    assert all(torch.equal(*pair) for pair in zip((vectors, groups, eligible), before))


def test_vectors_and_scan_in_files(tmp_path):
    vectors = torch.randn(50, 6)
    vectors.numpy().tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float32, "r", shape=(50, 6))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        given = torch.from_numpy(mapped)
    scan = torch.from_file(
        str(tmp_path / "scan"), shared=True, size=300, dtype=torch.bfloat16
    ).reshape(50, 6)
    catalog = ops.Catalog(given, scan=scan)
    assert catalog.vectors.data_ptr() == given.data_ptr()
    assert catalog.scan.data_ptr() == scan.data_ptr()
    same(catalog, ops.Catalog(vectors))
    catalog.add(torch.ones(1, 6))
    same(catalog, ops.Catalog(torch.cat((vectors, torch.ones(1, 6)))))


@pytest.mark.parametrize("row, bad", [(0, 0.0), (2, float("nan")), (1, float("inf"))])
def test_a_bad_addition_changes_nothing(row, bad):
    vectors = torch.randn(4, 3)
    catalog, more = ops.Catalog(vectors), torch.ones(3, 3)
    more[row] = bad
    with refused(ValueError, "vectors"):
        catalog.add(more)
    with refused(ValueError, "vectors"):
        catalog.add(torch.ones(2, 4))
    with refused(TypeError, "vectors"):
        catalog.add(torch.ones(2, 3).double())
    with refused(ValueError, "groups"):
        catalog.add(torch.ones(2, 3), torch.tensor([0]))
    same(catalog, ops.Catalog(vectors))


def test_seen_lists():
    seen = ops.SeenLists.from_lists(row for row in ([3, 1, 3], (), torch.tensor([0])))
    assert len(seen) == 3 and seen.bound == 4
    assert seen.offsets.tolist() == [0, 3, 3, 4] and seen.ids.tolist() == [1, 3, 3, 0]
    empty = ops.SeenLists.from_lists([])
    assert len(empty) == 0 and empty.bound == 0
    same = ops.SeenLists(seen.offsets.int(), seen.ids.int())
    assert same.offsets.dtype == same.ids.dtype == torch.int64


V = torch.ones(4, 2)
NAN, INF = float("nan"), float("inf")
BAD_CATALOGS = [
    (TypeError, "vectors", {"vectors": [[1.0, 2.0]]}),
    (TypeError, "vectors", {"vectors": torch.ones(4, 2, dtype=torch.int64)}),
    (ValueError, "vectors", {"vectors": torch.ones(4)}),
    (ValueError, "vectors", {"vectors": torch.ones(0, 2)}),
    (ValueError, "vectors", {"vectors": torch.ones(4, 0)}),
    (ValueError, "vectors", {"vectors": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}),
    (ValueError, "vectors", {"vectors": torch.tensor([[1.0, NAN], [0.0, 1.0]])}),
    (ValueError, "vectors", {"vectors": torch.tensor([[1.0, -INF], [0.0, 1.0]])}),
    (TypeError, "groups", {"groups": torch.zeros(4)}),
    (ValueError, "groups", {"groups": torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "groups", {"groups": torch.tensor([0, 1, -2, 0])}),
    (ValueError, "groups", {"groups": torch.zeros(4, dtype=torch.int64, device="meta")}),
    (ValueError, "groups", {"groups": torch.full((4,), 2**31 - 1)}),
    (ValueError, "capacity", {"capacity": 3}),
    (ValueError, "capacity", {"capacity": 4.0}),
    (TypeError, "scan", {"scan": torch.ones(4, 2)}),
    (ValueError, "scan", {"scan": torch.ones(4, 2, dtype=torch.bfloat16), "capacity": 5}),
    (TypeError, "eligible", {"eligible": torch.ones(4)}),
    (ValueError, "eligible", {"eligible": torch.ones(5, dtype=torch.bool)}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_CATALOGS)
def test_bad_catalogs(error, name, arguments):
    with refused(error, name):
        ops.Catalog(**({"vectors": V} | arguments))


BAD_SEEN_LISTS = [
    (TypeError, "offsets", [0.0, 1.0], [0]),
    (ValueError, "offsets", [], []),
    (ValueError, "offsets", [0], [1]),
    (ValueError, "offsets", [1, 2], [0, 0]),
    (ValueError, "offsets", [0, 1], [0, 0]),
    (ValueError, "offsets", [0, 2, 1, 3], [0, 1, 2]),
    (ValueError, "offsets", [[0, 1]], [0]),
    (TypeError, "ids", [0, 1], [0.5]),
    (ValueError, "ids", [0, 2], [1, 0]),
    (ValueError, "ids", [0, 0, 1, 4], [9, 1, 2, 1]),
    (ValueError, "ids", [0, 1], [-1]),
    (ValueError, "ids", [0, 1], [[0]]),
]


@pytest.mark.parametrize("error, name, offsets, ids", BAD_SEEN_LISTS)
def test_bad_seen_lists(error, name, offsets, ids):
    offsets, ids = (torch.tensor(x, dtype=None if x else torch.int64) for x in (offsets, ids))
    with refused(error, name):
        ops.SeenLists(offsets, ids)
