"""Whether a profiler or checker really works here: `check_tools.py TOOL SAMPLE`.

SAMPLE is the compiled probes/tool_sample.cu. ncu must read a hardware counter of its kernel, nsys
must make a report that names the kernel, compute-sanitizer must pass the clean run and find the
out-of-bounds write of the other.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNEL = "doubled"


def run(*command: str) -> tuple[int, str]:
    """Exit status and all output, echoed so that the log keeps it."""
    print("+", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def check_ncu(sample: str) -> dict:
    metric = "smsp__inst_executed.sum"
    # --clock-control none: the card's clocks are left as they are.
    status, said = run("ncu", "--clock-control", "none", "--csv", "--metrics", metric, sample)
    lines = [line for line in said.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row.get("Metric Name") == metric]
    values = [float(row["Metric Value"].replace(",", "")) for row in rows if row["Metric Value"]]
    counted = status == 0 and bool(values) and values[0] > 0
    return {"works": counted, metric: values[0] if values else None}


def check_nsys(sample: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        status, _ = run("nsys", "profile", "--trace=cuda", f"--output={report}", sample)
        made = sorted(path.name for path in Path(folder).iterdir())
        if status != 0 or "report.nsys-rep" not in made:
            return {"works": False, "files": made}
        _, said = run("nsys", "stats", "--report=cuda_gpu_kern_sum", f"{report}.nsys-rep")
    return {"works": KERNEL in said, "files": made}


def check_sanitizer(sample: str) -> dict:
    def check(*arguments: str) -> tuple[int, bool]:
        """Errors counted (-1: no summary), and whether an invalid write is among them."""
        _, said = run("compute-sanitizer", "--tool=memcheck", sample, *arguments)
        summary = re.search(r"ERROR SUMMARY: (\d+) error", said)
        return int(summary[1]) if summary else -1, "Invalid __global__ write" in said

    (clean, _), (planted, found_write) = check(), check("out_of_bounds")
    works = clean == 0 and planted > 0 and found_write
    return {"works": works, "errors_in_clean_run": clean, "errors_in_planted_run": planted}


CHECKS = {"ncu": check_ncu, "nsys": check_nsys, "compute-sanitizer": check_sanitizer}


def main(tool: str, sample: str) -> int:
    if shutil.which(tool) is None:
        print(json.dumps({"case": tool, "works": False, "reason": "not found on PATH"}))
        print(f"{tool}: not found on PATH", file=sys.stderr)
        return 1
    if not Path(sample).exists():
        print(f"{sample}: no such program (did compile-probes fail?)", file=sys.stderr)
        return 1
    _, version = run(tool, "--version")
    found = CHECKS[tool](sample)
    print(json.dumps({"case": tool, "version": version.strip().splitlines()[-1:]} | found))
    if not found["works"]:
        print(f"{tool}: runs but does not work here", file=sys.stderr)
    return not found["works"]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
