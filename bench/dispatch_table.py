"""The table from which `auto` chooses: what GPU runs showed, merged into measured.json.

    python bench/dispatch_table.py ROWS...

ROWS are files that `gpu_topk.py --rows` and its like wrote, in the order of the runs: a row
replaces what was there for its operation, backend, architecture and bucket. A row whose kernel's
source is not the installed one is left out, as is one that names a kernel that is not there; a
line says so, and the exit status is 1.
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from reporting import write_whole

from contrec_fast.ops import dispatch

KEY = ("operation", "backend", "architecture", "bucket")


class Rows:
    """Rows of one kernel as a run finds them, written anew as often as one likes.

    Only buckets all of whose cases have been measured are written: of a run that was cut off the
    others are missing, not half known. A bucket's speedup is the smallest of its cases.

    Args:
        path: file to write; None writes nothing. operation, backend: names of the kernel.
        buckets: the bucket of every case that the run plans.
    """

    def __init__(self, path: Path | None, operation: str, backend: str, buckets: list[str]):
        self.path, self.planned, self.found = path, Counter(buckets), {}
        self.common = {"operation": operation, "backend": backend, "architecture": architecture()}
        sources = dispatch._implementations[operation][backend].sources
        self.source = dispatch.source_hash(*sources)
        self._write()

    def add(self, bucket: str, speedup: float) -> None:
        """A case: how much faster than the reference it was, 0 if it was not right."""
        self.found.setdefault(bucket, []).append(speedup)
        self._write()

    @property
    def complete(self) -> list[dict]:
        """The rows so far."""
        return [
            self.common | {"bucket": bucket, "source": self.source, "speedup": round(min(cases), 3)}
            for bucket, cases in self.found.items()
            if len(cases) == self.planned[bucket]
        ]

    def _write(self) -> None:
        if self.path is not None:
            write_rows(self.path, self.complete)


def architecture() -> str:
    """The current GPU's, as "sm_90"; where there is none "interpreter", which no table takes."""
    if not torch.cuda.is_available():
        return "interpreter"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def write_rows(path: Path, rows: list[dict]) -> None:
    """One row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_whole(path, f"[\n{lines}\n]\n" if rows else "[]\n")


def read_rows(path: Path) -> list[dict]:
    """Raises ValueError, in one line, where the file does not hold rows."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON list of rows: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if (
            not isinstance(row, dict)
            or row.keys() != {*KEY, "source", "speedup"}
            or not all(isinstance(row[name], str) for name in (*KEY, "source"))
            or not isinstance(row["speedup"], (int, float))
            or not 0 <= row["speedup"] < math.inf
        ):
            wanted = f"strings {', '.join(KEY)}, source and a number speedup"
            raise ValueError(f"{path}: row {number}: expected {wanted}, got {json.dumps(row)}")
    return rows


def flaw(row: dict) -> str | None:
    """Why a row cannot speak for the installed kernels; None if it can."""
    kernel = dispatch._implementations.get(row["operation"], {}).get(row["backend"])
    if kernel is None or kernel.bucket is None:
        return "there is no such kernel"
    if not re.fullmatch(r"sm_\d+", row["architecture"]):
        return "measured on no GPU"
    if row["source"] != dispatch.source_hash(*kernel.sources):
        return "measured with another source"
    return None


def merge(*tables: list[dict]) -> tuple[list[dict], list[str]]:
    """Tables of rows, later ones over earlier ones, sorted; and a line for each row left out."""
    merged, refused = {}, []
    for row in (row for table in tables for row in table):
        key = tuple(row[name] for name in KEY)
        if reason := flaw(row):
            refused.append(f"left out: {' | '.join(key)}: {reason}")
        else:
            merged[key] = row
    return [merged[key] for key in sorted(merged)], refused


def main(*paths: str) -> int:
    if not paths:
        print("ROWS: expected at least one file, got none", file=sys.stderr)
        return 2
    try:
        tables = [read_rows(Path(path)) for path in (dispatch.TABLE, *paths)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows, refused = merge(*tables)
    write_rows(dispatch.TABLE, rows)
    for reason in refused:
        print(reason, file=sys.stderr)
    print(f"{len(rows)} rows in {dispatch.TABLE.name}, {len(refused)} left out")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
