"""`cosine_topk` on the CPU against plain PyTorch and faiss, interleaved in one run.

Every item has one of 10 groups, every query names one of them (so 10 % of the items match) and
its user has seen 50 items. Baselines, as fast as we could make them:

- torch: normalised vectors sorted by group beforehand, so that the bonus is one product per
  group's slice; one matrix of scores, one indexed write for seen items, one topk.
- torch-chunks, torch-bfloat16: the same in chunks of items, the lists of chunks merged.
  bfloat16 scores are not exact.
- faiss: IndexFlatIP, without the bonus and without leaving out what was seen. Where installed.

"CPU us" is the median processor time of a call, of all threads together, which tells more than
the clock on a machine that others use. "MiB" is the most memory that a call held beyond what the
process held before.

    python bench/cpu_topk.py --threads 2 --out bench/results/cpu-topk.json
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch import Tensor

from contrec_fast import native, ops

try:
    import faiss
except ImportError:
    faiss = None

CASES = [(1_000_000, 64, 256, 20), (100_000, 512, 256, 100), (1_000_000, 64, 1, 20)]
CASES += [(100_000, 512, 1, 100)]
GROUPS, SEEN, PI = 10, 50, 0.1
CHUNK = {torch.float32: 8192, torch.bfloat16: 32_768}


class Baseline:
    """Normalised items in order of their groups, in one dtype, searched with plain PyTorch."""

    def __init__(self, vectors: Tensor, groups: Tensor, dtype: torch.dtype, chunk: int):
        self.original = groups.argsort(stable=True)
        self.place = torch.empty_like(self.original)
        self.place[self.original] = torch.arange(len(groups))
        self.items = F.normalize(vectors)[self.original].to(dtype)
        self.starts = [0, *torch.bincount(groups, minlength=GROUPS).cumsum(0).tolist()]
        self.chunk = chunk

    def __call__(self, queries: Tensor, matched: Tensor, seen: Tensor, k: int):
        """seen: [B, SEEN] item ids."""
        unit = F.normalize(queries).to(self.items.dtype)
        factor = (1 + PI * matched.float()).to(self.items.dtype)
        place = self.place[seen]
        order = place.flatten().argsort()
        place, row = place.flatten()[order], order // SEEN
        starts = range(0, len(self.items), self.chunk)
        ends = torch.searchsorted(place, torch.tensor([*starts, len(self.items)])).tolist()
        best, found = [], []
        for number, start in enumerate(starts):
            part = self.items[start : start + self.chunk]
            stop = start + len(part)
            scores = unit @ part.T
            for group in range(GROUPS):
                low = max(self.starts[group], start) - start
                high = min(self.starts[group + 1], stop) - start
                if low < high:
                    scores[:, low:high] *= factor[:, group, None]
            some = slice(ends[number], ends[number + 1])
            scores[row[some], place[some] - start] = -torch.inf
            values, at = scores.topk(min(k, len(part)), dim=1)
            best.append(values)
            found.append(at + start)
        values, at = torch.cat(best, dim=1).topk(k, dim=1)
        return values.float(), self.original[torch.cat(found, dim=1).gather(1, at)]


def peak_mib(function: Callable, *arguments) -> float | None:
    """Resident memory that a call held beyond what was held before; None off Linux."""

    def held(name: str) -> int:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count as held
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = held("VmRSS")
        function(*arguments)
        return (held("VmHWM") - before) / 1024
    except (AttributeError, OSError):
        return None


def variants(vectors: Tensor, groups: Tensor, k: int) -> dict[str, Callable]:
    """name -> function of (queries, matched, seen)."""
    catalog = ops.Catalog(vectors, groups)

    def cpp(queries: Tensor, matched: Tensor, seen: Tensor):
        lists = ops.SeenLists.from_lists(seen)
        rows = torch.arange(len(queries))
        return lambda: ops.cosine_topk(queries, catalog, k, matched, PI, lists, rows, "cpp")

    def plain(dtype: torch.dtype, chunk: int):
        baseline = Baseline(vectors, groups, dtype, chunk)
        return lambda *arguments: lambda: baseline(*arguments, k)

    found = {"cpp": cpp, "torch": plain(torch.float32, len(vectors))}
    for dtype, name in [(torch.float32, "torch-chunks"), (torch.bfloat16, "torch-bfloat16")]:
        found[name] = plain(dtype, CHUNK[dtype])
    if faiss is not None:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(F.normalize(vectors).numpy())
        found["faiss"] = lambda queries, *rest: (
            lambda: index.search(F.normalize(queries).numpy(), k)
        )
    return found


def run(items: int, dim: int, batch: int, k: int, repeats: int) -> list[dict]:
    """Records of every variant on one case; each repeat has new random queries."""
    vectors, groups = torch.randn(items, dim), torch.arange(items) % GROUPS
    functions = variants(vectors, groups, k)
    seconds, processor = ({name: [] for name in functions} for _ in range(2))
    memory, counted = dict.fromkeys(functions), {}
    for repeat in range(repeats + 1):
        queries = torch.randn(batch, dim)
        matched = F.one_hot(torch.randint(GROUPS, (batch,)), GROUPS).bool()
        seen = torch.randint(items, (batch, SEEN))
        results = {}
        for name, prepare in functions.items():
            call = prepare(queries, matched, seen)
            if repeat == 0:  # untimed
                memory[name] = peak_mib(call)
                continue
            begun = time.process_time()
            results[name], took = timed("cpu", call)
            processor[name].append(time.process_time() - begun)
            seconds[name].append(took)
        if results:
            counted = native.topk_statistics()
            torch.testing.assert_close(results["cpp"][0], results["torch"][0], rtol=0, atol=1e-5)
    shape = f"{items} items x {dim}, B {batch}, k {k}, 10 % matched, {SEEN} seen each"
    torch_s = statistics.median(seconds["torch"])
    bits = {"cpp": 2, "torch-bfloat16": 2}
    return [
        record(
            "cosine_topk", shape, "bfloat16" if name in bits else "float32", name, took,
            flops=2.0 * batch * items * dim, moved=bits.get(name, 4) * items * dim,
            torch_s=torch_s,
        )
        | {
            "cpu_us": 1e6 * statistics.median(processor[name]),
            "peak_mib": memory[name],
            "statistics": counted if name == "cpp" else None,
        }
        for name, took in seconds.items()
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time cosine_topk on the CPU.")
    parser.add_argument(
        "--case", type=positive, nargs=4, metavar=("ITEMS", "DIM", "BATCH", "K"), action="append",
        help="may be repeated; default: four cases",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(arguments)
    if why := native.why_missing():
        parser.exit(1, f"no C++ extension: {why}\n")
    for case in args.case or ():
        if case[3] + SEEN > case[0]:
            parser.error(f"argument --case: expected {case[3] + SEEN} items or more, got {case[0]}")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    if faiss is not None:
        faiss.omp_set_num_threads(args.threads)
    found = environment("cpu") | {"faiss": faiss and faiss.__version__}
    found["isa"] = native.topk_instruction_sets()[0]
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(COLUMNS, "| CPU us | MiB")
    results = []
    for case in args.case or CASES:
        for one in run(*case, args.repeats):
            peak = "-" if one["peak_mib"] is None else f"{one['peak_mib']:.1f}"
            print(line(one), f"{one['cpu_us']:.0f}", peak, sep=" | ", flush=True)
            results.append(one)
    if args.out:
        store(args.out, found, vars(args), results)


if __name__ == "__main__":
    main()
