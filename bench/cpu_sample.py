"""`sample` in C++ on the CPU beside the released way and plain PyTorch, interleaved in one run.

    python bench/cpu_sample.py --users 64 --dim 512 --steps 200 --repeats 7

Variants of a case take turns, so that other work on the machine slows all of them alike. Each case
is checked against the reference in float64, on its first users, before it is timed. Baselines:

- linear and mlp: `released.py`, its arithmetic in float32; for mlp also well-written PyTorch
  (`torch_sampler.py`: folded, hoisted); for the law one product [B, 2D] x [2D, D] and the normals;
- adaln and separable: the plan's reference in float32, step by step, for the release has none.

`x torch` is over the baseline named first, in every dtype. Threads: OMP_NUM_THREADS.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
from released import ReleasedDenoiser, sample, schedule
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch_sampler import TorchSampler
from torch_timing import relative_error

from contrec_fast import native
from contrec_fast.models import AdaLNDenoiser, LinearDenoiser, MLPDenoiser
from contrec_fast.ops import plan_sampling

GUIDANCE = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}


def make(kind: str, dim: int, width: int, depth: int):
    """A denoiser of which every parameter is random (modulations start at zero)."""
    if kind in ("adaln", "separable"):
        denoiser = AdaLNDenoiser(dim, width, depth, separable=kind == "separable")
    else:
        denoiser = {"linear": LinearDenoiser, "mlp": MLPDenoiser}[kind](dim)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return denoiser.eval().requires_grad_(False)


def operations(kind: str, args: argparse.Namespace) -> int:
    """Floating-point operations of the folded, hoisted chain's products, per call."""
    dim, width, depth = args.dim, args.width, args.depth
    steps, modulation = args.steps, (3 * depth + 2) * width**2
    branches = 2 * (2 * depth * width**2) + 2 * dim * width
    per_row = {
        "linear": dim**2 * (steps + 1),
        "law": 2 * dim**2,
        "mlp": 4 * dim**2 * steps + 2 * dim**2,
        "adaln": (branches + modulation) * steps + dim * width,
        "separable": branches * steps + modulation + dim * width,
    }
    return 2 * args.users * per_row[kind]


def variants(kind: str, args: argparse.Namespace) -> dict:
    """(backend, dtype) to a call without arguments; the baseline of `x torch` comes first."""
    denoiser = make("linear" if kind == "law" else kind, args.dim, args.width, args.depth)
    condition, ids = torch.randn(args.users, args.dim), torch.arange(args.users)
    draw = "law" if kind == "law" else "path"
    plans = {
        name: plan_sampling(
            copy.deepcopy(denoiser).to(dtype), timesteps=args.steps, guidance=GUIDANCE
        )
        for name, dtype in [*DTYPES.items(), ("fp64", torch.float64)]
    }

    def call(name, backend):
        given = condition.to(plans[name].times.dtype)
        return lambda: plans[name](given, 1, ids, draw=draw, backend=backend)

    few = condition[:4].double(), 1, ids[:4]
    exact = plans["fp64"](*few, draw=draw)
    errors = {name: relative_error(call(name, "cpp")()[:4], exact) for name in DTYPES}
    for name, error in errors.items():
        if not error < LIMITS[name]:
            raise SystemExit(f"{kind} {name}: relative error {error:.2g} to the float64 reference")

    found = {}
    if kind == "law":
        for name, dtype in DTYPES.items():
            x = torch.randn(args.users, 2 * args.dim).to(dtype)
            weight = torch.randn(2 * args.dim, args.dim).to(dtype)

            def product(x=x, weight=weight):
                native.philox_normal(torch.tensor(1), ids, args.dim, 0)
                return x @ weight

            found["product + normals", name] = product
    elif kind in ("linear", "mlp"):
        released, table = ReleasedDenoiser.from_model(denoiser).eval(), schedule(args.steps)
        found["released", "fp32"] = lambda: sample(released, table, condition, GUIDANCE)
    else:
        found["reference", "fp32"] = call("fp32", "reference")
    if kind == "mlp":
        for name, dtype in DTYPES.items():
            folded = TorchSampler.from_plan(denoiser, plans["fp32"], GUIDANCE, dtype)
            given = condition.to(dtype)
            found["torch folded", name] = lambda folded=folded, given=given: folded(given)
    return found | {("cpp", name): call(name, "cpp") for name in DTYPES}


@torch.no_grad()
def measure(kind: str, args: argparse.Namespace) -> list[dict]:
    calls = variants(kind, args)
    seconds = {key: [] for key in calls}
    for repeat in range(args.warmup + args.repeats):
        for key, call in calls.items():
            _, elapsed = timed("cpu", call)
            if repeat >= args.warmup:
                seconds[key].append(elapsed)
    first, shape = next(iter(calls)), f"B{args.users} D{args.dim} T{args.steps}"
    if kind in ("adaln", "separable"):
        shape += f" W{args.width} depth{args.depth}"
    cases = []
    for (backend, dtype), times in seconds.items():
        # The law's product has a counterpart in each dtype.
        baseline = seconds[(first[0], dtype) if kind == "law" else first]
        flops = operations(kind, args) if backend == "cpp" else None
        cases.append(
            record(
                f"sample {kind}", shape, dtype, backend, times,
                flops=flops, torch_s=statistics.median(baseline),
            )
        )  # fmt: skip
        print(line(cases[-1]), flush=True)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in [
        ("users", 64), ("dim", 512), ("steps", 200), ("width", 1024), ("depth", 3),
        ("repeats", 7), ("warmup", 1),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default)
    kinds = ["law", "linear", "mlp", "adaln", "separable"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if native.build_info() is None:
        parser.exit(1, f"the C++ extension is absent: {native.why_missing()}\n")
    torch.manual_seed(0)
    print(COLUMNS)
    cases = [case for kind in args.kinds for case in measure(kind, args)]
    if args.out:
        settings = vars(args) | {"isa": native.sampler_instruction_sets()}
        store(args.out, environment("cpu"), settings, cases)


if __name__ == "__main__":
    main()
