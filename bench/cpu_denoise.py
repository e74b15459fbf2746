"""`denoise` on the CPU: its backends beside the reference, interleaved in one run.

    python bench/cpu_denoise.py --dims 64 512 --batches 256 4096 --repeats 7

Variants of a case take turns, so that other work on the machine slows all of them alike.
`forward` is without gradients; `train` is a call that keeps what its backward pass needs, and that
pass. Cases are those of the diffusion loss (`dropout`: guidance 0, a tenth of the conditions
dropped, t [B] below 200; gradients of the condition and all weights) and of an unrolled sampler
(`guided`: guidance 2, t [1]; gradients of x, too). Each is checked against the reference in
float64, on its first rows, before it is timed. `saved` is what autograd keeps between the passes,
apart from the call's arguments. AdaLN heads have depth 3 and width 2 D. Threads: OMP_NUM_THREADS.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
from cpu_sample import DTYPES, LIMITS, make
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch_timing import relative_error

from contrec_fast import native, ops

STEPS = 200


class Case:
    """A call and its gradients, for one denoiser."""

    def __init__(self, kind: str, dim: int, batch: int, guided: bool, dtype: torch.dtype):
        self.denoiser = make(kind, dim, 2 * dim, 3).to(dtype).requires_grad_()
        self.x, self.condition, self.outward = torch.randn(3, batch, dim).to(dtype)
        self.t = torch.randint(STEPS, (1 if guided else batch,))
        self.drop = None if guided else torch.rand(batch) < 0.1
        self.guidance = 2.0 if guided else 0.0

    def first_rows(self, rows: int, dtype: torch.dtype) -> "Case":
        few = copy.copy(self)
        few.denoiser = copy.deepcopy(self.denoiser).to(dtype)
        few.x, few.condition, few.outward = (
            tensor[:rows].to(dtype) for tensor in (self.x, self.condition, self.outward)
        )
        few.t, few.drop = self.t[:rows], None if self.drop is None else self.drop[:rows]
        return few

    def forward(self, backend: str, x=None, condition=None) -> torch.Tensor:
        x, condition = self.x if x is None else x, self.condition if x is None else condition
        arguments = x, condition, self.t, self.guidance, self.drop
        return ops.denoise(self.denoiser, *arguments, backend=backend)

    def train(self, backend: str) -> list[torch.Tensor]:
        x = self.x.detach().requires_grad_(self.drop is None)
        condition = self.condition.detach().requires_grad_()
        y = self.forward(backend, x, condition)
        wanted = [condition, *self.denoiser.parameters(), *([x] if x.requires_grad else [])]
        return [y, *torch.autograd.grad(y, wanted, self.outward, allow_unused=True)]

    def saved_bytes(self, backend: str) -> int:
        """Bytes of the storages that autograd keeps and that are not the call's arguments."""
        given = [self.x, self.condition, self.t, *self.denoiser.parameters()]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.forward(backend, self.x.detach(), self.condition.detach().requires_grad_())
        del y
        return sum(found.values())


def check(case: Case, name: str, backend: str):
    few, exact = case.first_rows(8, case.x.dtype), case.first_rows(8, torch.float64)
    for found, expected in zip(few.train(backend), exact.train("reference")):
        if expected is None or not expected.any():
            continue
        error = relative_error(found, expected)
        if not error < LIMITS[name]:
            raise SystemExit(f"{backend} {name}: relative error {error:.2g} to float64")


def measure(kind: str, dim: int, batch: int, guided: bool, args: argparse.Namespace) -> list[dict]:
    cases, shape = [], f"B{batch} D{dim} {'guided' if guided else 'dropout'}"
    for name, dtype in DTYPES.items():
        case = Case(kind, dim, batch, guided, dtype)
        for backend in args.backends:
            check(case, name, backend)
        seconds = {
            (what, backend): []
            for what in ("forward", "train")
            for backend in ("reference", *args.backends)
        }
        for repeat in range(args.warmup + args.repeats):
            for (what, backend), times in seconds.items():
                with torch.set_grad_enabled(what == "train"):
                    _, elapsed = timed("cpu", getattr(case, what), backend)
                if repeat >= args.warmup:
                    times.append(elapsed)
        for (what, backend), times in seconds.items():
            plain = statistics.median(seconds[what, "reference"])
            row = record(f"denoise {kind} {what}", shape, name, backend, times, torch_s=plain)
            saved = ""
            if what == "train":
                row["saved_bytes"] = case.saved_bytes(backend)
                saved = f" | saved {row['saved_bytes'] / 2**20:.2f} MiB"
            cases.append(row)
            print(line(row) + saved, flush=True)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in [("dims", [64, 512]), ("batches", [256, 4096])]:
        parser.add_argument(f"--{name}", type=positive, nargs="+", default=default)
    for name, default in [("repeats", 7), ("warmup", 1)]:
        parser.add_argument(f"--{name}", type=positive, default=default)
    kinds = ["mlp", "adaln", "separable"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    known = ["cpp", "recompute"]
    parser.add_argument("--backends", nargs="+", choices=known, default=["cpp"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if native.build_info() is None:
        parser.exit(1, f"the C++ extension is absent: {native.why_missing()}\n")
    torch.manual_seed(0)
    print(COLUMNS)
    cases = [
        case
        for kind in args.kinds
        for dim in args.dims
        for batch in args.batches
        for guided in (False, True)
        for case in measure(kind, dim, batch, guided, args)
    ]
    if args.out:
        store(args.out, environment("cpu"), vars(args), cases)


if __name__ == "__main__":
    main()
