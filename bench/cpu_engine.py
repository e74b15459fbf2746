"""Users per second from histories to lists on the CPU, in three ways, interleaved in one run.

    python bench/cpu_engine.py RUN --out RESULT.json     # RUN: the folder of a trained model
    python bench/cpu_engine.py                           # trains on the made-up shop first

- released: the release's way, `released.py`'s pieces around its way to use the language model:
  10 users at a time, prompts padded to 1,024 tokens, tokens inserted user by user, eager
  attention, `generate` that keeps all hidden states, 2 denoiser calls per step, cosines user by
  user and a full sort. Its bonus is inert.
- torch: well-written PyTorch (`torch_generation.py`): users by length, 48 at a time (fastest of
  32 to 128), what all prompts begin with read once, key-value cache and sdpa, finished rows left
  out, the folded sampler, one product and `topk`.
- engine: `Engine`.

All three sample as the release does (exp schedule, DDPM, guidance 2), and with the same noise. The
engine's lists are compared with torch's, the texts and conditions of all three with each other.
Every round takes other users, so that the engine's drafts meet new ones; they are learned from the
users of the warm-up, as many at most, and of the rounds before. Beside the time stands the
processor's, which other work on the machine changes less. Threads: OMP_NUM_THREADS.

Stages: prompt (texts to token ids and embeddings; the engine's embeddings belong to prefill, its
noise keys and lists of seen items to prompt), prefill (the pass over prompts; the engine's includes
the draft that all answers begin with), decode, sample, top-K, and assembly, which is all the rest.
With one thread, they and the floor are in the processor's time.

The floor of the engine's prefill is what its products and its attention take if nothing else is
done: sum over products of 2 n in out / rate(in, out), n being the tokens, and in the last layer
but for keys and values and in the head the few that are read; and 4 heads d for each pair of a
token and one that it sees, at the best of the rates. rate(in, out) is measured in the same run: the
best of some repeats with 256, 1,024 and 4,096 rows, in floating-point operations per second.
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from engine_ways import AT_ONCE, TimedWays, now
from reporting import environment, positive, record, store

from contrec_fast import ContRec
from contrec_fast.config import apply_overrides
from contrec_fast.data import synthetic_shop
from contrec_fast.engine import Engine
from contrec_fast.presets import demo_config

RELEASED = ("head.schedule=exp", "head.method=ddpm", "head.guidance=2")
STAGES = ("prompt", "prefill", "decode", "sample", "top-K", "assembly")
REPEATS = 15  # of a product whose rate is measured


class PrefillFloor:
    """Least possible seconds of the prefills that go through a reader from now on."""

    def __init__(self, reader):
        self.backbone, self.prefix = reader.packed.backbone, reader.prefix
        self.opening = reader._decoder.opening
        self.tokens = self.read = self.pairs = self.last_pairs = 0
        inner = reader._prefill

        def counted(packed, wanted, *rest):
            self._count(packed.counts, wanted)
            return inner(packed, wanted, *rest)

        reader._prefill = counted

    def _count(self, counts, wanted) -> None:
        counts = counts.double()
        self.tokens += int(counts.sum())
        self.read += wanted.numel()
        self.pairs += int((counts * self.prefix + counts * (counts + 1) / 2).sum())
        self.last_pairs += int((self.prefix + wanted + 1).sum())

    @torch.inference_mode()
    def seconds(self) -> tuple[float, dict]:
        """The floor, and what it is made of."""
        base, config = self.backbone.base_model, self.backbone.config
        rates, spent, flops = {}, 0.0, 0.0
        for number, layer in enumerate(base.layers):
            last = number == len(base.layers) - 1
            for name, module in layer.named_modules():
                if isinstance(module, torch.nn.Linear):
                    all_tokens = not last or name.endswith(("k_proj", "v_proj"))
                    count = self.tokens if all_tokens else self.read
                    work = 2 * count * module.weight.numel()
                    spent += work / self._rate(module.weight, rates)
                    flops += work
        # The state that the condition is made of does not meet the head.
        head, opening = self.backbone.get_output_embeddings().weight, len(self.opening()) + 1
        work = 2 * self.read * opening / (opening + 1) * head.numel()
        spent += work / self._rate(head, rates)
        attention = 4 * config.num_attention_heads * base.layers[0].self_attn.head_dim
        attention *= self.pairs * (len(base.layers) - 1) + self.last_pairs
        spent += attention / max(rates.values())
        return spent, {
            "tokens": self.tokens,
            "product_flops": flops + work,
            "attention_flops": attention,
            "gflops_per_s": {f"{i} x {o}": rate / 1e9 for (i, o), rate in rates.items()},
        }

    @staticmethod
    def _rate(weight, rates: dict) -> float:
        out, inner = weight.shape
        if (inner, out) not in rates:
            found = []
            for rows in (256, 1024, 4096):
                x = torch.randn(rows, inner)
                for _ in range(REPEATS):
                    start = now()
                    F.linear(x, weight)
                    found.append(2 * rows * inner * out / (now() - start))
            rates[inner, out] = max(found)
        return rates[inner, out]


def load(args) -> Engine:
    if args.run:
        model = ContRec.from_pretrained(args.run)
    else:
        model = ContRec.fit(synthetic_shop(), demo_config())
    config = apply_overrides(model.config, [*RELEASED, f"head.steps={model.config.head.timesteps}"])
    wanted = (config.head.denoiser, config.head.source, config.head.prediction, config.head.space)
    if wanted != ("mlp", "hidden", "x0", "item") or config.prompt.text == "none":
        raise SystemExit("RUN: expected denoiser mlp, source hidden, prediction x0, and texts")
    model = copy.copy(model)
    model.config = config
    return Engine(model, model.dataset)


def check(found: dict, few: int) -> dict:
    """How far the ways agree on a round's users; lists must be the same but for rounding."""
    ids, texts, _ = found["engine"]
    expected, written, condition = found["torch"]
    _, released, conditions = found["released"]

    def alike(first, second):
        return float(np.mean([a == b for a, b in zip(first, second)]))

    agreement = {
        "lists like torch's": float((ids == expected).all(1).float().mean()),
        "texts like torch's": alike(texts, written),
        "released texts like torch's": alike(released, written),
        "released conditions, largest difference": float(
            (conditions - condition[:few]).abs().max()
        ),
    }
    if agreement["lists like torch's"] < 0.98 or agreement["texts like torch's"] < 0.98:
        raise SystemExit(f"the engine's lists differ: {agreement}")
    return agreement


def stage_rows(stages: dict[str, list[dict]]) -> list[dict]:
    """Microseconds per user and share of each stage, in each of the ways: medians over rounds."""
    rows = []
    for name in STAGES:
        row = {"stage": name}
        for way, rounds in stages.items():
            row[f"{way}_us"] = 1e6 * statistics.median(found[name] for found in rounds)
            shares = (found[name] / sum(found.values()) for found in rounds)
            row[f"{way}_share"] = statistics.median(shares)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a trained model")
    parser.add_argument("--users", type=positive, default=512, help="per round; 512")
    parser.add_argument("--few", type=positive, default=AT_ONCE, help="of them, released way; 10")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    engine = load(args)
    everybody = np.random.default_rng(0).permutation(len(engine.dataset.histories))
    args.users = min(args.users, len(everybody) // (args.rounds + 1))
    args.few = min(args.few, args.users)
    if not args.users:
        parser.error(f"--rounds: expected fewer than the data's {len(everybody)} users")
    warm = len(everybody) - args.rounds * args.users
    engine.recommend(everybody[: min(warm, args.users)], args.k)  # memory, drafts
    ways, floor = TimedWays(engine, args.k), PrefillFloor(engine.reader)
    seconds, processor, stages = defaultdict(list), defaultdict(list), defaultdict(list)
    agreements = []
    for number in range(args.rounds):
        rows = everybody[warm + number * args.users :][: args.users]
        noise, found = ways.noise(rows), {}
        for name, way, count in (
            ("engine", ways.fast, args.users),
            ("torch", ways.torch, args.users),
            ("released", ways.released, args.few),
        ):
            ways.clock.seconds.clear()
            begin = time.perf_counter(), time.process_time(), now()
            found[name] = way(rows[:count], noise[:, :count])
            seconds[name].append((time.perf_counter() - begin[0]) / count)
            processor[name].append((time.process_time() - begin[1]) / count)
            spent = {stage: ways.clock.seconds[stage] / count for stage in STAGES}
            spent["assembly"] = (now() - begin[2]) / count - sum(spent.values())
            stages[name].append(spent)
        agreements.append(check(found, args.few))
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    cpu = {name: statistics.median(times) for name, times in processor.items()}
    shape = f"{args.users} users, {len(ways.items)} items, {ways.steps} steps, k {args.k}"
    cases = [
        record("recommend", shape, "float32", name, times, torch_s=middle["torch"])
        | {
            "users_per_s": 1 / middle[name],
            "x_released": middle["released"] / middle[name],
            "processor_us": 1e6 * cpu[name],
            "x_torch_processor": cpu["torch"] / cpu[name],
            "x_released_processor": cpu["released"] / cpu[name],
        }
        for name, times in seconds.items()
    ]  # fmt: skip
    for case in cases:
        print(
            f"{case['backend']:9} {case['users_per_s']:8.1f} users/s  "
            f"{case['x_released']:6.1f} x released  {case['x_torch']:5.2f} x torch; processor "
            f"{case['processor_us']:.0f} us/user  {case['x_released_processor']:.1f} x released  "
            f"{case['x_torch_processor']:.2f} x torch"
        )
    table = stage_rows(stages)
    print(f"{'us/user':9}" + "".join(f" {way:>18}" for way in stages))
    for row in table:
        columns = (f" {row[f'{way}_us']:10.0f} {row[f'{way}_share']:7.1%}" for way in stages)
        print(f"{row['stage']:9}" + "".join(columns))
    least, parts = floor.seconds()
    least /= args.rounds * args.users
    prefill = next(row["engine_us"] for row in table if row["stage"] == "prefill") / 1e6
    floored = {"floor_us": 1e6 * least, "percent_of_floor": 100 * least / prefill, **parts}
    print(f"prefill: {floored['percent_of_floor']:.0f} % of its floor, {1e6 * least:.0f} us/user")
    print(engine.reader.packed.compiled)
    print(agreements[0], engine.reader.counters)
    if args.out:
        settings = vars(args) | {"run": "trained model" if args.run else "demo shop"}
        settings["layers"] = engine.reader.packed.compiled
        others = {"stages": table, "prefill": floored, "agreement": agreements}
        store(args.out, environment("cpu"), settings, [*cases, others])


if __name__ == "__main__":
    main()
