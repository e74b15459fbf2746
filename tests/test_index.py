"""`CandidateIndex`: lists of faiss candidates, with the scores of exact search."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from model_cases import random_model, small_shop
from ops_cases import refused
from test_head import inputs

from contrec_fast import Head, ops
from contrec_fast.engine.index import KINDS, CandidateIndex, import_faiss

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="needs faiss, which is not installed"
)
GROUPS = 7


def case(items=2000, dim=16, batch=33, dtype=torch.float32, clusters=20):
    """A catalog of clusters and the keyword arguments of a search in it, all of them random.

    Groups are any, as are half of the matched ones; seen are the nearest items and others.
    """
    centres, of = torch.randn(clusters, dim), torch.randint(clusters, (items,))
    vectors = (centres[of] + 0.4 * torch.randn(items, dim)) * torch.rand(items, 1).exp()
    catalog = ops.Catalog(vectors.to(dtype), torch.randint(-1, GROUPS, (items,)))
    queries = centres[torch.randint(clusters, (batch,))] + 0.4 * torch.randn(batch, dim)
    queries = queries.to(dtype)
    near = ops.cosine_topk(queries, catalog, min(9, items))[1]
    seen = torch.cat([near, torch.randint(items, (batch, 11))], dim=1)
    arguments = {
        "queries": queries,
        "matched": torch.rand(batch, GROUPS) < 0.2,
        "pi": 0.1,
        "seen": ops.SeenLists.from_lists(seen),
        "seen_rows": torch.randint(-1, batch, (batch,)),
    }
    return catalog, arguments


def exactly(catalog, k, queries, **arguments):
    return ops.cosine_topk(queries, catalog, k, **arguments)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_faiss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "items, dim, batch, k", [(3000, 16, 40, 20), (1500, 3, 129, 7), (700, 1, 3, 1)]
)
def test_a_flat_index_gives_the_exact_lists(items, dim, batch, k, dtype):
    catalog, arguments = case(items, dim, batch, dtype)
    index = CandidateIndex.build(catalog, "flat")
    assert same(index.search(k=k, **arguments), exactly(catalog, k, **arguments))
    plain = {"queries": arguments["queries"]}
    assert same(index.search(k=k, **plain), exactly(catalog, k, **plain))
    assert index.counts["queries"] == 2 * batch
    if dim == 16:  # among so few directions, more items may tie than are fetched
        assert index.counts["exact"] == 0


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_any_small_catalog_is_served(kind):
    for items in (1, 3, 127, 129):
        catalog, arguments = case(items, 5, 9, clusters=2)
        index = CandidateIndex.build(catalog, kind)
        for k in {1, items}:
            found = index.search(k=k, **arguments)
            assert k < items or same(found, exactly(catalog, k, **arguments))


@needs_faiss
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_scores_are_exact_and_nearly_all_items_are_found(kind):
    catalog, arguments = case(5000)
    scores, ids = CandidateIndex.build(catalog, kind).search(k=20, **arguments)
    best = exactly(catalog, 20, **arguments)[1]
    assert (ids[:, :, None] == best[:, None]).any(2).float().mean() > 0.8
    seen, rows = arguments.pop("seen"), arguments.pop("seen_rows")
    for found, row in zip(ids.tolist(), rows.tolist()):
        own = seen.ids[seen.offsets[row] : seen.offsets[row + 1]] if row >= 0 else torch.empty(0)
        assert not set(found) & set(own.tolist())
    ranked, items = exactly(catalog, 5000, **arguments)
    place = torch.empty_like(items).scatter_(1, items, torch.arange(5000).expand_as(items))
    place = place.gather(1, ids)
    assert torch.equal(scores, ranked.gather(1, place))
    assert (place.diff(dim=1) > 0).all()  # the order of exact search, ties too


@needs_faiss
def test_all_lists_probed_give_the_exact_lists():
    catalog, arguments = case()
    index = CandidateIndex.build(catalog, "ivf", nlist=31)
    index.faiss.nprobe = 31
    assert same(index.search(k=20, **arguments), exactly(catalog, 20, **arguments))
    index.faiss.nprobe = 1
    assert not same(index.search(k=20, **arguments), exactly(catalog, 20, **arguments))


@needs_faiss
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_items_that_only_the_bonus_lifts_into_the_list(kind):
    """They are further away than a thousand others, of two groups, and one of those is seen."""
    query = F.normalize(torch.randn(1, 32, dtype=torch.float64))
    aside = torch.randn(3000, 32, dtype=torch.float64)
    aside = F.normalize(aside - (aside @ query.T) * query)
    cosine = torch.full((3000, 1), 0.9, dtype=torch.float64)
    cosine -= 0.03 * torch.rand(3000, 1)
    cosine[[5, 17]], cosine[2000:] = 0.85, 0.2
    groups = torch.arange(3000) % 3
    groups[[5, 17]] = torch.tensor([8, 4])
    catalog = ops.Catalog(cosine * query + (1 - cosine**2).sqrt() * aside, groups)
    matched = torch.zeros(1, 12, dtype=torch.bool)
    matched[0, [4, 8, 10]] = True
    index = CandidateIndex.build(catalog, kind, nlist=9)
    if kind == "ivf":
        index.faiss.nprobe = 9
    scores, ids = index.search(query, 10, matched, 0.1)
    assert sorted(ids[0, :2].tolist()) == [5, 17] and index.counts["exact"] == 0
    assert same((scores, ids), ops.cosine_topk(query, catalog, 10, matched, 0.1))
    seen, rows = ops.SeenLists.from_lists([[17, 20]]), torch.tensor([0])
    found = index.search(query, 10, matched, 0.1, seen, rows)
    assert same(found, ops.cosine_topk(query, catalog, 10, matched, 0.1, seen, rows))
    assert found[1][0, 0] == 5


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_queries_without_enough_candidates_are_searched_exactly(kind):
    catalog, arguments = case(900, batch=6)
    everything = list(range(900))
    arguments["seen"] = ops.SeenLists.from_lists([everything, everything[3:], [], everything[:895]])
    arguments["seen_rows"] = torch.tensor([0, 1, 2, 3, -1, -1])
    arguments["queries"][4], arguments["queries"][5] = 0, torch.nan
    index = CandidateIndex.build(catalog, kind)
    found, expected = index.search(k=10, **arguments), exactly(catalog, 10, **arguments)
    served = [0, 1, 3, 4, 5]
    assert same([part[served] for part in found], [part[served] for part in expected])
    assert ((found[1] >= 0).sum(1)).tolist() == [0, 3, 10, 5, 10, 0]
    assert index.counts["exact"] == 5
    nobody = {
        name: value[:0] for name, value in arguments.items() if name in ("queries", "matched")
    }
    scores, ids = index.search(k=10, **nobody)
    assert scores.shape == ids.shape == (0, 10)


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_go_to_the_lower_ids(kind):
    vectors = torch.randn(10, 8)[torch.arange(1000) % 10]
    catalog, query = ops.Catalog(vectors), vectors[:10].clone()
    found = CandidateIndex.build(catalog, kind).search(query, 20)
    assert same(found, ops.cosine_topk(query, catalog, 20))
    assert torch.equal(found[1][3], torch.arange(3, 203, 10))


@needs_faiss
def test_a_catalog_that_changes():
    catalog, arguments = case()
    index = CandidateIndex.build(catalog, "flat")
    best = exactly(catalog, 1, **arguments)[1][:, 0]
    catalog.remove(best[:10].unique())
    catalog.set_eligible(exactly(catalog, 1, **arguments)[1][:, 0].unique(), False)
    assert same(index.search(k=20, **arguments), exactly(catalog, 20, **arguments))
    catalog.add(torch.randn(1, 16))
    with pytest.raises(RuntimeError, match="^index: expected .* 2000 items, got .* 2001;.*again$"):
        index.search(k=20, **arguments)
    index = CandidateIndex.build(catalog, "flat")
    assert same(index.search(k=20, **arguments), exactly(catalog, 20, **arguments))
    catalog.vectors[0] *= 2
    with pytest.raises(RuntimeError, match="^index: .*again$"):
        index.search(k=20, **arguments)


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_catalog_gives_the_same_index(kind):
    faiss, (catalog, _) = import_faiss(), case()

    def built(**settings):
        return faiss.serialize_index(
            CandidateIndex.build(catalog, kind, **settings).faiss
        ).tobytes()

    first = built()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert built() == first
    finally:
        torch.set_num_threads(threads)
    changed = {"flat": {}, "ivf": {"seed": 1}, "hnsw": {"links": 5}}[kind]
    assert (built(**changed) == first) == (kind == "flat")


@needs_faiss
@pytest.mark.parametrize("draws", [1, 3])
def test_a_head_with_an_index(draws):
    model = random_model("prompt.text=none", f"retrieval.draws={draws}")
    exact, head = (Head.of(model, small_shop(), index=index) for index in (None, "flat"))
    given, rows = inputs(model, range(5)), torch.arange(5)
    matched = torch.rand(5, head.catalog.num_groups) < 0.5
    found = head(**given, k=3, matched=matched, seen_rows=rows)
    assert same(found, exact(**given, k=3, matched=matched, seen_rows=rows))
    assert head.index.counts["queries"] == 5 * draws and exact.index is None
    for index in (CandidateIndex.build(exact.catalog, "hnsw"), True):
        with refused(ValueError, "index"):
            Head(model, head.catalog, index=index)
    head = Head(model, exact.catalog, index=CandidateIndex.build(exact.catalog, "ivf"))
    assert same(head(**given, k=60), exact(**given, k=60))


def test_wrong_settings_are_refused():
    catalog, _ = case(20)
    for name, value in (
        ("kind", "lsh"),
        ("nlist", 0),
        ("nlist", 21),
        ("links", 1),
        ("links", 8.0),
        ("ef_construction", 0),
    ):
        with refused(ValueError, name):
            CandidateIndex.build(catalog, **{name: value})


@needs_faiss
def test_wrong_arguments_of_a_search_are_refused():
    catalog, arguments = case()
    index = CandidateIndex.build(catalog, "flat")
    for name, value, error in (
        ("k", 2001, ValueError),
        ("queries", torch.zeros(33, 5), ValueError),
        ("matched", torch.zeros(33, GROUPS), TypeError),
        ("pi", -1.0, ValueError),
    ):
        with refused(error, name):
            index.search(**{"k": 3} | arguments | {name: value})
    with refused(ValueError, "queries"):
        index.search(torch.zeros(33, 16, device="meta"), 3)


def test_faiss_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"^index: .*pip install .contrec-fast\[faiss\].$"):
        CandidateIndex.build(case(20)[0])
