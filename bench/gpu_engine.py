"""Users per second from histories to lists with language models of real sizes on a GPU.

    python bench/gpu_engine.py --out FILE [--models llama-3.2-1b qwen3-0.6b]

The language models have the shapes of Llama-3.2-1B and Qwen3-0.6B and random weights in bfloat16;
the catalog and its users are made up. The ways (`gpu_ways.py`) take turns, other users each
round, with the same texts, sampler (200 ancestral steps, guidance) and noise:

- released: the release at its own defaults; few users, as it is slow;
- torch: batched transformers, the fastest of some batch sizes and caches, found beforehand;
- engine: `Engine`; undrafted: the same with texts that no draft foresees, so that each token
  costs a pass; latent: without texts; fp8: with the weights in that, where the GPU can.

Random weights write nothing sensible. What is written is scripted (`gpu_ways.Script`): the
responses that name the users' held-out items, as a trained model might; every logit and its
maximum are computed all the same. How often drafts hold is then what such texts make of it;
the last round's counters tell: "replays" are passes as CUDA graphs, "passes" those without
(fallbacks), "captures" all from before. Conditions of engine and torch must agree.

"floor" is 2 x weights of the layers x tokens read over the rate of a large bfloat16 product,
measured first (attention, and what is left out in the last layer, are not counted): prefill's
share of it, with the host's part included. Then, for a batch: where the time goes, waits of the
host (`gpu_watch.count_waits`), share of the time in which the GPU was busy, peak memory (that of
the other ways included).
"""

import argparse
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cpu_engine import RELEASED
from engine_ways import AT_ONCE
from gpu_timing import ceilings, device_here
from gpu_watch import busy_share, count_waits, peak_bytes
from gpu_ways import Script, ScriptedWays
from reporting import COLUMNS, environment, line, positive, record, store
from torch_timing import relative_error, synchronize
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from contrec_fast import ContRec
from contrec_fast.config import BackboneConfig, Config, apply_overrides
from contrec_fast.data import Dataset, synthetic_shop
from contrec_fast.data.interactions import Items
from contrec_fast.data.prompts import Prompts
from contrec_fast.data.shop import BRANDS
from contrec_fast.engine import Engine
from contrec_fast.models.backbone import make_tiny_backbone
from contrec_fast.models.contrec import make_tokenizer

MODELS = {
    "llama-3.2-1b": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "vocab_size": 128_256, "max_position_embeddings": 131_072,
        },
    ),
    "qwen3-0.6b": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151_936, "max_position_embeddings": 40_960,
        },
    ),
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
}  # fmt: skip
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},  # by transformers, on a GPU
}
TARGETS = {"released": 100, "torch": 3, "floor": 50}  # times, times, percent
ERROR = 0.2  # relative, of bfloat16 through some ten layers; of unrelated conditions it is 1.4


def made_up(users: int, items: int) -> Dataset:
    """The synthetic shop with longer titles, most of which fill the 50 characters shown, and
    histories, most of which have the 20 items shown: another user's purchases come first."""
    shop = synthetic_shop(users, items)
    words = np.random.default_rng(0).choice(BRANDS, (items, 3))
    titles = [f"{title}, {' '.join(row)}" for title, row in zip(shop.items.titles, words)]
    catalog = Items(shop.items.ids, titles, shop.items.categories)
    histories = [
        np.concatenate([np.setdiff1d(shop.histories[row - 1], own), own])
        for row, own in enumerate(shop.histories)
    ]
    return Dataset(catalog, shop.user_ids, histories, shop.targets)


def load(name: str, dataset: Dataset, asked, device: torch.device) -> ContRec:
    """A ContRec with random weights, its language model in bfloat16."""
    kind, settings, shape = MODELS[name]
    shape = SMALL if asked.small else shape
    config = apply_overrides(Config(), [*RELEASED, f"head.timesteps={asked.steps}"])
    config = apply_overrides(config, [f"head.steps={asked.steps}", f"lightgcn.dim={asked.dim}"])
    tiny = BackboneConfig(hidden=16, layers=1, heads=1, vocabulary=800)
    text_tokenizer = make_tiny_backbone(dataset.items.titles + dataset.items.categories, tiny)[1]
    ends = {"pad_token_id": text_tokenizer.pad_token_id, "bos_token_id": None}
    ends["eos_token_id"] = text_tokenizer.eos_token_id
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            backbone = kind(settings(**shape, **ends, tie_word_embeddings=True))
    finally:
        torch.set_default_dtype(dtype)
    vectors = torch.randn(len(dataset.items), asked.dim)
    tokenizer = make_tokenizer(config, asked.dim, shape["hidden_size"])
    model = ContRec(config, backbone, text_tokenizer, tokenizer, vectors, dataset).to(device)
    model.calibrate()
    return model.eval().requires_grad_(False)


def scripts(recommender: Engine, rows: np.ndarray, device) -> tuple[Script, Script]:
    """Responses that name these users' held-out items, and such of random words."""
    dataset, tokenizer = recommender.dataset, recommender.model.text_tokenizer
    wanted = dataset.targets[rows]
    items = [
        [column[i] for i in wanted] for column in (dataset.items.titles, dataset.items.categories)
    ]
    catalog = Items([str(row) for row in rows], *items)
    config = recommender.model.config
    prompts = Prompts(catalog, tokenizer, config.tokenizer.tokens, config.prompt)
    lines = torch.from_numpy(prompts.responses(len(rows)))
    lines = lines[:, : config.prompt.response_tokens].to(device)
    many = lines.repeat(4, 1)  # none comes twice, as drafts would know it
    words = torch.randint(4, len(tokenizer), many.shape, device=device)
    words = torch.where((many < 0) | (many == tokenizer.eos_token_id), many, words)
    return tuple(Script(found, tokenizer.pad_token_id) for found in (lines, words))


class Stages:
    """Seconds that the engine spends in each of its parts, each until the device is done."""

    def __init__(self, engine: Engine, device: torch.device):
        self.seconds, self.device = defaultdict(float), device
        reader = engine.reader
        for owner, name, stage in (
            (reader.packer, "order", "prompt"),
            (reader.packer, "pack", "prompt"),
            (reader, "_prefill", "prefill"),
            (reader._decoder, "write", "decode"),
            (engine, "vectors", "sample"),
            (engine.head, "search", "top-K"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), stage))

    def _timed(self, call: Callable, stage: str) -> Callable:
        def wrapped(*arguments, **options):
            synchronize(self.device)
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronize(self.device)
            self.seconds[stage] += time.perf_counter() - start
            return result

        return wrapped


class Run:
    """One language model: the ways, and what they are measured by.

    Args:
        dataset: users and catalog. rate: FLOP/s of a large product.
    """

    def __init__(self, name: str, dataset: Dataset, asked, device: torch.device, rate: float):
        self.asked, self.device, self.rate = asked, device, rate
        self.model = load(name, dataset, asked, device)
        self.users = np.random.default_rng(0).permutation(len(dataset.user_ids))
        drafted = Engine(self.model, dataset)
        self.script, unforeseen = scripts(drafted, self.users, device)
        self.engines = {"engine": drafted, "undrafted": Engine(self.model, dataset)}
        self.engines["latent"] = Engine(self.model, dataset, text=False)
        if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
            self.engines["fp8"] = Engine(self.model, dataset, dtype="fp8")
        longest = self._longest(drafted)
        for way, engine in self.engines.items():
            if not engine.reader.packed.suits:
                raise SystemExit(f"{name}: expected a language model that the engine packs")
            engine.reader.cache_bytes = engine.reader.cache_bytes * 2 // 3  # all are held at once
            with (unforeseen if way == "undrafted" else self.script).engine():
                if engine.text:
                    engine.reader.warm_up(longest)
            if device.type == "cuda":
                engine.head.record([asked.users])
        self.ways = ScriptedWays(drafted, asked.k, self.script)
        self.calls = {
            name: partial(self._engine, engine) for name, engine in self.engines.items()
        } | {"torch": self.ways.torch, "released": self.ways.released}

    def _longest(self, engine: Engine) -> list[np.ndarray]:
        """Histories with the longest prompts, so that memory and graphs serve all others."""
        histories = engine.dataset.histories
        lengths = engine.prompts.inference_batch(histories).attention_mask.sum(1)
        return [histories[row] for row in lengths.argsort()[-self.asked.users :].tolist()]

    def _engine(self, engine: Engine, rows, noise):
        found = engine.recommend(rows, self.asked.k, self.asked.users)
        return torch.from_numpy(found.ids), found.texts, None

    def timed(self, call: Callable, rows: np.ndarray, noise: torch.Tensor, number: int = 0):
        """What a way returns, and its seconds a user; number: of the part that rows are."""
        self.script.next = number * self.asked.users
        synchronize(self.device)
        start = time.perf_counter()
        found = call(rows, noise[:, : len(rows)])
        synchronize(self.device)
        return found, (time.perf_counter() - start) / len(rows)

    def tune(self, rows: np.ndarray, noise: torch.Tensor) -> dict[str, float]:
        """Choose the torch way's batch and cache; users/s of all that were tried."""
        tried = {}
        for cache in self.asked.caches:
            for batch in self.asked.batches:
                self.ways.batch, self.ways.options = batch, CACHES[cache]
                if cache == "compiled":
                    self.ways.torch(rows, noise)
                tried[cache, batch] = 1 / self.timed(self.ways.torch, rows, noise)[1]
        cache, self.ways.batch = max(tried, key=tried.get)
        self.ways.options = CACHES[cache]
        return {f"{cache} {batch}": speed for (cache, batch), speed in tried.items()}

    def measure(self) -> tuple[dict[str, list[float]], dict]:
        """Seconds a user of each round by way, and all else that is known."""
        count, few = self.asked.users, min(self.asked.few, self.asked.users)
        parts = np.split(self.users, range(count, len(self.users), count))
        noise = self.ways.noise(parts[0])
        known = {"torch users/s": self.tune(parts[0], noise)}
        known["torch chosen"] = max(known["torch users/s"], key=known["torch users/s"].get)
        known["condition error"] = self.compare(parts[0], noise)
        for name, call in self.calls.items():
            self.timed(call, parts[0][:few] if name == "released" else parts[0], noise)
        seconds, same = defaultdict(list), True
        for number in range(1, 1 + self.asked.rounds):
            rows = parts[number]
            noise, texts = self.ways.noise(rows), {}
            before = {name: dict(engine.reader.counters) for name, engine in self.engines.items()}
            for name, call in self.calls.items():
                part = rows[:few] if name == "released" else rows
                found, each = self.timed(call, part, noise, number)
                seconds[name].append(each)
                texts[name] = sorted(found[1])
            same &= texts["engine"] == texts["torch"]
            for name, engine in self.engines.items():
                counters = engine.reader.counters.items()
                known[f"{name} counters"] = {key: now - before[name][key] for key, now in counters}
        known["captures"] = {
            name: engine.reader.counters["captures"] for name, engine in self.engines.items()
        }
        known["texts agree"] = same
        self.script.next = (1 + self.asked.rounds) * count  # texts that no draft knows
        return seconds, known | self.watch(parts[-1])

    def compare(self, rows: np.ndarray, noise: torch.Tensor) -> float:
        """Relative error between conditions of the engine and of torch."""
        histories = [self.ways.histories[row] for row in rows]
        found = self.engines["engine"].reader.read(histories)
        return relative_error(found, self.timed(self.ways.torch, rows, noise)[0][2])

    def watch(self, rows: np.ndarray) -> dict:
        """Stages of a batch, prefill's share of its floor, waits, busy time and memory."""
        engine, known = self.engines["engine"], {}
        call = partial(engine.recommend, rows, self.asked.k, self.asked.users)
        known["waits"] = count_waits(call, self.device)
        known["busy"] = busy_share(call, self.device)
        known["peak_bytes"] = peak_bytes(call, self.device)
        stages = Stages(engine, self.device)
        before = engine.reader.counters["prompts"]
        call()
        tokens = engine.reader.counters["prompts"] - before
        base = self.model.backbone.base_model
        weights = (
            sum(p.numel() for p in base.parameters()) - base.get_input_embeddings().weight.numel()
        )
        known["floor"] = 2 * weights * tokens / self.rate / stages.seconds["prefill"]
        known["prompt tokens"] = tokens / len(rows) + engine.reader.prefix
        return known | {"stages": dict(stages.seconds), "weights": weights}


def report(name: str, seconds: dict[str, list[float]], known: dict, asked) -> list[dict]:
    """Print and return the records of one language model."""
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    shape = (
        f"{name}, {asked.users} users, {asked.items} items, {known['prompt tokens']:.0f} tokens, "
        f"{asked.steps} steps, k {asked.k}"
    )
    cases = []
    for way, times in seconds.items():
        case = record("recommend", shape, "bfloat16", way, times, torch_s=middle["torch"])
        case |= {"users_per_s": 1 / middle[way], "x_released": middle["released"] / middle[way]}
        print(
            f"{line(case)} | {case['users_per_s']:.1f} users/s "
            f"{case['x_released']:.1f} x released {case['x_torch']:.2f} x torch",
            flush=True,
        )
        cases.append(case)
    reached = {
        "released": middle["released"] / middle["engine"],
        "torch": middle["torch"] / middle["engine"],
        "floor": 100 * known["floor"],
    }
    for target, wanted in TARGETS.items():
        unit = "% of the prefill's floor" if target == "floor" else f"x {target}"
        print(f"{name} engine: {reached[target]:.3g} {unit}, target {wanted}")
    for key, value in known.items():
        print(f"{name} {key}: {value}", flush=True)
    return [*cases, {"model": name, "reached": reached, "targets": TARGETS} | known]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--small", action="store_true", help="language models of two narrow layers")
    parser.add_argument("--users", type=positive, default=512, help="of a batch and a round; 512")
    parser.add_argument("--few", type=positive, default=AT_ONCE, help="of them, released; 10")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--items", type=positive, default=10_000)
    parser.add_argument("--dim", type=positive, default=512, help="of item vectors; 512")
    parser.add_argument("--steps", type=positive, default=200, help="of the sampler; 200")
    parser.add_argument("--k", type=positive, default=20)
    parser.add_argument("--batches", nargs="+", type=positive, default=[64, 256])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["dynamic", "static"])
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = device_here(parser)
    rate = ceilings(device)[1]
    print(f"bf16 product {rate / 1e12:.0f} TFLOP/s")
    print(COLUMNS)
    dataset = made_up((5 + asked.rounds) * asked.users, asked.items)
    surroundings = environment(device.type) | {"product_flop_s": rate}
    cases, wrong = [], 0
    for name in asked.models:
        run = Run(name, dataset, asked, device, rate)
        seconds, known = run.measure()
        cases += report(name, seconds, known, asked)
        wrong += not known["texts agree"] or not known["condition error"] < ERROR
        store(asked.out, surroundings, vars(asked), cases)  # what is cut off keeps what it had
        del run
        gc.collect()  # methods that are timed refer to their owners
        torch.cuda.empty_cache()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
