"""New items: how often an item that training never saw is recommended to those who chose it.

    python -m bench.cold_items DATA --out RESULT.json [--share 0.05] [KEY=VALUE ...]

A share of the items is taken out of all histories; the model is trained without them and then told
of them by `add_items`, by text or by the first half of their interactions. Every occurrence of
such an item (for the second way: those of the second half) is a case: its user's history up to
there, and the item as the target. Reported beside it: the rank of the target among the new items
only, and both for random vectors in the place of the new items' own.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bench.reporting import environment
from contrec_fast.config import apply_overrides
from contrec_fast.data import Dataset, Items, read_data
from contrec_fast.engine import Engine
from contrec_fast.environment import default_device
from contrec_fast.evaluation.metrics import rank_metrics
from contrec_fast.presets import preset
from contrec_fast.progress import ProgressBars
from contrec_fast.training import train


def split(dataset: Dataset, cold: np.ndarray) -> tuple[Dataset, list[tuple[np.ndarray, int]]]:
    """The dataset without the cold items [C], and the cases (history without them, cold item).

    Items keep their order; the cold ones are numbered on behind them.
    """
    warm = np.setdiff1d(np.arange(len(dataset.items)), cold)
    place = np.empty(len(dataset.items), dtype=np.int64)
    place[warm], place[cold] = np.arange(len(warm)), len(warm) + np.arange(len(cold))
    users, histories, cases = [], [], []
    for user, history, target in zip(dataset.user_ids, dataset.histories, dataset.targets):
        sequence = place[np.append(history, target) if target >= 0 else history]
        known = sequence < len(warm)
        for end in np.flatnonzero(~known):
            before = sequence[:end][known[:end]]
            if len(before):
                cases.append((before, sequence[end]))
        if known[:-1].any():
            users.append(user)
            histories.append(sequence[:-1][known[:-1]])
    items = dataset.items
    catalog = Items(*([column[i] for i in warm] for column in
                      (items.ids, items.titles, items.categories)))  # fmt: skip
    targets = np.full(len(users), -1, dtype=np.int64)
    return Dataset(catalog, users, histories, targets), cases


def judge(model, known: Dataset, cases: list[tuple[np.ndarray, int]]) -> dict[str, float]:
    """HR@10 and NDCG@10 in the whole catalog, HR@10 among the new items only, and the share of
    new items in the lists of the users of training (with more than their part of the catalog
    they push themselves forward)."""
    warm = len(known.items)
    crowd = Dataset(model.dataset.items, known.user_ids, known.histories, known.targets)
    everybody = Engine(model, crowd).recommend(np.arange(len(crowd.user_ids)), 10).ids
    names = [f"case {number}" for number in range(len(cases))]
    targets = np.array([target for _, target in cases])
    dataset = Dataset(model.dataset.items, names, [history for history, _ in cases], targets)
    recommender = Engine(model, dataset)
    rows = np.arange(len(cases))
    result = rank_metrics(recommender.recommend(rows, 10).ids, targets, (10,))
    recommender.catalog.eligible[:warm] = False
    k = min(10, len(recommender.catalog) - warm)
    ids = recommender.recommend(rows, k).ids
    result["share of lists"] = float((everybody >= warm).mean())
    result["hr@10 among new"] = float((ids == targets[:, None]).any(1).mean())
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--preset", default="default")
    options = parser.parse_intermixed_args(arguments)
    config = apply_overrides(preset(options.preset), options.settings)
    dataset = read_data(options.data, config.data, config.seed)
    rng = np.random.default_rng(config.seed)
    count = max(1, round(options.share * len(dataset.items)))
    cold = np.sort(rng.choice(len(dataset.items), count, replace=False))
    known, cases = split(dataset, cold)
    warm = len(known.items)
    with ProgressBars() as progress, tempfile.TemporaryDirectory() as folder:
        trained = train(known, config, progress)
        trained.save_pretrained(folder)

        items = dataset.items
        frame = pd.DataFrame({
            "item_id": [items.ids[i] for i in cold],
            "title": [items.titles[i] for i in cold],
            "category": [items.categories[i] for i in cold],
        })  # fmt: skip

        def extended(tellers: list[tuple[np.ndarray, int]] = ()):
            """The trained model with the new items, by text or by cases that tell of them."""
            model, pairs = type(trained).from_pretrained(folder), None
            if tellers:
                names = [f"teller {number}" for number in range(len(tellers))]
                nobody = np.full(len(names), -1, dtype=np.int64)
                model.dataset = Dataset(known.items, names, [case[0] for case in tellers], nobody)
                chosen = [items.ids[cold[target - warm]] for _, target in tellers]
                pairs = pd.DataFrame({"user_id": names, "item_id": chosen})
            model.add_items(frame, pairs)
            return model

        results = {"by text": judge(extended(), known, cases)}
        model = extended()
        torch.manual_seed(config.seed)
        with torch.no_grad():
            own = model.item_vectors[warm:]
            own.copy_(torch.randn_like(own))
        results["random vectors"] = judge(model, known, cases)
        # First halves tell, second halves are asked.
        count_of = np.bincount([target for _, target in cases])
        met, told, asked = np.zeros_like(count_of), [], []
        for case in cases:
            met[case[1]] += 1
            (told if 2 * met[case[1]] <= count_of[case[1]] else asked).append(case)
        asked = [case for case in asked if count_of[case[1]] > 1]
        if asked:
            results["by interactions"] = judge(extended(told), known, asked)
            results["by text, the same cases"] = judge(extended(), known, asked)
    found = {
        "data": options.data.name,
        "settings": [f"preset={options.preset}", *options.settings],
        "new items": count,
        "cases": len(cases),
        "cases asked after interactions": len(asked),
        "results": results,
        "environment": environment(default_device().type),
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, values in results.items():
        print(name, {key: round(value, 4) for key, value in values.items()})


if __name__ == "__main__":
    main()
