"""Certified top-K in Triton on a GPU: right first, then how fast, against plain PyTorch.

    python bench/gpu_topk.py --out FILE [--rows FILE] [--sweep]

Per case one line as in `reporting`, and the number of queries whose first attempt was not
certified. The floor is the larger of the scan copy's bytes over the copy bandwidth and the products
over the bf16 matrix rate, both measured first. `--rows` writes the rows of
contrec_fast/ops/measured.json that this run supports; `--sweep` times other tiles as well.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from reporting import COLUMNS, environment, line, positive, record, store
from torch_timing import capture, measure
from torch_topk import torch_topk

from contrec_fast import ops
from contrec_fast.ops import dispatch, triton_topk

PI, GROUPS, SEEN, ROTATED = 0.1, 64, 50, 4
CHUNK = 512  # queries whose scores plain PyTorch holds at once


def ceilings() -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a bf16 product, on random data."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    device = source.device
    copy = measure(lambda: target.copy_(source), device)["median"] * 1e-6
    product = measure(lambda: a @ b, device)["median"] * 1e-6
    return 2 * 4 * source.numel() / copy, 2 * 8192**3 / product


def interleaved(functions: dict, rotate, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call: one of each function in turn, each on other queries than before."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        rotate(repeat)
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end) * 1e-3)
    return times


class Case:
    """B queries that rotate in one place, with seen lists and a bonus, and what can serve them."""

    def __init__(self, catalog: ops.Catalog, unit: torch.Tensor, batch: int, k: int):
        from contrec_kernels import topk

        count, dim = catalog.vectors.shape
        self.batch, self.k = batch, k
        self.others = torch.randn(ROTATED, batch, dim, device="cuda")
        self.queries = self.others[0].clone()
        matched = torch.rand(batch, GROUPS, device="cuda") < 2 / GROUPS
        lists = torch.randint(count, (batch, SEEN)).sort(dim=1).values
        seen = ops.SeenLists.from_lists(lists.tolist(), "cuda")
        self.arguments = (
            self.queries, catalog.vectors, catalog.norms, catalog.scan, catalog.errors,
            catalog.groups, catalog.eligible, k, matched, PI, seen.offsets, seen.ids,
            torch.arange(batch, device="cuda"),
        )  # fmt: skip
        groups, ids = catalog.groups.long(), lists.cuda()

        def plain(torch_topk=torch_topk):
            for at in range(0, batch, CHUNK):
                some = slice(at, at + CHUNK)
                rows = torch.arange(len(ids[some]), device="cuda").repeat_interleave(SEEN)
                pairs = rows, ids[some].flatten()
                found = torch_topk(self.queries[some], unit, groups, matched[some], *pairs, PI, k)
            return found[0]

        compiled = torch.compile(torch_topk, dynamic=False)
        self.search = lambda **options: topk.search(*self.arguments, **options)
        self.functions = {
            "triton": lambda: topk.cosine_topk(*self.arguments),
            "triton+graph": capture(lambda: self.search()[0], unit.device)[0],
            "torch": plain,
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
            expected, found = self.reference(), self.functions["triton"]()
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
    if not torch.cuda.is_available():
        print(f"gpu_topk: needs a CUDA GPU; torch {torch.__version__} sees none")
        return 1
    bandwidth, rate = ceilings()
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n{COLUMNS}")
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    cases, rows, wrong = [], {}, 0
    for dim in asked.dims:
        vectors = torch.randn(asked.items, dim, device="cuda")
        catalog = ops.Catalog(vectors, torch.randint(GROUPS, (asked.items,), device="cuda"))
        unit = torch.nn.functional.normalize(vectors, dim=1).bfloat16()
        for k in asked.ks:
            for batch in asked.batches:
                case = Case(catalog, unit, batch, k)
                shape = f"B={batch} N={asked.items} D={dim} k={k}"
                if not case.right():
                    print(f"{shape}: not the reference's lists", flush=True)
                    wrong += 1
                    continue
                missed = case.uncertified()
                times = interleaved(case.functions, case.rotate, asked.repeats)
                median = {name: statistics.median(seconds) for name, seconds in times.items()}
                slow = interleaved({"reference": case.reference}, case.rotate, 3)["reference"]
                flops, moved = 2.0 * batch * asked.items * dim, asked.items * (2.0 * dim + 5)
                for name, seconds in times.items():
                    done = record(
                        "cosine_topk", shape, "bf16 scan", name, seconds, flops, moved,
                        max(moved / bandwidth, flops / rate), median["torch"],
                        median["compile+graph"],
                    )  # fmt: skip
                    print(line(done), flush=True)
                    cases.append(done | {"uncertified": missed})
                print(f"  {missed:.2f} of {batch} queries not certified at first", flush=True)
                bucket = triton_topk._bucket(*case.arguments)
                speedup = statistics.median(slow) / median["triton"]
                rows[bucket] = min(speedup, rows.get(bucket, speedup))
                if asked.sweep and k == asked.ks[0]:
                    sweep(case, asked.repeats)
    settings = {name: str(value) for name, value in vars(asked).items()}
    store(asked.out, environment("cuda"), settings, cases)
    if asked.rows and not wrong:
        source = dispatch.source_hash(*triton_topk.SOURCES)
        common = {"operation": "cosine_topk", "backend": "triton", "architecture": architecture}
        found = [
            common | {"bucket": bucket, "source": source, "speedup": round(speedup, 3)}
            for bucket, speedup in rows.items()
            if speedup > 1
        ]
        asked.rows.write_text(json.dumps(found, indent=2) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
