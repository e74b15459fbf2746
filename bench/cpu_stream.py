"""Lists of very many users on the CPU, streamed to a Parquet file: users per second and memory.

    python bench/cpu_stream.py --out RESULT.json          # 1,000,000 users, 100,000 items
    python bench/cpu_stream.py --users 20000 --kill 20000 # also SIGKILL half way, resumed

The model is the preset `tokens` (no titles, no text) with random weights, whose work is that of
trained ones. Histories have 5 to 50 items, drawn with a probability of 1 / rank. Memory is what
the process holds after each chunk of users; what it held before the first of them is the model,
the names and the histories. `--kill USERS` has lists written by other processes, too, one of which
is killed as soon as half of the chunks are there and started again; the files must be the same
byte by byte.
"""

import argparse
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from reporting import environment, positive, record, store

from contrec_fast import Recommender, preset
from contrec_fast.data import Dataset, Items
from contrec_fast.engine.stream import CHUNK
from contrec_fast.progress import ProgressBars, Silent
from contrec_fast.training.build import build

LENGTHS = 5, 50  # of histories
GIB = 2**30


def random_users(users: int, items: int) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(LENGTHS[0], LENGTHS[1] + 1, users)
    shares = np.cumsum(1 / np.arange(1, items + 1))
    chosen = np.searchsorted(shares, rng.random(lengths.sum()) * shares[-1], side="right")
    names = [f"item-{number:07d}" for number in range(items)]
    catalog = Items(names, [f"Item {number}" for number in range(items)], [""] * items)
    ids = [f"user-{number:08d}" for number in range(users)]
    return Dataset(catalog, ids, np.split(chosen, lengths.cumsum()[:-1]), np.full(users, -1))


@torch.no_grad()
def random_recommender(users: int, items: int) -> Recommender:
    model, _ = build(random_users(users, items), preset("tokens"), Silent(), pretrain=False)
    torch.nn.init.normal_(model.item_vectors)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    model.collaborative.copy_(model.item_vectors)
    model.calibrate()
    return Recommender(model)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Watch:
    """Shows progress, and keeps the time and the memory after each chunk."""

    def __init__(self, bars: ProgressBars):
        self.bars, self.times, self.memory = bars, [], []

    def stage(self, name: str, total: int, unit: str, done: int = 0):
        shown = self.bars.stage(name, total, unit, done)
        self.times.append(time.perf_counter())

        def advance(rate: float) -> None:
            self.times.append(time.perf_counter())
            self.memory.append(resident())
            shown(rate=rate, memory_GiB=self.memory[-1] / GIB)

        return advance


def stream(recommender: Recommender, path: Path, k: int) -> dict:
    """Write the lists of all users; a record of how."""
    dataset, held = recommender.model.dataset, resident()
    users, items = len(dataset.user_ids), len(dataset.items)
    recommender.recommend(dataset.user_ids[:CHUNK], k=k)  # sets up memory and libraries
    with ProgressBars() as bars:
        begun, processor, watch = time.perf_counter(), time.process_time(), Watch(bars)
        recommender.write_lists(path, k=k, progress=watch)
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    marks = watch.memory
    tenth, half = marks[(len(marks) - 1) // 10], marks[len(marks) // 2 :]
    shape = f"{users} users, {items} items, k {k}"
    return record(
        "write_lists", shape, "float32", "engine", np.diff(watch.times).tolist()
    ) | {
        "users_per_s": users / seconds,
        "processor_us_per_user": 1e6 * processor / users,
        "seconds_in_all": seconds,
        "seconds_before_the_first_chunk": watch.times[0] - begun,
        "seconds_behind_the_last_chunk": begun + seconds - watch.times[-1],
        "file_bytes": path.stat().st_size,
        "memory": {
            "before": held, "after_a_tenth": tenth, "most_in_the_second_half": max(half),
            "at_the_end": resident(), "after_each_chunk": marks,
        },
    }  # fmt: skip


def kill_and_resume(users: int, items: int, k: int, folder: Path) -> dict:
    """Let other processes write lists, one of which is killed and goes on; a record of how."""
    chunks, seconds = -(-users // CHUNK), []
    options = ["--users", users, "--items", items, "--k", k, "--lists"]

    def begin(path: Path) -> subprocess.Popen:
        return subprocess.Popen(list(map(str, [sys.executable, __file__, *options, path])))

    def finish(path: Path) -> bytes:
        begun = time.perf_counter()
        with begin(path) as process:
            if process.wait():
                raise SystemExit(f"--kill: expected exit 0, got {process.returncode}")
        seconds.append(time.perf_counter() - begun)
        return path.read_bytes()

    whole, path = finish(folder / "whole.parquet"), folder / "resumed.parquet"
    parts = path.with_name(f".{path.name}.parts")
    with begin(path) as process:
        while len(list(parts.glob("*-*.parquet"))) < chunks / 2 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    kept = len(list(parts.glob("*-*.parquet")))
    if process.returncode != -signal.SIGKILL or not 0 < kept < chunks:
        raise SystemExit(
            f"--kill: expected a kill half way, got it after {kept} of {chunks} chunks"
        )
    if finish(path) != whole:
        raise SystemExit("--kill: expected the bytes of an uninterrupted run, got others")
    return {
        "operation": "resume", "shape": f"{users} users, {items} items, k {k}",
        "chunks": chunks, "chunks_when_killed": kept, "same_bytes": True,
        "seconds_uninterrupted": seconds[0], "seconds_resumed": seconds[1],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=positive, default=1_000_000)
    parser.add_argument("--items", type=positive, default=100_000)
    parser.add_argument("--k", type=positive, default=10)
    parser.add_argument("--kill", type=positive, metavar="USERS", help="also kill and resume")
    parser.add_argument("--lists", type=Path, help="write the lists to this file, measure nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.kill and args.kill <= CHUNK:
        parser.error(f"--kill: expected more users than the {CHUNK} of a chunk")
    recommender = random_recommender(args.users, args.items)
    if args.lists:
        with ProgressBars() as bars:
            return recommender.write_lists(args.lists, k=args.k, progress=bars)
    with tempfile.TemporaryDirectory() as folder:
        results = [stream(recommender, Path(folder) / "lists.parquet", args.k)]
        if args.kill:
            results.append(kill_and_resume(args.kill, args.items, args.k, Path(folder)))
    case, memory = results[0], results[0]["memory"]
    print(
        f"{case['users_per_s']:.0f} users/s in {case['seconds_in_all']:.0f} s, "
        f"{case['processor_us_per_user']:.0f} us of processor time per user; memory "
        + ", ".join(
            f"{name.replace('_', ' ')} {size / GIB:.3f} GiB"
            for name, size in memory.items()
            if name != "after_each_chunk"
        )
    )
    for resumed in results[1:]:
        print(resumed)
    if args.out:
        store(args.out, environment("cpu"), vars(args), results)


if __name__ == "__main__":
    main()
