"""Are the engine's top-K lists the reference's? Over all users of a trained model's data.

    python bench/equal_lists.py RUN [RUN ...] --out RESULT.json

The reference is ContRec's own `write` (transformers' `generate` on padded prompts) or `read`, the
sampler and the search with backend "reference", in float32, with the same seed. An id is settled
where its score is more than 1e-5 from those of its neighbours in the reference's list; settled ids
must be equal, else the exit status is 1. Words that are as good as tied may come out differently in
another rounding: such texts are counted.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from reporting import environment, positive, store

from contrec_fast import ContRec, accelerate, ops
from contrec_fast.data import Dataset
from contrec_fast.data.prompts import CategoryMatcher, Prompts
from contrec_fast.engine import Recommendations, stable_id
from contrec_fast.progress import ProgressBars

GAP = 1e-5
BATCH = 64


@torch.inference_mode()
def reference_lists(model: ContRec, dataset: Dataset, rows, k: int):
    """ids [B, k] and scores [B, k] of some users, and their texts."""
    config, retrieval = model.config, model.config.retrieval
    prompts = Prompts(dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt)
    histories = [dataset.histories[row] for row in rows]
    batch, texts = prompts.inference_batch(histories), [""] * len(rows)
    if config.prompt.text == "none":
        condition = model.read(batch)
    else:
        condition, texts = model.write(batch)
    keys = torch.tensor([stable_id(dataset.user_ids[row]) for row in rows])
    y, head = condition, config.head
    if head.diffusion:
        plan = ops.plan_sampling(
            model.head.denoiser, head.schedule, head.timesteps, head.method, head.steps,
            head.guidance, head.prediction,
        )  # fmt: skip
        y = plan(condition, 0, keys, retrieval.draws, backend="reference")
    draws = model.to_item_space(y.reshape(-1, len(rows), y.shape[-1]))
    matcher = CategoryMatcher(dataset.items.categories)
    catalog = ops.Catalog(model.item_vectors.detach(), matcher.groups)
    matched, seen = matcher.match(texts), {}
    if retrieval.filter_seen:
        seen = {"seen": ops.SeenLists.from_lists(histories), "seen_rows": torch.arange(len(rows))}
    best = torch.full((len(draws), len(rows), len(catalog) + 1), -torch.inf)
    for row, vectors in zip(best, draws):  # all items, so that the best of all draws is known
        scores, ids = ops.cosine_topk(
            vectors, catalog, len(catalog), matched, retrieval.bonus, **seen, backend="reference"
        )
        row.scatter_(1, torch.where(ids < 0, len(catalog), ids), scores)
    scores, ids = best[..., :-1].amax(0).sort(dim=1, descending=True, stable=True)
    ids = ids.masked_fill(scores == -torch.inf, -1)
    return ids[:, :k].numpy(), scores[:, :k].numpy(), texts


def compare(found: Recommendations, ids, scores, texts) -> Counter:
    """How many ids there are, are settled, and differ; the reference's lists are one longer."""
    k, counts = found.ids.shape[1], Counter()
    gaps = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=-np.inf))
    apart = ~(gaps <= GAP)  # behind the last item, too, where -inf less -inf is no number
    k = min(k, ids.shape[1])
    settled = apart[:, :k] & apart[:, 1 : k + 1]
    different = found.ids[:, :k] != ids[:, :k]
    other = np.array([a != b for a, b in zip(found.texts, texts)])
    counts["ids"], counts["settled"] = different.size, int(settled.sum())
    counts["different"] = int(different.sum())
    counts["settled and different"] = int((settled & different & ~other[:, None]).sum())
    counts["users"], counts["other texts"] = len(texts), int(other.sum())
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of trained models")
    parser.add_argument("--k", type=positive, default=10)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = []
    with ProgressBars() as progress:
        for run in args.runs:
            model = ContRec.from_pretrained(run)
            dataset = model.dataset.complete()
            engine = accelerate(model).recommender.engine.over(dataset)
            k, counts = min(args.k, len(dataset.items)), Counter()
            rows = np.arange(len(dataset.user_ids))
            parts = np.split(rows, range(BATCH, len(rows), BATCH))
            advance = progress.stage(f"{run.name}: users", len(parts), "batches")
            for part in parts:
                found = engine.recommend(part, k)
                counts.update(compare(found, *reference_lists(model, dataset, part, k + 1)))
                advance()
            results.append({"run": run.name, "items": len(dataset.items), "k": k, **counts})
            print(results[-1])
    if args.out:
        store(args.out, environment("cpu"), {"k": args.k, "gap": GAP}, results)
    if any(result["settled and different"] for result in results):
        raise SystemExit("settled ids differ")


if __name__ == "__main__":
    main()
