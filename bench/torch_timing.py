"""Timing for the plain-PyTorch probes: CUDA graph capture, events, one JSON line per case."""

import argparse
import json
import math
import time
from collections.abc import Callable

import torch


def capture(function: Callable[[], torch.Tensor], device: torch.device):
    """function as a CUDA graph: (replay, its fixed output). On the CPU: (function, None)."""
    if device.type != "cuda":
        return function, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):  # libraries allocate and choose algorithms before the capture
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = function()
    return graph.replay, output


def measure(function: Callable, device: torch.device, seconds: float = 0.5) -> dict:
    """Median, minimum and 80th percentile in microseconds of calls that fill about `seconds`.

    On a GPU each call is timed with its own pair of events. A fifth of `seconds` goes to untimed
    calls first: they raise the clocks of an idle GPU.
    """
    with torch.no_grad():
        function()
        synchronize(device)
        begun = time.perf_counter()
        while True:
            start = time.perf_counter()
            function()
            synchronize(device)
            end = time.perf_counter()
            if end - begun > seconds / 5:
                break
        repeats = max(5, min(200, math.ceil(seconds / (end - start))))
        times = []
        if device.type == "cuda":
            events = [
                [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)
            ]
            for begin, end in events:
                begin.record()
                function()
                end.record()
            torch.cuda.synchronize()
            times = [1e3 * begin.elapsed_time(end) for begin, end in events]
        else:
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    median, p80 = times[repeats // 2], times[repeats * 4 // 5]
    return {"unit": "us", "min": times[0], "median": median, "p80": p80, "repeats": repeats}


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(case: str, **figures):
    """One JSON object on one line of stdout, as the CUDA probes print: null for nan and inf."""
    for name, figure in figures.items():
        if isinstance(figure, float) and not math.isfinite(figure):
            figures[name] = None
    print(json.dumps({"case": case} | figures), flush=True)


def arguments(description: str, **options) -> argparse.Namespace:
    """Command line with `--device` (default cuda) and one option per keyword, by its default.

    A list as default takes several values, False makes a flag. Ends with one line on stderr where
    the device is not there.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    for name, default in options.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    found = parser.parse_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"--device cuda: torch {torch.__version__} sees no CUDA GPU\n")
    found.device = torch.device(found.device)
    return found


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """||output - reference|| / ||reference|| in float64."""
    reference = reference.double()
    return ((output.double() - reference).norm() / reference.norm()).item()
