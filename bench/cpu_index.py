"""Exact search against an index of faiss with exact rescoring (`CandidateIndex`), on the CPU.

Catalogs, and who asks:

- normal: vectors and queries without any structure, the worst case of an index.
- mixture: N / 500 clusters, items scattered around their centres by half of what scatters the
  centres, and queries as far again from an item. Groups are unions of clusters.
- with --run, the catalog of a trained model and what it samples for its users.

k is 20. In the synthetic catalogs there are 50 groups; half of the queries name the group of the
item they are nearest to, the others any; everybody has seen the 10 nearest items and 40 others.
With a trained model, groups, names and histories are its own. Every search runs with the bonus
(0.1) and without.

Recall is the share of exact search's items that are found. All variants take turns in one run,
with new queries in each repeat: 256 at once, or 32 one by one. Queries per second are those of
processor time, of all threads together, which tells more than the clock on a machine that others
use. Left out for a million items: the flat index, ten times slower than exact search, and for
normal vectors the graph, which takes a quarter of an hour to build and finds less than ivf. Beside
the JSON comes a picture of recall against queries per second.

    python bench/cpu_index.py --threads 1 --run RUN --out bench/results/cpu-index.json
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from index_chart import draw
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch import Tensor

from contrec_fast import ContRec, native, ops
from contrec_fast.engine import Engine
from contrec_fast.engine.index import KINDS, CandidateIndex, import_faiss

CASES = [(name, items) for items in (100_000, 1_000_000) for name in ("normal", "mixture")]
DIM, K, PI, GROUPS, NEAR, OTHERS = 64, 20, 0.1, 50, 10, 40
EFFORTS = {"flat": (0,), "ivf": (8, 32, 128), "hnsw": (32, 128, 512)}  # nprobe, efSearch
MANY = 200_000  # items: not every kind is measured with more
BATCHES = {256: 1, 1: 32}  # queries of a call: calls in a repeat


@dataclass
class Case:
    """A catalog and the searches in it: `ask(B)` gives arguments of `cosine_topk`, without bonus,
    and the matched groups."""

    name: str
    catalog: ops.Catalog
    ask: Callable[[int], tuple[dict, Tensor]]
    kinds: Sequence[str] = KINDS


def synthetic(name: str, items: int) -> Case:
    if name == "normal":
        vectors, groups = torch.randn(items, DIM), torch.randint(GROUPS, (items,))
    else:
        centres, of = torch.randn(max(2, items // 500), DIM), torch.arange(items)
        of = of % len(centres)
        vectors, groups = centres[of] + 0.5 * torch.randn(items, DIM), of % GROUPS
    catalog = ops.Catalog(vectors, groups)

    def ask(batch: int) -> tuple[dict, Tensor]:
        queries = torch.randn(batch, DIM)
        if name == "mixture":
            queries = vectors[torch.randint(items, (batch,))] + 0.5 * queries
        near = ops.cosine_topk(queries, catalog, NEAR)[1]
        named = torch.where(
            torch.rand(batch) < 0.5, groups[near[:, 0]], torch.randint(GROUPS, (batch,))
        )
        seen = ops.SeenLists.from_lists(
            torch.cat([near, torch.randint(items, (batch, OTHERS))], dim=1)
        )
        asked = {"queries": queries, "seen": seen, "seen_rows": torch.arange(batch)}
        return asked, F.one_hot(named, GROUPS).bool()

    kinds = KINDS
    if items > MANY:
        kinds = ("ivf",) if name == "normal" else ("ivf", "hnsw")
    return Case(f"{name}, {items} x {DIM}", catalog, ask, kinds)


def trained(run: Path) -> Case:
    model = ContRec.from_pretrained(run)
    dataset = model.dataset.complete()
    engine = Engine(model, dataset)
    parts = [engine.sample(rows) for rows in torch.arange(len(dataset.user_ids)).split(512)]
    vectors = torch.cat([vectors[0] for vectors, _ in parts]).clone()
    matched = engine.matcher.match([text for _, texts in parts for text in texts])
    seen = ops.SeenLists.from_lists(dataset.histories)

    def ask(batch: int) -> tuple[dict, Tensor]:
        rows = torch.randperm(len(vectors))[:batch]
        return {"queries": vectors[rows], "seen": seen, "seen_rows": rows}, matched[rows]

    items, dim = engine.catalog.vectors.shape
    return Case(f"trained model, {items} x {dim}", engine.catalog, ask)


class Variant:
    """Exact search, or an index at one effort."""

    def __init__(self, catalog: ops.Catalog, index: CandidateIndex | None, kind: str, effort: int):
        setting = {"ivf": f" nprobe {effort}", "hnsw": f" efSearch {effort}"}.get(kind, "")
        self.index, self.kind, self.effort, self.name = index, kind, effort, kind + setting
        exact = functools.partial(ops.cosine_topk, catalog=catalog)
        self.search = exact if index is None else index.search
        self.clear()

    def clear(self) -> None:
        self.seconds, self.processor, self.found, self.counts = [], [], [], None

    def prepare(self) -> None:
        if self.kind == "ivf":
            self.index.faiss.nprobe = min(self.effort, self.index.faiss.nlist)
        elif self.kind == "hnsw":
            self.index.faiss.hnsw.efSearch = self.effort

    def __call__(self, calls: list[dict]) -> list[Tensor]:
        return [self.search(k=K, **call)[1] for call in calls]

    def measure(self, calls: list[dict]) -> None:
        self.prepare()
        begun = time.process_time()
        ids, took = timed("cpu", self, calls)
        self.processor.append((time.process_time() - begun) / len(calls))
        self.seconds.append(took / len(calls))
        self.found.append(torch.cat(ids))


def serialized_mib(index: CandidateIndex) -> float:
    """What the index holds beside the catalog, give or take a percent."""
    return len(import_faiss().serialize_index(index.faiss)) / 2**20


def recall_of(found: Tensor, expected: Tensor) -> float:
    """Share of the expected ids [B, k], where there is one, that are among the found ones."""
    there = expected >= 0
    return float(((expected[:, :, None] == found[:, None]).any(2) & there).sum() / there.sum())


def run(case: Case, repeats: int) -> list[dict]:
    catalog = case.catalog
    variants, built = [Variant(catalog, None, "exact", 0)], {"exact": (None, None)}
    for kind in case.kinds:
        begun = time.process_time()
        index = CandidateIndex.build(catalog, kind)
        built[kind] = time.process_time() - begun, serialized_mib(index)
        variants += [Variant(catalog, index, kind, effort) for effort in EFFORTS[kind]]
    results = []
    for batch, count in BATCHES.items():
        for pi in (0.0, PI):
            for variant in variants:
                variant.clear()
            for repeat in range(repeats + 1):
                calls = []
                for _ in range(count):
                    call, matched = case.ask(batch)
                    calls.append(call | ({"matched": matched, "pi": pi} if pi else {}))
                for variant in variants:
                    if repeat == 0:
                        variant.prepare()
                        variant(calls)  # untimed
                    else:
                        variant.measure(calls)
            results += [
                result(case, variant, variants[0], batch, pi, *built[variant.kind])
                for variant in variants
            ]
    return results


def result(case, variant, exact, batch: int, pi: float, build_s, mib) -> dict:
    """The record of a variant."""
    bonus = f"bonus {pi:g}" if pi else "no bonus"
    processor = statistics.median(variant.processor)
    return record(
        "search", f"{case.name}, B {batch}, k {K}, {bonus}", "float32", variant.name,
        variant.seconds,
    ) | {
        "catalog": case.name, "batch": batch, "pi": pi, "kind": variant.kind,
        "effort": variant.effort,
        "recall": recall_of(torch.cat(variant.found), torch.cat(exact.found)),
        "queries_per_cpu_s": batch / processor,
        "x_exact": statistics.median(exact.processor) / processor,
        "cpu_us": 1e6 * processor,
        "build_cpu_s": build_s,
        "index_mib": mib,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time candidate indexes on the CPU.")
    parser.add_argument(
        "--case", nargs=2, metavar=("NAME", "ITEMS"), action="append",
        help="normal or mixture, and a number of items; may be repeated; default: four cases",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="the folder of a trained model")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results here as JSON, and a picture")
    args = parser.parse_args(arguments)
    for name, items in args.case or ():
        if name not in ("normal", "mixture") or not items.isdigit() or int(items) < 1000:
            parser.error(
                "argument --case: expected normal or mixture and 1000 items or more, "
                f"got {name} {items}"
            )
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    found = environment("cpu") | {"faiss": import_faiss().__version__}
    found["isa"] = native.topk_instruction_sets()[0] if native.why_missing() is None else None
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(COLUMNS, "| CPU us | recall | queries/CPU s | x exact | build CPU s | MiB")
    makers = [functools.partial(trained, args.run)] if args.run else []
    for name, items in args.case or CASES:
        makers.append(functools.partial(synthetic, name, int(items)))
    results = []
    for make in makers:
        for one in run(make(), args.repeats):
            words = [f"{one['cpu_us']:.0f}", f"{one['recall']:.4f}"]
            words += [f"{one['queries_per_cpu_s']:.0f}", f"{one['x_exact']:.2f}"]
            words += [
                "-" if one[of] is None else f"{one[of]:.1f}" for of in ("build_cpu_s", "index_mib")
            ]
            print(line(one), *words, sep=" | ", flush=True)
            results.append(one)
        if args.out:
            settings = vars(args) | {"run": args.run is not None}
            store(args.out, found, settings, results)
            draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
