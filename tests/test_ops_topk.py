"""`cosine_topk` against the documented score, written in numpy."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import refused

from contrec_fast import ops


def servable(backend):
    """The backend as a test's parameter, skipped with the reason where it cannot serve here."""
    try:
        ops.cosine_topk(torch.ones(1, 1), ops.Catalog(torch.ones(1, 1)), 1, backend=backend)
    except ValueError as error:
        return pytest.param(backend, marks=pytest.mark.skip(reason=str(error)))
    return backend


BACKENDS = [servable(backend) for backend in ops.backends()["cosine_topk"]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tree_sum(terms):
    """The documented order: pad to a power of two, then add the upper half to the lower."""
    size = 1
    while size < terms.shape[-1]:
        size *= 2
    padded = np.zeros((*terms.shape[:-1], size))
    padded[..., : terms.shape[-1]] = terms
    while size > 1:
        size //= 2
        padded = padded[..., :size] + padded[..., size:]
    return padded[..., 0]


def oracle(queries, vectors, k, groups=None, eligible=None, matched=None, pi=0.0, histories=None):
    """Brute force over all items: float64 scores, rounded once, ties by lower id."""
    queries, vectors = queries.double().numpy(), vectors.double().numpy()
    norms = np.sqrt(tree_sum(vectors * vectors))
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1)
    for row, query in enumerate(queries):
        scale = np.sqrt(tree_sum(query * query)) * norms
        score = tree_sum(query * vectors) / np.where(scale == 0, 1, scale)
        if matched is not None and groups is not None:
            agrees = [g >= 0 and bool(matched[row, g]) for g in groups.tolist()]
            score = np.where(agrees, score * (1.0 + pi), score)
        excluded = set(histories[row]) if histories is not None else set()
        allowed = [
            item
            for item in range(len(vectors))
            if item not in excluded and (eligible is None or eligible[item])
        ]
        score = score.astype(np.float32)
        order = sorted(allowed, key=lambda item: (-score[item], item))[:k]
        scores[row, : len(order)], ids[row, : len(order)] = score[order], order
    return torch.from_numpy(scores), torch.from_numpy(ids)


def compare(
    queries, vectors, k, groups=None, eligible=None, histories=None, backend="auto", **bonus
):
    """Scores and ids of the operation are the oracle's, exactly."""
    catalog = ops.Catalog(vectors, groups, eligible)
    seen = rows = None
    if histories is not None:
        seen, rows = ops.SeenLists.from_lists(histories), torch.arange(len(queries))
    scores, ids = ops.cosine_topk(
        queries, catalog, k, seen=seen, seen_rows=rows, backend=backend, **bonus
    )
    assert scores.shape == ids.shape == (len(queries), k)
    assert scores.dtype == torch.float32 and ids.dtype == torch.int64
    expected = oracle(queries, vectors, k, groups, eligible, histories=histories, **bonus)
    assert torch.equal(scores, expected[0])
    assert torch.equal(ids, expected[1])
    return scores, ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, count, dim", [(1, 1, 1), (3, 127, 3), (5, 129, 127), (2, 700, 64)])
def test_against_brute_force(batch, count, dim, dtype, backend):
    queries, vectors = torch.randn(batch, dim).to(dtype), torch.randn(count, dim).to(dtype)
    for k in {1, 3, min(20, count), count}:
        if k <= count:
            compare(queries, vectors, k, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pi", [0.0, 0.05, 0.1, 3.0])
def test_bonus_eligibility_and_histories(pi, backend):
    queries, vectors = torch.randn(9, 33), torch.randn(400, 33)
    groups = torch.randint(-1, 6, (400,))
    matched = torch.rand(9, 8) < 0.4  # more groups than the catalog has
    matched[0], matched[1] = True, False
    eligible = torch.rand(400) < 0.5
    histories = [torch.randint(0, 400, (n,)).tolist() for n in (0, 1, 5, 50, 399, 0, 20, 20, 3)]
    histories[3] += histories[3]  # items may be listed twice
    bonus = {"matched": matched, "pi": pi, "backend": backend}
    compare(queries, vectors, 7, groups, eligible, histories, **bonus)
    compare(queries, vectors, 400, groups, eligible, histories, **bonus)
    compare(queries, vectors, 7, groups, **bonus)
    compare(queries, vectors, 7, groups.int(), histories=histories, **bonus)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_cosines_with_a_bonus(backend):
    """The bonus multiplies: a matching item of negative cosine falls."""
    vectors = -torch.rand(60, 5) - 0.1
    groups = torch.arange(60) % 3
    matched = torch.tensor([[True, False, False], [True, True, True]])
    scores, ids = compare(
        torch.ones(2, 5), vectors, 60, groups, matched=matched, pi=0.5, backend=backend
    )
    assert (scores < 0).all() and scores.min() < -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_id(backend):
    one = torch.randn(1, 17)
    _, ids = compare(torch.randn(3, 17), one.repeat(200, 1), 30, backend=backend)
    assert ids.tolist() == [list(range(30))] * 3
    scales = 2.0 ** torch.randint(-8, 8, (200, 1))  # powers of two leave the cosine's bits alone
    _, ids = compare(torch.randn(3, 17), one * scales, 200, backend=backend)
    assert ids.tolist() == [list(range(200))] * 3
    few = torch.randint(-1, 2, (300, 2)).float()
    few[~few.any(1)] = 1.0
    compare(torch.randint(-1, 2, (8, 2)).float(), few, 40, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_query_scores_zero(backend):
    vectors, groups = torch.randn(50, 4), torch.zeros(50, dtype=torch.int64)
    scores, ids = compare(
        torch.zeros(2, 4), vectors, 50, groups, matched=torch.ones(2, 1, dtype=torch.bool), pi=0.1,
        backend=backend,
    )  # fmt: skip
    assert not scores.any() and ids.tolist() == [list(range(50))] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-20, 1e20, 1e37])
def test_extreme_norms(size, backend):
    """Denormal and huge float32 vectors: squares and products of them fit float64 only."""
    vectors, queries = torch.randn(200, 19), torch.randn(3, 19)
    mixed = torch.where(torch.rand(200, 1) < 0.5, vectors, vectors * size)
    for items, asked in [(vectors * size, queries), (mixed, queries * size)]:
        compare(asked, items, 25, backend=backend)


@pytest.fixture
def rescored(monkeypatch):
    """Numbers of candidates that the reference rescored at a time."""
    module, counts = sys.modules["contrec_fast.ops.topk"], []

    def record(terms):
        counts.append(terms.shape[1])
        return ops.catalog.fixed_order_sum(terms)

    monkeypatch.setattr(module, "fixed_order_sum", record)
    return counts


@pytest.mark.parametrize("size", [1e-9, 1e-8, 1e-7, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_ties_are_resolved_by_taking_more_candidates(size, dtype, rescored):
    """More items than candidates, closer to each other than a float32 scan can tell."""
    queries = torch.randn(3, 64, dtype=torch.float64)
    vectors = torch.randn(1, 64, dtype=torch.float64) + queries.sum(0)
    vectors = vectors + size * torch.randn(900, 64, dtype=torch.float64)
    compare(queries.to(dtype), vectors.to(dtype), 10, backend="reference")
    assert max(rescored) > 10 + 5 + 32


def test_well_separated_items_need_no_second_look(rescored):
    compare(torch.randn(4, 64), torch.randn(900, 64), 10, backend="reference")
    assert set(rescored) == {10 + 5 + 32}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_whatever_pytorch_may_do_to_float32_products(precision, rescored):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(torch.randn(64, 64), torch.randn(3000, 64), 10, backend="reference")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_independent_of_the_batch(backend):
    queries, catalog = torch.randn(129, 64), ops.Catalog(torch.randn(2000, 64).bfloat16())
    seen = ops.SeenLists.from_lists([torch.randint(0, 2000, (n,)).tolist() for n in range(129)])
    rows = torch.randperm(129)
    scores, ids = ops.cosine_topk(queries, catalog, 20, seen=seen, seen_rows=rows, backend=backend)
    for size in (1, 2, 3, 17, 127):
        some = torch.randperm(129)[:size]
        part = ops.cosine_topk(
            queries[some], catalog, 20, seen=seen, seen_rows=rows[some], backend=backend
        )
        assert torch.equal(part[0], scores[some]) and torch.equal(part[1], ids[some])


def test_bitwise_independent_of_the_chunks(monkeypatch):
    queries, catalog = torch.randn(50, 32), ops.Catalog(torch.randn(500, 32))
    expected = ops.cosine_topk(queries, catalog, 9, backend="reference")
    for scan, rescore in [(1, 1), (500 * 7, 1 << 22), (1 << 24, 41 * 32 * 3)]:
        monkeypatch.setattr("contrec_fast.ops.topk.SCAN_ELEMENTS", scan)
        monkeypatch.setattr("contrec_fast.ops.topk.RESCORE_ELEMENTS", rescore)
        found = ops.cosine_topk(queries, catalog, 9, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_than_k_items_left(backend):
    vectors, queries = torch.randn(100, 6), torch.randn(4, 6)
    none = torch.zeros(100, dtype=torch.bool)
    scores, ids = compare(queries, vectors, 5, eligible=none, backend=backend)
    assert (ids == -1).all() and (scores == -torch.inf).all()
    everything = [list(range(100)), list(range(99)), list(range(1, 100)), []]
    scores, ids = compare(queries, vectors, 5, histories=everything, backend=backend)
    assert (ids[0] == -1).all() and ids[1].tolist() == [99, -1, -1, -1, -1]
    three = none.clone()
    three[[7, 50, 99]] = True
    _, ids = compare(queries, vectors, 100, eligible=three, backend=backend)
    assert ((ids >= 0).sum(1) == 3).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_rows_of_the_seen_lists(integers, backend):
    """Any user's list for any query, and -1 for none."""
    queries, vectors = torch.randn(6, 8), torch.randn(60, 8)
    lists = [[3, 1, 2], [], list(range(60)), [59, 0]]
    rows = torch.tensor([2, -1, 0, 0, 3, 1], dtype=integers)
    seen, catalog = ops.SeenLists.from_lists(lists), ops.Catalog(vectors)
    found = ops.cosine_topk(queries, catalog, 9, seen=seen, seen_rows=rows, backend=backend)
    histories = [lists[row] if row >= 0 else [] for row in rows.tolist()]
    expected = oracle(queries, vectors, 9, histories=histories)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    nobody = ops.SeenLists.from_lists([])
    none = torch.full((6,), -1, dtype=integers)
    found = ops.cosine_topk(queries, catalog, 9, seen=nobody, seen_rows=none, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, oracle(queries, vectors, 9)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries(backend):
    catalog = ops.Catalog(torch.randn(10, 4))
    scores, ids = ops.cosine_topk(torch.empty(0, 4), catalog, 3, backend=backend)
    assert scores.shape == ids.shape == (0, 3) and scores.dtype == torch.float32
    seen = ops.SeenLists.from_lists([[1]])
    rows = torch.empty(0, dtype=torch.int64)
    matched = torch.empty(0, 0, dtype=torch.bool)
    scores, ids = ops.cosine_topk(
        torch.empty(0, 4), catalog, 3, matched, 0.1, seen, rows, backend=backend
    )
    assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=False)
@given(data=st.data())
def test_any_small_case(data, backend):
    """Small whole numbers: plenty of ties, zeros, duplicates and opposite vectors."""
    count, dim, batch = (data.draw(st.integers(low, 9)) for low in (1, 1, 0))
    numbers = st.integers(-2, 2)

    def matrix(rows):
        row = st.lists(numbers, min_size=dim, max_size=dim)
        return data.draw(st.lists(row, min_size=rows, max_size=rows))

    dtype = data.draw(st.sampled_from(DTYPES))
    vectors = torch.tensor(matrix(count), dtype=dtype)
    vectors[~vectors.any(1)] = 1
    queries = torch.tensor(matrix(batch), dtype=dtype).reshape(batch, dim)
    groups = torch.tensor(data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count)))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    eligible = torch.tensor(data.draw(flags))
    matched = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=3 * batch, max_size=3 * batch)), dtype=torch.bool
    ).reshape(batch, 3)
    ids = st.lists(st.integers(0, count - 1), max_size=12)
    histories = data.draw(st.lists(ids, min_size=batch, max_size=batch))
    k, pi = data.draw(st.integers(1, count)), data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    compare(
        queries, vectors, k, groups, eligible, histories, matched=matched, pi=pi, backend=backend
    )


# Errors.


Q = torch.ones(3, 2)
V, NAN, INF = torch.ones(4, 2), float("nan"), float("inf")
CATALOG = ops.Catalog(V, torch.tensor([0, 1, 2, -1]))
SEEN, ROWS = ops.SeenLists.from_lists([[0], [3]]), torch.tensor([0, 1, -1])
BAD_CALLS = [
    (TypeError, "catalog", {"catalog": V}),
    (TypeError, "queries", {"queries": Q.long()}),
    (ValueError, "queries", {"queries": torch.ones(3, 5)}),
    (ValueError, "queries", {"queries": torch.ones(2)}),
    (ValueError, "queries", {"queries": torch.ones(3, 2, device="meta")}),
    (ValueError, "k", {"k": 0}),
    (ValueError, "k", {"k": 5}),
    (ValueError, "k", {"k": 1.5}),
    (ValueError, "pi", {"pi": -0.1}),
    (ValueError, "pi", {"pi": NAN}),
    (ValueError, "pi", {"pi": INF}),
    (ValueError, "pi", {"pi": 2e30}),
    (TypeError, "matched", {"matched": torch.ones(3, 3)}),
    (ValueError, "matched", {"matched": torch.ones(3, 2, dtype=torch.bool)}),
    (ValueError, "matched", {"matched": torch.ones(2, 3, dtype=torch.bool)}),
    (ValueError, "seen, seen_rows", {"seen": SEEN}),
    (ValueError, "seen, seen_rows", {"seen_rows": ROWS}),
    (TypeError, "seen", {"seen": [[0], [3]], "seen_rows": ROWS}),
    (ValueError, "seen", {"seen": ops.SeenLists.from_lists([[4]]), "seen_rows": ROWS}),
    (TypeError, "seen_rows", {"seen": SEEN, "seen_rows": ROWS.float()}),
    (ValueError, "seen_rows", {"seen": SEEN, "seen_rows": ROWS[:2]}),
    (ValueError, "backend", {"backend": "fastest"}),
]


@pytest.mark.parametrize("error, name, arguments", BAD_CALLS)
def test_bad_calls(error, name, arguments):
    with refused(error, name):
        ops.cosine_topk(**({"queries": Q, "catalog": CATALOG, "k": 2} | arguments))


def test_autocast_leaves_lists_exact():
    """Under autocast the scan would be bfloat16, where these cosines take two values."""
    query = torch.nn.functional.normalize(torch.randn(1, 64, dtype=torch.float64))
    aside = torch.randn(60, 64, dtype=torch.float64)
    aside = torch.nn.functional.normalize(aside - (aside @ query.T) * query)
    cosine = 0.3134765625 - 3e-6 * torch.arange(-20, 40)[:, None]  # around a bfloat16 boundary
    catalog = ops.Catalog((cosine * query + (1 - cosine**2).sqrt() * aside).float())
    expected = ops.cosine_topk(query.float(), catalog, 10)
    assert expected[1].tolist() == [list(range(10))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, ids = ops.cosine_topk(query.float(), catalog, 10)
    assert torch.equal(ids, expected[1]) and torch.equal(scores, expected[0])


def test_seen_lists_on_another_device():
    seen = ops.SeenLists.from_lists([[0], [3]])
    seen.ids = seen.ids.to("meta")
    with refused(ValueError, "seen"):
        ops.cosine_topk(Q, CATALOG, 2, seen=seen, seen_rows=ROWS)
