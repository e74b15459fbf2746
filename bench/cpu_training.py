"""A training step of the model on the CPU: the operations' references against what `auto` takes.

The model is the default one on made-up data (a catalog of random vectors and titles, users with 20
items), its weights untrained: a step's time does not depend on them. Forward, backward and update,
both ways in turns, from the same weights and batches; the losses must agree. "MiB" is the most
memory that steps held beyond what the process held before them, each way in a process of its own.

    python bench/cpu_training.py --threads 2 --out bench/results/cpu-training.json
"""

import argparse
import contextlib
import copy
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from reporting import COLUMNS, environment, line, positive, record, store, timed

from contrec_fast import Config, apply_overrides, native
from contrec_fast.data.interactions import Dataset, Items
from contrec_fast.data.prompts import Prompts, Window
from contrec_fast.models.backbone import make_tiny_backbone
from contrec_fast.models.contrec import ContRec
from contrec_fast.models.latent import make_tokenizer
from contrec_fast.ops import dispatch

WAYS = {"auto": "auto", "reference": "torch"}
OPERATIONS = ("gather_tokens", "denoise", "catalog_cross_entropy")


@contextlib.contextmanager
def forced(way: str):
    """Let every operation be served as usual ("auto") or by its reference."""
    choose = dispatch._choose
    if way == "reference":
        dispatch._choose = lambda operation, *arguments: dispatch.REFERENCE
    try:
        yield
    finally:
        dispatch._choose = choose


class Steps:
    """A model of `items` items and its training step on batches of `users` users."""

    def __init__(self, items: int, users: int, overrides: Sequence[str] = ()):
        torch.manual_seed(0)
        config = apply_overrides(Config(), list(overrides))
        words = [f"thing {number % 977} of kind {number % 31}" for number in range(items)]
        names = Items([str(number) for number in range(items)], words, [""] * items)
        rng = np.random.default_rng(0)
        histories = list(rng.integers(items, size=(users, config.prompt.history + 1)))
        dataset = Dataset(names, [str(u) for u in range(users)], histories, np.full(users, -1))
        backbone, text_tokenizer = make_tiny_backbone(words[:2000], config.backbone)
        vectors = torch.randn(items, config.lightgcn.dim)
        tokenizer = make_tokenizer(config, vectors.shape[1], backbone.config.hidden_size)
        self.model = ContRec(config, backbone, text_tokenizer, tokenizer, vectors, dataset)
        self.model.calibrate()
        prompts = Prompts(names, text_tokenizer, config.tokenizer.tokens, config.prompt)
        self.batch = prompts.training_batch([Window(history, 0) for history in histories])
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-3
        )

    def __call__(self, way: str, seed: int) -> float:
        with forced(way):
            torch.manual_seed(seed)
            self.model.train()
            losses = self.model(self.batch)
            weights = vars(self.model.config.training)
            loss = sum(weights[f"{name}_weight"] * value for name, value in losses.items())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())


def extra_mib(way: str, items: int, users: int, overrides: Sequence[str]) -> float | None:
    """Memory that steps hold beyond the model and its data; None off Linux."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, cpu_topk\n"
        "from cpu_training import Steps\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"steps = Steps({items}, {users}, {list(overrides)!r})\n"
        f"print(cpu_topk.peak_mib(lambda: [steps({way!r}, seed) for seed in range(2)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.splitlines()[-1]
    return None if found == "None" else float(found)


def run(items: int, users: int, repeats: int, overrides: Sequence[str]) -> list[dict]:
    both = {name: Steps(items, users, overrides) for name in WAYS}
    both["reference"].model.load_state_dict(copy.deepcopy(both["auto"].model.state_dict()))
    seconds, served = {name: [] for name in WAYS}, {}
    for repeat in range(repeats + 1):
        losses = {}
        for name, steps in both.items():
            losses[name], took = timed("cpu", steps, name, repeat)
            served[name] = {operation: dispatch.last_backend(operation) for operation in OPERATIONS}
            if repeat:  # the first is untimed
                seconds[name].append(took)
        apart = abs(losses["auto"] - losses["reference"]) / abs(losses["reference"])
        assert apart < 1e-4 * (1 + repeat), f"losses differ by {apart:.1e} after {repeat} steps"
    shape = f"{items} items, {users} users x {both['auto'].model.config.prompt.history} items"
    return [
        record(
            "training step", " ".join([shape, *overrides]), "float32", WAYS[name], took,
            torch_s=statistics.median(seconds["reference"]),
        )
        | {"extra_mib": extra_mib(name, items, users, overrides), "served": served[name]}
        for name, took in seconds.items()
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time training steps on the CPU.")
    parser.add_argument("--items", type=positive, nargs="+", default=[12_000, 100_000])
    parser.add_argument("--users", type=positive, default=32)
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(arguments)
    if why := native.why_missing():
        parser.exit(1, f"no C++ extension: {why}\n")
    torch.set_num_threads(args.threads)
    print(COLUMNS, "| MiB")
    results = []
    for items in args.items:
        for one in run(items, args.users, args.repeats, args.overrides):
            peak = "-" if one["extra_mib"] is None else f"{one['extra_mib']:.0f}"
            print(line(one), peak, sep=" | ", flush=True)
            results.append(one)
    if args.out:
        store(args.out, environment("cpu"), vars(args), results)


if __name__ == "__main__":
    main()
