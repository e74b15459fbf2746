"""The Triton kernels under a checker or a profiler: `triton_tools.py compute-sanitizer|ncu`.

compute-sanitizer must find no wrong access in `gpu_small.py odd`; ncu tells of each launch in
`gpu_small.py hot` how long it took and what it kept busy, one JSON line each.
"""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

from check_tools import run

SMALL = str(Path(__file__).with_name("gpu_small.py"))
KERNELS = "sample_maxima|mark_candidates|collect|rescore|finish|update|mlp_.*|adaln_.*"
KERNELS += "|copy_rows|multiply_rows|sum_chunks|sum_partials|losses|query_gradients"
KERNELS += "|vector_gradients|hidden|modulate.*|expand.*|residual.*"
LAUNCHES = 120
METRICS = {
    "gpu__time_duration.sum": "microseconds",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_compute",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_bandwidth",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "percent_of_warps",
    "launch__registers_per_thread": "registers",
}


def check() -> bool:
    # Every tensor gets memory of its own, so that what is beyond its end is nobody's.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    status, said = run(
        "compute-sanitizer", "--tool=memcheck", "--error-exitcode=9",
        "--report-api-errors=no",  # libraries ask a driver for what it may not have
        sys.executable, SMALL, "odd",
    )  # fmt: skip
    summary = re.search(r"ERROR SUMMARY: (\d+) error", said)
    errors = int(summary[1]) if summary else None
    print(json.dumps({"case": "memcheck", "errors": errors, "exit_status": status}), flush=True)
    return status == 0 and errors == 0


def profile() -> bool:
    status, said = run(
        "ncu", "--clock-control", "none", "--csv", "--print-units", "base", "--kernel-name",
        f"regex:^({KERNELS})$", "--launch-count", str(LAUNCHES), "--metrics", ",".join(METRICS),
        sys.executable, SMALL, "hot",
    )  # fmt: skip
    rows = list(csv.DictReader(line for line in said.splitlines() if line.startswith('"')))
    launches = {}
    for row in rows:
        name, value = METRICS.get(row.get("Metric Name")), row.get("Metric Value")
        if name is None or not re.fullmatch(r"[\d.,]+(e[+-]?\d+)?", value or ""):
            continue  # a counter that this chip does not have
        value = float(value.replace(",", ""))
        if name == "microseconds":
            value *= 1e-3  # from nanoseconds, the base unit
        launches.setdefault((row["ID"], row["Kernel Name"]), {})[name] = value
    for (_, kernel), figures in launches.items():
        print(json.dumps({"case": kernel} | figures), flush=True)
    return status == 0 and any("microseconds" in figures for figures in launches.values())


def main(tool: str) -> int:
    if shutil.which(tool) is None:
        print(f"{tool}: not found on PATH", file=sys.stderr)
        return 1
    good = {"compute-sanitizer": check, "ncu": profile}[tool]()
    if not good:
        print(f"{tool}: see its output above", file=sys.stderr)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
