"""How the benchmarks measure, print and store: one line and one JSON record per case.

    operation | shape | dtype | backend | median us (p20, p80) | TFLOP/s | GB/s | % of floor
    | x torch | x compile+graph

An absolute time counts only on the named device; a dash stands where a column does not apply.
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

COLUMNS = "operation | shape | dtype | backend | median us (p20, p80) | TFLOP/s | GB/s | % of floor"
COLUMNS += " | x torch | x compile+graph"


def positive(text: str) -> int:
    """Type of command-line arguments that count something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


positive.__name__ = "positive integer"  # what argparse calls it in its error line


def timed(device: str, function: Callable, *arguments):
    """Result of one call and its seconds, from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def record(
    operation: str,
    shape: str,
    dtype: str,
    backend: str,
    seconds: Sequence[float],
    flops: float | None = None,
    moved: float | None = None,
    floor_s: float | None = None,
    torch_s: float | None = None,
    graph_s: float | None = None,
) -> dict:
    """One case as a dictionary for JSON.

    Args:
        seconds: time of each repeat. flops, moved: floating-point operations and bytes of a call.
        floor_s: least possible time on this device. torch_s, graph_s: medians of plain torch and
            of torch.compile with CUDA graphs on the same case in the same run.

    Raises:
        ValueError: no repeat.
    """
    if not seconds:
        raise ValueError("seconds: expected at least one repeat, got none")
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()

    def over_median(value: float | None, unit: float) -> float | None:
        return None if value is None else value / median / unit

    return {
        "operation": operation,
        "shape": shape,
        "dtype": dtype,
        "backend": backend,
        "median_us": median * 1e6,
        "p20_us": low * 1e6,
        "p80_us": high * 1e6,
        "tflops": over_median(flops, 1e12),
        "gbps": over_median(moved, 1e9),
        "percent_of_floor": over_median(floor_s, 0.01),
        "x_torch": over_median(torch_s, 1),
        "x_graph": over_median(graph_s, 1),
        "seconds": list(seconds),
    }


def line(case: dict) -> str:
    """A record as one line, in the order of `COLUMNS`."""
    rates = ("tflops", "gbps", "percent_of_floor", "x_torch", "x_graph")
    words = [case[name] for name in ("operation", "shape", "dtype", "backend")]
    words.append(f"{case['median_us']:.0f} ({case['p20_us']:.0f}, {case['p80_us']:.0f})")
    words += ["-" if case[name] is None else f"{case[name]:.3g}" for name in rates]
    return " | ".join(words)


def environment(device: str) -> dict:
    """Versions, device names, clocks, threads and commit that a result stands on."""
    here = Path(__file__).resolve().parents[1]

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["clocks"] = output("nvidia-smi", query, "--format=csv,noheader")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def store(path: Path, found: dict, settings: dict, cases: Sequence[dict]) -> None:
    """Write the environment, the settings and the records as JSON.

    Where files were written says nothing about a measurement, and stays out.
    """
    settings = {name: value for name, value in settings.items() if name not in ("out", "rows")}
    stored = {"environment": found, "settings": settings, "results": list(cases)}
    write_whole(path, json.dumps(stored, indent=2) + "\n")
