"""Accuracy: a model and its variants on a data set, beside all baselines, by one protocol.

    python -m bench.quality DATA --out RESULT.json --variants main,plain --seeds 0,1 [KEY=VALUE ...]

Leave-one-out, the whole catalog ranked, history excluded. Each (variant, seed) that RESULT.json
does not hold yet is trained and added to it, so that an interrupted run goes on; lists go to
RESULT.lists/ beside it. Settings KEY=VALUE hold for all variants. `--holdout validation` is for
choosing settings. `--table` prints what is there, with intervals against the best baseline.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.reporting import environment
from contrec_fast.config import Config, apply_overrides
from contrec_fast.data import Dataset, read_data
from contrec_fast.engine import Engine
from contrec_fast.environment import default_device
from contrec_fast.evaluation.baselines import BASELINES, fit_baselines
from contrec_fast.evaluation.metrics import catalog_coverage, list_diversity, rank_metrics
from contrec_fast.evaluation.protocol import compare
from contrec_fast.evaluation.ranking import recommend
from contrec_fast.models.contrec import ContRec
from contrec_fast.models.lightgcn import whiten
from contrec_fast.presets import preset
from contrec_fast.progress import ProgressBars
from contrec_fast.training import train
from contrec_fast.training.pretraining import train_lightgcn

CUTOFF = 20
# Settings of each variant, on top of a preset. The latent ones read continuous tokens only.
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": ("preset=default",),
    "default-response": ("preset=default", "prompt.text=response"),
    "default-source-response": ("preset=default", "head.source=response"),
    "contrec": ("preset=contrec",),
    "deftrec": ("preset=deftrec",),
    "main": (),
    "plain": ("head.diffusion=false",),
    "paper-losses": ("training.ranking_weight=0",),
    "paper-losses-200": (
        "training.ranking_weight=0", "head.method=ddpm", "head.steps=200", "head.guidance=2",
    ),
    "ranking-alone": ("training.diffusion_weight=0", "training.dispersive_weight=0"),
    "no-dispersive": ("training.dispersive_weight=0",),
    "steps-1": ("head.steps=1",),
    "steps-5": ("head.steps=5",),
    "guidance-1": ("head.guidance=1",),
    "guidance-2": ("head.guidance=2",),
    "no-bag": ("head.bag=false",),
    "user-token": ("head.bag=false", "prompt.user_token=true"),
    "frozen-items": ("training.train_items=false",),
    "frozen-tokens": ("training.train_tokens=false",),
    "discrete": ("tokenizer.kind=residual-quantizer", "tokenizer.tokens=4"),
    "continuous-4": ("tokenizer.tokens=4",),
    "tokenizer-space": ("head.space=tokenizer",),
    "random-items": ("lightgcn.epochs=0",),
}  # fmt: skip
# What else a trained model is asked with --probes: settings at inference, or another vector.
AT_INFERENCE: dict[str, tuple[str, ...]] = {
    **{f"guidance {w}": (f"head.guidance={w}",) for w in (1, 2)},
    **{f"steps {n}": (f"head.steps={n}",) for n in (1, 5, 20, 200)},
    **{f"draws {n}": (f"retrieval.draws={n}",) for n in (4, 16)},
    "ddpm": ("head.method=ddpm",),
    "dpm++": ("head.method=dpm++",),
}
VECTORS: dict[str, Callable] = {
    "condition alone": lambda sample, condition, keys: condition[None],
    "shuffled condition": lambda sample, condition, keys: sample(condition.roll(1, 0), keys),
    "mean of 16 draws": lambda sample, condition, keys: sample(condition, keys, 16).mean(0)[None],
}


class Probe(Engine):
    """A recommender whose vectors are made in another way, one of `VECTORS`."""

    def __init__(self, model: ContRec, dataset: Dataset, how: Callable):
        super().__init__(model, dataset)
        self.how = how

    def vectors(self, condition, keys):
        def sample(condition, keys, draws=1):
            y = self.head.plan(condition, seed=self.seed, user_ids=keys, samples=draws)
            return y if draws > 1 else y[None]

        return self.model.to_item_space(self.how(sample, condition, keys))


def configure(variant: str, settings: list[str], seed: int) -> Config:
    first, *rest = VARIANTS[variant] or ("",)
    if first.startswith("preset="):
        config = preset(first.removeprefix("preset="))
    else:
        config, rest = preset("tokens"), list(VARIANTS[variant])
    return apply_overrides(config, [*settings, *rest, f"seed={seed}"])


def lists_of(recommender: Engine, rows: np.ndarray):
    found = recommender.recommend(rows, CUTOFF)
    assert np.isfinite(found.scores[found.ids >= 0]).all(), "scores that are not finite"
    return found


def beyond(ids: np.ndarray, dataset: Dataset, vectors: np.ndarray) -> dict[str, float]:
    return {
        **rank_metrics(ids, dataset.targets),
        "coverage": catalog_coverage(ids, len(dataset.items)),
        "diversity": list_diversity(ids, vectors),
    }


def measure(variant, config, dataset: Dataset, vectors, lists: Path, progress, probes) -> dict:
    """Train and evaluate one variant; `dataset` has a target for every user."""
    started = time.perf_counter()
    model = train(dataset, config, progress)
    minutes = (time.perf_counter() - started) / 60
    rows = np.arange(len(dataset.targets))
    found = lists_of(Engine(model, dataset), rows)
    name = f"{variant}-{config.seed}"
    np.save(lists / f"{name}.npy", found.ids)
    result = {"minutes": minutes, "metrics": beyond(found.ids, dataset, vectors)}
    others = {}
    if config.prompt.text != "none" and config.head.source == "hidden":
        others["without text"] = Engine(model, dataset, text=False)
        named = others["without text"].matcher.match(found.texts).any(1)
        result["names a category"] = float(named.float().mean())
    if probes:
        others |= {label: Probe(model, dataset, how) for label, how in VECTORS.items()}
    found = {label: lists_of(recommender, rows).ids for label, recommender in others.items()}
    for label, settings in AT_INFERENCE.items() if probes else ():
        model.config = apply_overrides(config, list(settings))
        found[label] = lists_of(Engine(model, dataset), rows).ids
    result["at inference"] = {label: beyond(ids, dataset, vectors) for label, ids in found.items()}
    return result


def measure_baseline(name, dataset: Dataset, vectors, lists: Path, progress) -> dict:
    started = time.perf_counter()
    ((_, baseline),) = fit_baselines(dataset, [name], progress, True)
    ids = recommend(baseline, dataset, CUTOFF)
    np.save(lists / f"{name}-0.npy", ids)
    minutes = (time.perf_counter() - started) / 60
    return {"minutes": minutes, "metrics": beyond(ids, dataset, vectors)}


def table(results: dict, dataset: Dataset, lists: Path) -> None:
    """Markdown: every variant's mean over seeds; the interval of seed 0 to the best baseline."""
    ids = {name: np.load(lists / f"{name}-0.npy") for name in BASELINES if name in results}
    print("| | seeds | HR@10 | NDCG@10 | coverage | diversity | minutes | to the best baseline |")
    print("|---|---|---|---|---|---|---|---|")
    for name, by_seed in results.items():
        values = list(by_seed.values())
        means = {
            key: np.mean([value["metrics"][key] for value in values])
            for key in ("hr@10", "ndcg@10", "coverage", "diversity")
        }
        interval = ""
        if ids and name not in BASELINES and "0" in by_seed:
            against = compare(np.load(lists / f"{name}-0.npy"), ids, dataset)["against"]
            interval = "; ".join(
                f"{metric} {best['difference']:+.4f} [{best['low']:+.4f}, {best['high']:+.4f}] "
                f"{best['baseline']}"
                for metric, best in against.items()
            )
        minutes = np.mean([value["minutes"] for value in values])
        cells = [f"{means['hr@10']:.4f}", f"{means['ndcg@10']:.4f}", f"{means['coverage']:.3f}",
                 f"{means['diversity']:.3f}", f"{minutes:.1f}"]  # fmt: skip
        print(f"| {name} | {len(values)} | {' | '.join(cells)} | {interval} |")
        for label, metrics in values[0].get("at inference", {}).items():
            print(f"| - {label} | 1 | {metrics['hr@10']:.4f} | {metrics['ndcg@10']:.4f} | "
                  f"{metrics['coverage']:.3f} | {metrics['diversity']:.3f} | | |")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", default="", help=", ".join([*VARIANTS, *BASELINES]))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--holdout", choices=("test", "validation"), default="test")
    parser.add_argument("--probes", action="store_true", help="also other samplers and vectors")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    names = [name for name in options.variants.split(",") if name]
    for name in names:
        if name not in VARIANTS and name not in BASELINES:
            parser.error(f"--variants: expected some of {', '.join([*VARIANTS, *BASELINES])}")
        if options.probes and "head.diffusion=false" in VARIANTS.get(name, ()):
            parser.error(f"--probes: expected variants with a sampler, got {name}")

    config = apply_overrides(Config(), [*options.settings, f"data.holdout={options.holdout}"])
    dataset = read_data(options.data, config.data, config.seed)
    dataset = dataset.of_users(np.flatnonzero(dataset.targets >= 0))
    lists = options.out.with_suffix(".lists")
    lists.mkdir(parents=True, exist_ok=True)
    stored = {"settings": options.settings, "holdout": options.holdout, "results": {}}
    if options.out.exists():
        stored = json.loads(options.out.read_text())
        if stored["settings"] != options.settings or stored["holdout"] != options.holdout:
            parser.error(f"{options.out}: has other settings: {stored['settings']}")
    if options.table:
        table(stored["results"], dataset, lists)
        return
    found = environment(default_device().type)  # now: the code that runs is that of this moment
    # One space for the diversity of all lists: LightGCN's, whitened, of seed 0.
    torch.manual_seed(0)
    vectors_path = lists / "vectors.npy"
    with ProgressBars() as progress:
        if not vectors_path.exists():
            advance = progress.stage("LightGCN", config.lightgcn.epochs, "epochs")
            np.save(vectors_path, whiten(train_lightgcn(dataset, config.lightgcn, advance)[1]))
        vectors = np.load(vectors_path)
        for seed in options.seeds.split(","):
            for name in names:
                known = stored["results"].setdefault(name, {})
                if seed in known or (name in BASELINES and known):
                    continue
                if name in BASELINES:
                    result = measure_baseline(name, dataset, vectors, lists, progress)
                    seed_of = "0"
                else:
                    chosen = configure(name, options.settings, int(seed))
                    result = measure(
                        name, chosen, dataset, vectors, lists, progress, options.probes
                    )
                    result["settings"] = list(VARIANTS[name])
                    seed_of = seed
                known[seed_of] = result | {"environment": found}
                temporary = options.out.with_suffix(".partial")
                temporary.write_text(json.dumps(stored, indent=1) + "\n")
                os.replace(temporary, options.out)
                print(name, seed, result["metrics"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
