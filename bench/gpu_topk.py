"""Certified top-K in Triton on a GPU: right first, then how fast, against plain PyTorch.

    python bench/gpu_topk.py --out FILE [--rows FILE] [--sweep]

Per case one line as in `reporting`, and the number of queries whose first attempt was not
certified. Variants take turns, on other queries each time: triton, which looks at its certificates;
triton+graph, one attempt as a replayed CUDA graph; torch and torch+graph, the plain PyTorch of
`torch_topk.py`; compile+graph, the same compiled. The floor is the larger of the scan copy's bytes
over the copy bandwidth and the products over the bf16 matrix rate, both measured first. `--rows`
writes the rows that this run supports for `dispatch_table.py`; `--sweep` times other tiles as well.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from dispatch_table import Rows
from gpu_timing import ceilings, device_here, interleaved
from reporting import COLUMNS, environment, line, positive, record, store
from torch_timing import capture
from torch_topk import torch_topk

from contrec_fast import ops
from contrec_fast.ops import dispatch, triton_topk

PI, GROUPS, SEEN, ROTATED = 0.1, 64, 50, 4
CHUNK = 512  # queries whose scores plain PyTorch holds at once


class Case:
    """B queries that rotate in one place, with seen lists and a bonus, and what can serve them."""

    def __init__(self, catalog: ops.Catalog, batch: int, k: int):
        from contrec_kernels import topk

        (count, dim), device = catalog.vectors.shape, catalog.vectors.device
        self.others = torch.randn(ROTATED, batch, dim, device=device)
        self.queries = self.others[0].clone()
        self.matched = torch.rand(batch, GROUPS, device=device) < 2 / GROUPS
        lists = torch.randint(count, (batch, SEEN)).sort(dim=1).values
        seen = ops.SeenLists.from_lists(lists.tolist(), device)
        self.lists, self.groups = lists.to(device), catalog.groups.long()
        self.arguments = (
            self.queries, catalog.vectors, catalog.norms, catalog.scan, catalog.errors,
            catalog.groups, catalog.eligible, k, self.matched, PI, seen.offsets, seen.ids,
            torch.arange(batch, device=device),
        )  # fmt: skip
        self.kernels = lambda: topk.cosine_topk(*self.arguments)
        self.search = lambda **options: topk.search(*self.arguments, **options)

    def functions(self, unit: torch.Tensor) -> dict:
        """The variants by name; unit: [N, D] bfloat16 for plain PyTorch."""
        k, lists = self.arguments[7], self.lists

        def plain(torch_topk=torch_topk):
            for at in range(0, len(lists), CHUNK):
                some = slice(at, at + CHUNK)
                rows = torch.arange(len(lists[some]), device=lists.device)
                pairs = rows.repeat_interleave(SEEN), lists[some].flatten()
                found = torch_topk(
                    self.queries[some], unit, self.groups, self.matched[some], *pairs, PI, k
                )
            return found[0]

        torch.compiler.reset()  # beyond some variants of one function nothing would be compiled
        compiled = torch.compile(torch_topk, dynamic=False)
        return {
            "triton": self.kernels,
            "triton+graph": capture(lambda: self.search()[0], unit.device)[0],
            "torch": plain,
            "torch+graph": capture(plain, unit.device)[0],
            "compile+graph": capture(lambda: plain(compiled), unit.device)[0],
        }

    def rotate(self, repeat: int) -> None:
        self.queries.copy_(self.others[repeat % ROTATED])

    def reference(self):
        return dispatch.resolve("cosine_topk", "reference", *self.arguments)(*self.arguments)

    def right(self) -> bool:
        """Whether both ways to the kernels give the reference's lists, bit for bit."""
        for repeat in range(2):
            self.rotate(repeat)
            expected, found = self.reference(), self.kernels()
            *once, sure = self.search()
            same = all(torch.equal(a, b) for a, b in zip(found, expected))
            same &= all(torch.equal(a[sure], b[sure]) for a, b in zip(once, expected))
            if not same:
                return False
        return True

    def uncertified(self) -> float:
        """Queries of a batch whose first attempt was not certified, on average."""
        missed = 0
        for repeat in range(ROTATED):
            self.rotate(repeat)
            missed += int((~self.search()[2]).sum())
        return missed / ROTATED


def sweep(case: Case, repeats: int) -> None:
    """Median of `search` by tiles, the default first."""
    from contrec_kernels.topk import Tiles, _tiles

    default = _tiles(case.queries)
    tried = [default]
    for items, depth, warps, stages, resident in (
        (128, 64, 8, 3, 2), (128, 64, 4, 3, 2), (256, 64, 8, 4, 1), (128, 128, 8, 2, 1),
        (64, 64, 4, 4, 3), (128, 64, 8, 4, 1),
    ):  # fmt: skip
        tried.append(Tiles(default.rows, items, depth, warps, stages, resident, default.chunk))
    if default.rows == 128:
        tried += [tiles._replace(rows=64, warps=4) for tiles in tried[1:]]
    else:
        tried += [default._replace(stages=stages) for stages in (2, 3, 5, 6)]
    functions = {}
    for tiles in tried:
        try:
            case.search(tiles=tiles)
        except Exception as error:  # tiles that do not fit this chip
            print(f"  {tiles}: {' '.join(str(error).split())[:100]}", flush=True)
            continue
        functions[tiles] = lambda tiles=tiles: case.search(tiles=tiles)
    times = interleaved(functions, case.rotate, repeats)
    for tiles, seconds in times.items():
        print(f"  {tiles}: {statistics.median(seconds) * 1e6:.0f} us", flush=True)


def bucket(items: int, dim: int, k: int, batch: int) -> str:
    """The class of shapes in the dispatch table that a case belongs to."""
    queries, vectors = (torch.empty(count, dim, device="meta") for count in (batch, items))
    matched = queries.new_empty(batch, GROUPS, dtype=torch.bool)
    return triton_topk._bucket(queries, vectors, *[None] * 5, k, matched, PI, *[None] * 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--sweep", action="store_true")
    for name, values in (
        ("dims", [512, 64]),
        ("batches", [1, 64, 256, 1024]),
        ("ks", [20, 100, 1000]),
    ):
        parser.add_argument(f"--{name}", type=positive, nargs="+", default=values)
    parser.add_argument("--items", type=positive, default=1_000_000)
    parser.add_argument("--repeats", type=positive, default=30)
    asked = parser.parse_args()
    device = device_here(parser)
    bandwidth, rate = ceilings(device)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n{COLUMNS}")
    surroundings = environment(device.type) | {"copy_bytes_s": bandwidth, "product_flop_s": rate}
    settings = {name: str(value) for name, value in vars(asked).items()}
    shapes = [
        (dim, k, batch) for dim in asked.dims for k in asked.ks for batch in asked.batches
    ]  # fmt: skip
    planned = [bucket(asked.items, *shape) for shape in shapes]
    rows = Rows(asked.rows, "cosine_topk", "triton", planned)
    cases, catalog, wrong = [], None, 0
    for (dim, k, batch), class_name in zip(shapes, planned):
        if catalog is None or catalog.vectors.shape[1] != dim:
            vectors = torch.randn(asked.items, dim, device=device)
            groups = torch.randint(GROUPS, (asked.items,), device=device)
            catalog = ops.Catalog(vectors, groups)
            unit = torch.nn.functional.normalize(vectors, dim=1).bfloat16()
        case = Case(catalog, batch, k)
        shape = f"B={batch} N={asked.items} D={dim} k={k}"
        if not case.right():
            print(f"{shape}: not the reference's lists", flush=True)
            rows.add(class_name, 0.0)
            wrong += 1
            continue
        missed = case.uncertified()
        times = interleaved(case.functions(unit), case.rotate, asked.repeats)
        times |= interleaved({"reference": case.reference}, case.rotate, 3)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        flops, moved = 2.0 * batch * asked.items * dim, asked.items * (2.0 * dim + 5)
        for name, seconds in times.items():
            done = record(
                "cosine_topk", shape, "bf16 scan", name, seconds, flops, moved,
                max(moved / bandwidth, flops / rate), median["torch"], median["compile+graph"],
            )  # fmt: skip
            print(line(done), flush=True)
            ratios = {"x_torch_graph": median["torch+graph"] / median[name]}
            ratios["x_reference"] = median["reference"] / median[name]
            cases.append(done | ratios | {"bucket": class_name, "uncertified": missed})
        print(f"  {missed:.2f} of {batch} queries not certified at first", flush=True)
        store(asked.out, surroundings, settings, cases)  # a run that is cut off keeps what it had
        rows.add(class_name, median["reference"] / median["triton"])
        if asked.sweep and k == asked.ks[0]:
            sweep(case, asked.repeats)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
