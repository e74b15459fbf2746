"""What cheaper ways to serve a trained model cost in quality, and what they gain in speed.

    python bench/engine_variants.py RUN --short SHORT_RUN --out RESULT.json

- float32: the engine as it is by default.
- bfloat16: the language model computes in that, the rest does not.
- latent: no text is written, so that there is no bonus: the latent path alone.
- bfloat16 latent: both.
- fp8: linear layers in 8 bits; on a CPU its numbers count, not its time.
- constrained: texts are responses of the catalog.
- short: another model, trained like RUN but with prompt.text=response: prompts show continuous
  tokens without titles. short latent: that one without a text.

Users per second over all users with a held-out item, the variants interleaved in one run, medians
of the rounds, in wall and processor time; HR@10 and NDCG@10, and their difference from float32
with a paired bootstrap interval of 95 %; the share of the lists' ids that float32's have, too;
the share of texts that are the same; tokens of a prompt beside those that all prompts begin with.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from reporting import environment, positive, record, store

from contrec_fast import ContRec
from contrec_fast.engine import Engine
from contrec_fast.evaluation import paired_bootstrap, user_metrics

K = 10
METRICS = (f"hr@{K}", f"ndcg@{K}")


def overlap(ids, others) -> float:
    """Share of ids [U, K] that the same user's others have, too."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(ids, others)]))


def variants(model: ContRec, short: ContRec | None) -> dict[str, Engine]:
    low = torch.bfloat16
    engines = {
        "float32": Engine(model, model.dataset),
        "bfloat16": Engine(model, model.dataset, dtype=low),
        "latent": Engine(model, model.dataset, text=False),
        "constrained": Engine(model, model.dataset, constrained=True),
        "fp8": Engine(model, model.dataset, dtype="fp8"),
        "bfloat16 latent": Engine(model, model.dataset, text=False, dtype=low),
    }
    if short is not None:
        engines["short"] = Engine(short, short.dataset)
        engines["short latent"] = Engine(short, short.dataset, text=False)
    return engines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained model")
    parser.add_argument("--short", type=Path, help="another one, of prompts without titles")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    model = ContRec.from_pretrained(args.run)
    engines = variants(model, ContRec.from_pretrained(args.short) if args.short else None)
    targets = model.dataset.targets
    rows = np.flatnonzero(targets >= 0)
    for engine in engines.values():
        if engine.dataset.user_ids != model.dataset.user_ids:
            parser.error("--short: expected a model of the same users")
    seconds, processor, found = defaultdict(list), defaultdict(list), {}
    for number in range(args.rounds + 1):
        for name, engine in engines.items():
            begin = time.perf_counter(), time.process_time()
            found[name] = engine.recommend(rows, K)
            if number:  # the first allocates memory and learns drafts
                seconds[name].append((time.perf_counter() - begin[0]) / len(rows))
                processor[name].append((time.process_time() - begin[1]) / len(rows))
    base, results = found["float32"], []
    expected = user_metrics(base.ids, targets[rows], (K,))
    for name, engine in engines.items():
        shape = f"{len(rows)} users, {len(engine.catalog)} items, k {K}"
        metrics = user_metrics(found[name].ids, targets[rows], (K,))
        texts = [a == b for a, b in zip(found[name].texts, base.texts)]
        case = record("recommend", shape, name, "engine", seconds[name])
        case["users_per_s"] = 1 / statistics.median(seconds[name])
        case["processor_us"] = 1e6 * statistics.median(processor[name])
        case["prompt_tokens"] = engine.reader.counters["prompts"] / len(rows) / (args.rounds + 1)
        case["layers"] = engine.reader.packed.compiled
        case["ids_of_float32"] = overlap(found[name].ids, base.ids)
        case["texts_of_float32"] = float(np.mean(texts)) if engine.text else None
        for metric in METRICS:
            difference = paired_bootstrap(metrics[metric], expected[metric])
            case[metric] = float(metrics[metric].mean())
            case[f"{metric}_difference"] = difference
        results.append(case)
        changes = ", ".join(
            f"{metric} {case[metric]:.4f} ({low:+.4f} to {high:+.4f})"
            for metric in METRICS
            for _, low, high in [case[f"{metric}_difference"]]
        )
        print(
            f"{name:15} {case['users_per_s']:7.0f} users/s  {case['processor_us']:6.0f} us/user of "
            f"processor  {case['prompt_tokens']:5.1f} tokens  {changes}  "
            f"ids {case['ids_of_float32']:.3f}  {case['layers']}"
        )
    if args.out:
        store(args.out, environment("cpu"), {"rounds": args.rounds, "k": K}, results)


if __name__ == "__main__":
    main()
