"""The results file of gpu_suite.sh: begun, added to after every part, printed as a table.

    suite_results.py start RESULTS
    suite_results.py add RESULTS LOG NAME EXIT_STATUS SECONDS LIMIT COMMAND...
    suite_results.py table RESULTS          # exits 1 if a part was not ok

The file is replaced whole each time, so that a run that is cut off leaves what it had.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

TAIL = 2000  # characters of a failed part's output


def commit() -> str:
    """The commit from git, else from the variable COMMIT, else "unknown"."""
    command = [
        "git",
        "--no-optional-locks",
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return done.stdout.strip()


def write(path: Path, results: dict):
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(results, indent=1) + "\n")
    whole.replace(path)


def start(path: Path):
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write(path, {"commit": commit(), "date": date, "environment": None, "parts": {}})


def read_figures(output: str) -> list[dict]:
    """The JSON objects that stand alone on a line."""
    figures = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                figures.append(json.loads(line))
            except json.JSONDecodeError:
                pass  # cut off in the middle of a line; the tail keeps it
    return figures


def reason_of(output: str, status: int) -> str:
    said = [line for line in output.splitlines() if line.strip() and not line.startswith("{")]
    return said[-1].strip() if said else f"exit status {status}, no output"


def add(
    path: Path, log: Path, name: str, status: int, seconds: float, limit: float, command: list[str]
):
    output = log.read_text(errors="replace")
    # timeout(1) exits 124, or 137 when the command had to be killed.
    late = status == 124 or (status == 137 and seconds >= limit)
    part = {
        "status": "ok" if status == 0 else "timeout" if late else "failed",
        "seconds": seconds,
        "limit": limit,
        "command": command,
        "figures": read_figures(output),
    }
    if late:
        part["reason"] = f"exceeded {limit:g} s" if limit > 0 else "no time left for it"
    elif status != 0:
        part["reason"] = reason_of(output, status)
    if status != 0:
        part["tail"] = output[-TAIL:]
    results = json.loads(path.read_text())
    results["parts"][name] = part
    if name == "environment" and part["figures"]:
        results["environment"] = part["figures"][-1]
    write(path, results)


def table(path: Path) -> bool:
    results = json.loads(path.read_text())
    gpu = (results["environment"] or {}).get("gpu")
    name = gpu["name"] if isinstance(gpu, dict) else "no GPU found"
    print(f"\n{name} | commit {results['commit']} | {results['date']}")
    parts = results["parts"]
    for name, part in parts.items():
        line = f"{name:24s} {part['status']:8s} {part['seconds']:6.1f} s"
        print(f"{line}  {len(part['figures']):3d} figures  {part.get('reason', '')}"[:160].rstrip())
    good = sum(part["status"] == "ok" for part in parts.values())
    print(f"{good} of {len(parts)} parts ok; figures in {path}")
    return good == len(parts)


def main(verb: str, results: str, *rest: str) -> int:
    path = Path(results)
    if verb == "start":
        start(path)
    elif verb == "add":
        log, name, status, seconds, limit, *command = rest
        add(path, Path(log), name, int(status), float(seconds), float(limit), command)
    elif verb == "table":
        return not table(path)
    else:
        print(f"{verb}: expected start, add or table", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
