"""`catalog_cross_entropy` on the CPU against plain PyTorch, forward and backward, interleaved.

Cosine similarity, temperature 0.05, the mean loss, gradients in queries and vectors. The baseline
is the operation's reference: normalise, one product, `torch.nn.functional.cross_entropy`.

"CPU us" is the median processor time of a call, of all threads together, which tells more than
the clock on a machine that others use. "MiB" is the most memory that a call held beyond what was
held before and the gradients that it returns; each is measured in a process of its own.

    python bench/cpu_cross_entropy.py --threads 2 --out bench/results/cpu-cross-entropy.json
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch import Tensor

from contrec_fast import native, ops

CASES = [(100_000, 64, 256), (1_000_000, 64, 256), (100_000, 512, 256), (12_101, 64, 4096)]
BACKENDS = {"cpp": "cpp", "reference": "torch"}


def inputs(items: int, dim: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    queries, vectors = (torch.randn(n, dim, requires_grad=True) for n in (batch, items))
    return queries, vectors, torch.randint(items, (batch,))


def step(backend: str, queries: Tensor, vectors: Tensor, targets: Tensor) -> list[Tensor]:
    """The mean loss and its gradients."""
    loss = ops.catalog_cross_entropy(queries, vectors, targets, 0.05, backend=backend).mean()
    return [loss.detach(), *torch.autograd.grad(loss, (queries, vectors))]


def extra_mib(backend: str, items: int, dim: int, batch: int, threads: int) -> float | None:
    """Memory that a step holds beyond its results, in a process of its own; None off Linux."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, cpu_cross_entropy as bench, cpu_topk\n"
        f"torch.set_num_threads({threads})\n"
        f"bench.step({backend!r}, *bench.inputs(9, {dim}, 3))\n"
        f"given = bench.inputs({items}, {dim}, {batch})\n"
        f"print(cpu_topk.peak_mib(bench.step, {backend!r}, *given))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = done.stdout.strip()
    return None if found == "None" else float(found) - 4 * dim * (items + batch) / 2**20


def run(items: int, dim: int, batch: int, repeats: int) -> list[dict]:
    """Records of both backends on one case; each repeat has new random queries."""
    seconds, processor = ({name: [] for name in BACKENDS} for _ in range(2))
    given = inputs(items, dim, batch)
    for repeat in range(repeats + 1):
        given = inputs(1, dim, batch)[0], given[1], torch.randint(items, (batch,))
        results = {}
        for name in BACKENDS:
            begun = time.process_time()
            results[name], took = timed("cpu", step, name, *given)
            if repeat:  # the first is untimed
                processor[name].append(time.process_time() - begun)
                seconds[name].append(took)
        for ours, theirs in zip(results["cpp"], results["reference"]):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), "results differ"
    return [
        record(
            "catalog_cross_entropy", f"{items} items x {dim}, B {batch}, forward and backward",
            "float32", BACKENDS[name], took, flops=6.0 * batch * items * dim,
            torch_s=statistics.median(seconds["reference"]),
        )
        | {
            "cpu_us": 1e6 * statistics.median(processor[name]),
            "extra_mib": extra_mib(name, items, dim, batch, torch.get_num_threads()),
        }
        for name, took in seconds.items()
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time catalog_cross_entropy on the CPU.")
    parser.add_argument(
        "--case", type=positive, nargs=3, metavar=("ITEMS", "DIM", "BATCH"), action="append",
        help="may be repeated; default: four cases",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(arguments)
    if why := native.why_missing():
        parser.exit(1, f"no C++ extension: {why}\n")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    found = environment("cpu") | {"isa": native.cross_entropy_instruction_sets()[0]}
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(COLUMNS, "| CPU us | MiB")
    results = []
    for case in args.case or CASES:
        for one in run(*case, args.repeats):
            peak = "-" if one["extra_mib"] is None else f"{one['extra_mib']:.1f}"
            print(line(one), f"{one['cpu_us']:.0f}", peak, sep=" | ", flush=True)
            results.append(one)
    if args.out:
        store(args.out, found, vars(args), results)


if __name__ == "__main__":
    main()
