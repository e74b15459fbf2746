"""The operations of training in Triton on a GPU: right first, then how fast, against PyTorch.

    python bench/gpu_training.py --out FILE [--rows FILE] [--operations gather denoise]

- gather: whole and factored (F = 256) into `out`; its gradients in the tokens, and in both tables;
- cross-entropy: the loss with both gradients; if liger-kernel can be imported, its fused linear
  cross-entropy, too, where the similarity is "dot";
- denoise: forward, and `train` with all gradients; `dropout` as in the diffusion loss and `guided`
  as in an unrolled sampler.

Each case is checked against the reference in float64 before it is timed, by the tolerance of
`training_cases.py`. Variants take turns, on other inputs each time: triton, the eager reference and
the reference by torch.compile. The floor is the larger of the bytes over the copy bandwidth and
the products, without what is worked out again, over the matrix rate, both measured first; in
float32 that is a sixth of the bf16 rate: three TF32 products at half of it. "MiB" is the most
memory that a call held beyond what was there before, its results included. `--rows` writes the
rows that this run supports for `dispatch_table.py`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cpu_gather import WAYS
from cpu_sample import DTYPES
from dispatch_table import Rows, write_rows
from gpu_timing import ceilings, device_here, interleaved
from reporting import COLUMNS, environment, line, positive, record, store
from training_cases import Case, CrossEntropy, Denoise, Gather, GatherBackward, has_liger

LETTERS = {"gather": "BxLxH", "cross-entropy": "NxDxB", "mlp": "DxB", "adaln": "WxDEPTHxB"}
SHAPES = {  # of each operation, by the option that changes them
    "gather": {"gather": [(256, 400, 2048)]},
    "cross-entropy": {
        "cross-entropy": [
            (items, dim, batch)
            for items in (100_000, 1_000_000)
            for dim in (64, 512)
            for batch in (256, 1024)
        ]
    },
    "denoise": {"mlp": [(512, 256), (512, 4096)], "adaln": [(1024, 3, 256), (1024, 3, 4096)]},
}


def shape_of(letters: str) -> Callable[[str], tuple[int, ...]]:
    """Type of an argument with a size for each letter."""

    def parse(text: str) -> tuple[int, ...]:
        sizes = [int(size) if size.isdecimal() else 0 for size in text.split("x")]
        least = WAYS if letters == "BxLxH" else 1  # a prompt shows an item
        if len(sizes) != len(letters.split("x")) or min(sizes) < 1 or sizes[1] < least:
            wanted = f"{letters} of positive integers{f', L at least {least}' * (least > 1)}"
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return tuple(sizes)

    return parse


def planned(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Callable[..., Case]]:
    """What makes the cases of a shape, called with a device."""
    both = False, True
    if kind == "gather":
        found = [partial(Gather, factored=factored) for factored in both]
        found += [partial(GatherBackward, of_text=of_text) for of_text in both]
    elif kind == "cross-entropy":
        known = ("cosine", "dot") if has_liger() else ("cosine",)
        found = [partial(CrossEntropy, similarity=similarity) for similarity in known]
    else:
        found = [
            partial(Denoise, kind=kind, guided=guided, train=train)
            for guided in both
            for train in both
        ]
    return [partial(make, shape=shape, dtype=dtype) for make in found]


def checked(case: Case) -> tuple[dict, dict, bool]:
    """Variants that can be timed and the relative errors of their results; whether triton's are
    right. What fails is left out, with a line."""
    exact, calls, errors = case.exact(), case.variants(), {}
    for name, call in list(calls.items()):
        try:
            if name == "liger":  # gives no losses one by one
                call()
            else:
                errors[name] = case.errors(call, exact)
        except Exception as error:  # what does not fit this chip: the others still count
            if name == "reference":
                raise
            print(f"{name}: {' '.join(str(error).split())[:200]}", flush=True)
            del calls[name]
    right = "triton" in calls and case.tolerates(errors["triton"], errors["reference"])
    if "triton" in calls and not right:
        del calls["triton"]
    return calls, errors, right


def extra_mib(call: Callable, device: torch.device) -> float | None:
    """Most memory that a call holds beyond what is there; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--operations", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    for options in SHAPES.values():
        for name, default in options.items():
            letters = LETTERS[name]
            kind = {"type": shape_of(letters), "metavar": letters, "default": default}
            parser.add_argument(f"--{name}", dest=name, nargs="+", **kind)
    parser.add_argument("--repeats", type=positive, default=15)
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = device_here(parser)
    bandwidth, rate = ceilings(device)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    print(COLUMNS, "| x compile | MiB")
    surroundings = environment(device.type) | {"copy_bytes_s": bandwidth, "product_flop_s": rate}
    settings = {name: str(value) for name, value in vars(asked).items()}
    makers = [
        (name, make)
        for operation in asked.operations
        for kind in SHAPES[operation]
        for name in asked.dtypes
        for shape in getattr(asked, kind)
        for make in planned(kind, shape, DTYPES[name])
    ]
    buckets, cases, wrong = {}, [], 0
    for _, make in makers:
        case = make(device=torch.device("meta"))
        buckets.setdefault(case.operation, []).append(case.bucket)
    tables = {name: Rows(None, name, "triton", found) for name, found in buckets.items()}
    for name, make in makers:
        case = make(device=device)
        calls, errors, right = checked(case)
        if not right:
            print(f"{case.name} {case.shape} {name}: not right: {errors}", flush=True)
            wrong += 1
        extra = {variant: extra_mib(call, device) for variant, call in calls.items()}
        times = interleaved(calls, case.rotate, asked.repeats)
        median = {variant: statistics.median(seconds) for variant, seconds in times.items()}
        most = rate / (6 if case.dtype == torch.float32 else 1)
        floor = max(case.flops / most, case.moved / bandwidth)
        for variant, seconds in times.items():
            done = record(
                case.name, case.shape, name, variant, seconds, case.flops or None, case.moved,
                floor, median["reference"],
            ) | {
                "x_compile": median["compile"] / median[variant] if "compile" in median else None,
                "extra_mib": extra[variant],
                "bucket": case.bucket,
                "relative_errors": errors.get(variant),
            }  # fmt: skip
            tail = (done["x_compile"], done["extra_mib"])
            words = ["-" if value is None else f"{value:.3g}" for value in tail]
            print(" | ".join([line(done), *words]), flush=True)
            cases.append(done)
        store(asked.out, surroundings, settings, cases)  # a run that is cut off keeps what it had
        speedup = median["reference"] / median["triton"] if right else 0.0
        tables[case.operation].add(case.bucket, speedup)
        if asked.rows is not None:
            write_rows(asked.rows, [row for table in tables.values() for row in table.complete])
        del case, calls  # before the next one's tensors are made
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
