"""Time per user who comes back with one item more: only that read, or all from scratch.

    python bench/cpu_returning.py RUN --out RESULT.json  # RUN: the folder of a trained model
    python bench/cpu_returning.py                        # trains on the made-up shop first

Two readers see the same users, who have so many random items of the catalog, then one more; one
remembers them. Only the second visit is timed, with and without a text, the readers taking turns;
every round has other users. Conditions and texts of both are compared. Threads: OMP_NUM_THREADS.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from reporting import COLUMNS, environment, line, positive, record, store, timed

from contrec_fast import ContRec
from contrec_fast.data import synthetic_shop
from contrec_fast.data.prompts import Prompts
from contrec_fast.engine.reader import Reader
from contrec_fast.presets import demo_config


def visits(model: ContRec, items: int, args) -> list[dict]:
    config = model.config
    prompts = Prompts(
        model.dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt
    )
    readers = {
        "remembered": Reader(model, prompts, remembered=args.mib * 2**20),
        "from scratch": Reader(model, prompts, remembered=2**20),
    }
    rng, count = np.random.default_rng(items), len(model.dataset.items)
    ways = ["read"] if config.head.source == "hidden" else []
    ways += ["write"] if config.prompt.text != "none" else []
    seconds = {(way, name): [] for way in ways for name in readers}
    tokens = {name: 0 for name in readers}
    for number in range(args.rounds + 1):  # the first one warms up
        for way in ways:
            histories = list(rng.integers(count, size=(args.users, items + 1)))
            users, found = [(number, way, i) for i in range(args.users)], {}
            for name, reader in readers.items():
                known = users if name == "remembered" else None
                call = getattr(reader, way)
                call([history[:-1] for history in histories], known)
                before = reader.counters["prompts"]
                found[name], spent = timed("cpu", call, histories, known)
                if number:
                    seconds[way, name].append(spent / args.users)
                    tokens[name] += reader.counters["prompts"] - before
            compare(*found.values())
    cases = []
    for (way, name), times in seconds.items():
        shape = f"{args.users} users, {items} + 1 items"
        scratch = statistics.median(seconds[way, "from scratch"])
        read = tokens[name] / (args.users * args.rounds * len(ways))
        case = record(way, shape, "float32", name, times)
        cases.append(case | {"x_scratch": scratch / case["median_us"] * 1e6, "tokens": read})
    return cases


def compare(found, expected) -> None:
    """Conditions, or conditions and texts, are those of the other reader but for rounding."""
    if isinstance(found, tuple):
        same = np.mean([first == second for first, second in zip(found[1], expected[1])])
        if same < 0.99:
            raise SystemExit(f"texts differ: {same:.1%} are the same")
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a trained model")
    parser.add_argument("--users", type=positive, default=256, help="per round; 256")
    parser.add_argument("--items", type=positive, nargs="+", default=[5, 20, 39])
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--mib", type=positive, default=1024, help="for what is remembered; 1024")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run:
        model = ContRec.from_pretrained(args.run)
    else:
        model = ContRec.fit(synthetic_shop(), demo_config())
    print(COLUMNS, "| x from scratch | prompt tokens read per user")
    cases = []
    for items in args.items:
        for case in visits(model.eval(), items, args):
            print(line(case), f"| {case['x_scratch']:.2f} | {case['tokens']:.1f}")
            cases.append(case)
    if args.out:
        settings = vars(args) | {"run": "trained model" if args.run else "demo shop"}
        store(args.out, environment("cpu"), settings, cases)


if __name__ == "__main__":
    main()
