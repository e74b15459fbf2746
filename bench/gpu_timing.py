"""What the GPU benchmarks of the Triton kernels share: the device, its ceilings, calls in turn.

Where there is no GPU and TRITON_INTERPRET=1, kernels are interpreted on the CPU: a dry run, whose
times say nothing.
"""

import argparse
import os
from collections.abc import Callable

import torch
from reporting import timed
from torch_timing import measure


def device_here(parser: argparse.ArgumentParser) -> torch.device:
    """Where Triton kernels run; ends with one line on stderr where they do not."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.exit(1, f"{parser.prog}: needs a CUDA GPU; torch {torch.__version__} sees none\n")
    return torch.device("cpu")


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a bf16 product, on random data far larger than caches."""
    size, words = (8192, 1 << 29) if device.type == "cuda" else (32, 1 << 12)
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    product = torch.empty_like(a)
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)["median"] * 1e-6
    multiply = measure(lambda: torch.mm(a, b, out=product), device)["median"] * 1e-6
    return 2 * 4 * words / copy, 2 * size**3 / multiply


def interleaved(
    functions: dict[str, Callable], rotate: Callable[[int], None], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, after three rounds that do not count: one of each function in turn,
    each round on other inputs, which `rotate(round)` puts in place."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        rotate(repeat)
        for name, function in functions.items():
            if torch.cuda.is_available():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                function()
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) * 1e-3
            else:
                seconds = timed("cpu", function)[1]
            if repeat >= 3:
                times[name].append(seconds)
    return times
