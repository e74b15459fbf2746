"""`CandidateIndex`: an approximate index of faiss in front of the exact scores.

When it pays, by `bench/cpu_index.py` (one thread, width 64, k 20, 256 queries a call, compared with
the exact search of the C++ extension): among 1,000,000 items in clusters, ivf with nprobe 8 answers
5.1 times as many queries, 3.3 times with a bonus for one group in 50, and finds all that exact
search finds; among 100,000 it is 1.2 and 0.8 times as many at recall 0.99. One query a call costs
1.5 ms besides faiss, as much as searching 150,000 items exactly. So an index is for 300,000 items
or more, if they are in clusters. Of vectors without any structure, an index that was faster found
less than half of the lists, whatever their number. ivf was better than hnsw in all but the smallest
catalog.
"""

import functools
import math
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from contrec_fast import ops
from contrec_fast.ops.catalog import FITTING, norms_of
from contrec_fast.ops.checks import FLOATS, check
from contrec_fast.ops.hoisting import version
from contrec_fast.ops.topk import bonus_of, exact_scores, search_arguments, seen_pairs

KINDS = ("flat", "ivf", "hnsw")
WIDER = 4  # times the candidates, where they do not suffice
MARGIN = 8  # candidates rescored beyond k, so that rounding seldom makes more necessary
HELD_ELEMENTS = 1 << 22  # candidates and float64 products held at once
TRAINING_ROWS = 64  # items per list that k-means reads
TRAINING_ROUNDS = 10


class CandidateIndex:
    """Candidates by faiss, scored exactly: lists like those of `ops.cosine_topk`, with gaps.

    Whatever is returned has the very score that exact search gives it, in the same order; what
    may be missing are items that the index did not look at. Nothing else is: more candidates are
    asked for until the last of them, bonus included, could not enter the list, and a query whose
    candidates do not suffice (few unseen ones, a bonus that reaches far) is searched exactly. So
    `flat`, which looks at everything, gives the exact lists.

    Made by `build`. Items that are removed or go out of stock need no new index; new or changed
    vectors do.

    Attributes:
        catalog: what is searched. faiss: the index in it, whose `nprobe` (ivf) or `hnsw.efSearch`
        (hnsw) trades speed for recall and may be changed at any time. counts: since the build,
        how many queries were asked, how many candidates were fetched for them, and how many
        queries ended in exact search.
    """

    def __init__(self, catalog: ops.Catalog, faiss_index):
        """Of an empty index, which is filled; `build` makes one."""
        self.catalog, self.faiss = catalog, faiss_index
        self.counts = {"queries": 0, "candidates": 0, "exact": 0}
        self._built = (len(catalog), version(catalog.vectors))
        # In order of their groups, so that the items of a group are a range.
        groups, self._order = catalog.groups[: len(catalog)].sort(stable=True)
        every = torch.arange(catalog.num_groups + 1, dtype=torch.int32, device=groups.device)
        self._starts = torch.searchsorted(groups, every).tolist()
        vectors, norms = catalog.vectors[self._order], catalog.norms[self._order]
        unit = normalised(vectors, norms).cpu().numpy()
        with threads(1):  # more would depend on their timing
            faiss_index.train(unit)
            faiss_index.add(unit)

    @classmethod
    def build(
        cls,
        catalog: ops.Catalog,
        kind: str = "ivf",
        nlist: int | None = None,
        links: int = 16,
        ef_construction: int = 40,
        seed: int = 0,
    ) -> "CandidateIndex":
        """An index of a catalog's items. The same catalog and settings give the same index.

        Args:
            catalog: on any device; the index is on the CPU and holds normalised float32 copies.
            kind: `flat` (IndexFlatIP: all items), `ivf` (IndexIVFFlat: the items of the `nprobe`
                nearest of `nlist` clusters) or `hnsw` (IndexHNSWFlat: a graph with `links`
                neighbours an item, built by one thread so that it is the same every time).
            nlist: clusters, 4 sqrt(N) if not given. seed: of k-means.
            links, ef_construction: of the graph.

        Raises:
            ValueError: another kind, or a number out of range, in one line.
            ImportError: faiss is not installed, in one line.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
        count, dim = len(catalog), catalog.vectors.shape[1]
        nlist = min(count, round(4 * math.sqrt(count))) if nlist is None else nlist
        for name, number, least, most in (
            ("nlist", nlist, 1, count),
            ("links", links, 2, 256),
            ("ef_construction", ef_construction, 1, 4096),
        ):
            if type(number) is not int or not least <= number <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {number}")
        faiss = import_faiss()
        if kind == "flat":
            index = faiss.IndexFlatIP(dim)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = ef_construction
            index.hnsw.efSearch = 64
        else:
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT
            )
            index.cp.seed, index.cp.niter = seed, TRAINING_ROUNDS
            index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, TRAINING_ROWS
            index.nprobe = min(nlist, 32)
        return cls(catalog, index)

    @torch.no_grad()
    def search(
        self,
        queries: Tensor,
        k: int,
        matched: Tensor | None = None,
        pi: float = 0.0,
        seen: ops.SeenLists | None = None,
        seen_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best of the items that the index looks at; arguments as of `ops.cosine_topk`.

        Which items the index looks at may change, where two clusters are equally near up to
        rounding, with the batch.

        Returns:
            scores [B, k] float32 descending, ids [B, k] int64. (-inf, -1) only where fewer than k
            items are eligible and unseen.

        Raises:
            TypeError, ValueError: as `ops.cosine_topk`.
            RuntimeError: the catalog got new items or vectors since the build, in one line.
        """
        arguments = search_arguments(queries, self.catalog, k, matched, pi, seen, seen_rows)
        check("queries", queries, tuple(queries.shape), FLOATS, like=self.catalog.vectors)
        self.check_fresh()
        queries, *_, seen_offsets, seen_ids, seen_rows = arguments
        catalog, bonus = self.catalog, bonus_of(matched, float(pi))
        scores = queries.new_empty((len(queries), k), dtype=torch.float32)
        ids = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
        norms = norms_of(queries)
        usable = (norms > FITTING[0]) & (norms < FITTING[1])
        left, unusable = usable.nonzero()[:, 0], (~usable).nonzero()[:, 0]

        def attempt(rows: Tensor, number: int, apart: bool) -> Tensor:
            """Fill in the lists of some queries; those that need more candidates."""
            named = matched[rows] if apart else None
            cosines, found = self._nearest(queries[rows], norms[rows], number, named)
            missing, found = found < 0, self._order[found.clamp(min=0)]
            bounds, largest = cosines, torch.ones(len(rows), device=queries.device)
            if bonus is not None:
                factors = bonus[rows].float()
                bounds = cosines * factors.gather(1, catalog.groups[found] % factors.shape[1])
                largest = factors.amax(1)
            out = missing | ~catalog.eligible[found]
            if seen_rows is not None:
                query, item = seen_pairs(seen_offsets, seen_ids, seen_rows[rows])
                out |= _contains(query * len(catalog) + item, found, len(catalog))
            best, place = bounds.masked_fill(out, -torch.inf).topk(k + MARGIN, dim=1)
            found = found.gather(1, place).masked_fill(best == -torch.inf, len(catalog))
            found = found.sort(dim=1).values
            usable, found = found < len(catalog), found.clamp(max=len(catalog) - 1)
            exact = exact_scores(
                queries[rows], norms[rows], catalog.vectors, catalog.norms, catalog.groups, found,
                None if bonus is None else bonus[rows],
            ).masked_fill(~usable, -torch.inf)  # fmt: skip
            order = exact.sort(dim=1, descending=True, stable=True).indices[:, :k]
            scores[rows], ids[rows] = exact.gather(1, order), found.gather(1, order)
            # The certificate: nothing that was fetched but not rescored, and nothing beyond the
            # last of what was fetched, could be in the list.
            bound = best[:, -1]
            for last, most in [(number - 1, 1.0 if apart else largest), (-1, largest)]:
                beyond = cosines[:, last] * torch.where(cosines[:, last] > 0, most, 1.0)
                bound = bound.maximum(beyond.masked_fill(missing[:, last], -torch.inf))
            error = (queries.shape[1] + 64) * 2.0**-23 * largest  # of float32 sums in any order
            return rows[bound + error >= scores[rows, -1]]

        self.counts["queries"] += len(queries)
        first = k + k // 2 + 4 * MARGIN
        if seen_rows is not None and len(queries):
            first += len(seen_pairs(seen_offsets, seen_ids, seen_rows)[0]) // len(queries)
        rounds = [(first, False), (WIDER * first, False)]
        if bonus is not None:
            rounds[1:] = [(first, True), (WIDER * first, True)]
        for number, apart in rounds:
            if len(left) and number < len(catalog):
                chunk = HELD_ELEMENTS // max(2 * number, (k + MARGIN) * queries.shape[1])
                parts = left.split(max(1, chunk))
                left = torch.cat([attempt(rows, number, apart) for rows in parts])
        rest = torch.cat([left, unusable])
        self.counts["exact"] += len(rest)
        if len(rest):
            scores[rest], ids[rest] = ops.cosine_topk(
                queries[rest], catalog, k, None if matched is None else matched[rest], pi,
                seen, None if seen is None else seen_rows[rest],
            )  # fmt: skip
        return scores, ids

    def check_fresh(self) -> None:
        """Raise RuntimeError if the catalog got new items or vectors since the build."""
        if self._built != (len(self.catalog), version(self.catalog.vectors)):
            raise RuntimeError(
                f"index: expected the catalog of the build, with {self._built[0]} items, got one "
                f"that has changed, with {len(self.catalog)}; build the index again"
            )

    def _nearest(
        self, queries: Tensor, norms: Tensor, number: int, matched: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cosines [B, M] float32 and the items' places in `_order`, -1 where there is no further.

        Descending, M = number; or, given `matched`, twice that: as many items that do not match,
        then as many that do, and both descend.
        """
        unit = normalised(queries, norms).cpu().numpy()
        with threads(torch.get_num_threads()):
            if matched is None:
                cosines, found = self.faiss.search(unit, number)
            else:
                cosines, found = self._nearest_apart(unit, number, matched.cpu())
        self.counts["candidates"] += found.size
        device = queries.device
        return torch.from_numpy(cosines).to(device), torch.from_numpy(found).to(device)

    def _nearest_apart(self, unit: np.ndarray, number: int, matched: Tensor):
        faiss = import_faiss()
        cosines = np.full((len(unit), 2 * number), -np.inf, dtype=np.float32)
        found = np.full((len(unit), 2 * number), -1)
        sets, of = matched.unique(dim=0, return_inverse=True)
        for i, groups in enumerate(sets):
            rows = (of == i).nonzero()[:, 0].numpy()
            ranges = [
                faiss.IDSelectorRange(*self._starts[group : group + 2], True)
                for group in groups.nonzero()[:, 0].tolist()
                if group + 1 < len(self._starts)
            ]
            pools = [(slice(number), None)]
            if ranges:
                members = functools.reduce(faiss.IDSelectorOr, ranges)
                pools = [(slice(number), faiss.IDSelectorNot(members))]
                pools += [(slice(number, None), members)]
            for columns, selector in pools:
                result = self.faiss.search(unit[rows], number, params=self._settings(selector))
                cosines[rows, columns], found[rows, columns] = result
        return cosines, found

    def _settings(self, selector):
        """Those of a search, the index's own, among the items that the selector takes."""
        faiss = import_faiss()
        if isinstance(self.faiss, faiss.IndexIVF):
            return faiss.SearchParametersIVF(sel=selector, nprobe=self.faiss.nprobe)
        if isinstance(self.faiss, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self.faiss.hnsw.efSearch)
        return faiss.SearchParameters(sel=selector)


def normalised(vectors: Tensor, norms: Tensor) -> Tensor:
    """Vectors [N, D] over their norms [N] (float64, of `norms_of`) as float32."""
    unit = torch.empty(vectors.shape, dtype=torch.float32, device=vectors.device)
    rows = max(1, HELD_ELEMENTS // vectors.shape[1])
    for part, norm, into in zip(vectors.split(rows), norms.split(rows), unit.split(rows)):
        into.copy_(part.double() / norm[:, None])
    return unit


def _contains(keys: Tensor, found: Tensor, count: int) -> Tensor:
    """Whether `row * count + id` of the ids found [B, M] is among the ascending keys."""
    if not len(keys):
        return torch.zeros_like(found, dtype=torch.bool)
    asked = torch.arange(len(found), device=found.device)[:, None] * count + found
    return keys[torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)] == asked


def import_faiss():
    """The module; ImportError, which tells what to install, where it cannot be imported."""
    try:
        import faiss
    except ImportError as error:
        why = " ".join(str(error).split())
        raise ImportError(
            f"index: expected faiss, got: {why}; pip install 'contrec-fast[faiss]'"
        ) from None
    return faiss


@contextmanager
def threads(number: int):
    """Run faiss with this many threads of its own OpenMP runtime."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
