"""The evaluation protocol: leave-one-out, the whole catalog ranked, with or without the history."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contrec_fast.data import Dataset
from contrec_fast.engine import Engine
from contrec_fast.evaluation.baselines import BASELINES, QUICK, fit_baselines
from contrec_fast.evaluation.metrics import (
    catalog_coverage,
    list_diversity,
    target_counts,
    user_metrics,
)
from contrec_fast.evaluation.ranking import recommend
from contrec_fast.evaluation.statistics import paired_bootstrap

CUTOFF = 20
BATCH = 128
METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")
COMPARED = ("hr@10", "ndcg@10")
INTERVAL = ("difference", "low", "high")
CHOICES = {"all": tuple(BASELINES), "quick": QUICK, "none": ()}


def evaluate(engine: Engine, progress, baselines: str | Sequence[str] = "all") -> dict:
    """Metrics of a model beside the baselines, all on the engine's own dataset.

    Users without a target are skipped. Whether lists leave out the history is the setting
    `retrieval.filter_seen` of the engine's model, for it and for the baselines.

    Args:
        progress: shows long work (`progress.ProgressBars`).
        baselines: "all", "quick" (those that only count), "none", or some names of
        `baselines.BASELINES`.

    Returns:
        See `compare`.

    Raises:
        ValueError: an unknown baseline, or no user has a held-out item.
        FloatingPointError: a score is not a number.
    """
    dataset = engine.dataset
    filter_seen = engine.model.config.retrieval.filter_seen
    if isinstance(baselines, str):
        if baselines not in CHOICES:
            expected = ", ".join(CHOICES)
            raise ValueError(f"baselines: expected one of {expected}, got {baselines!r}")
        baselines = CHOICES[baselines]
    rows = np.flatnonzero(dataset.targets >= 0)
    if not len(rows):
        raise ValueError(
            "targets: expected users with a held-out item to judge lists by, got none: train with "
            "data.holdout=test or validation"
        )
    fitted = fit_baselines(dataset, baselines, progress, filter_seen)
    advance = progress.stage("Evaluation", math.ceil(len(rows) / BATCH), "batches")
    k = min(CUTOFF, len(dataset.items))
    found = engine.recommend(rows, k, BATCH, advance)
    if not np.isfinite(found.scores[found.ids >= 0]).all():
        raise FloatingPointError("evaluate: expected finite scores, got some that are not")
    ids = np.pad(found.ids, ((0, 0), (0, CUTOFF - k)), constant_values=-1)
    lists, vectors = {}, None
    for name, baseline in fitted:
        lists[name] = recommend(baseline, dataset, CUTOFF, filter_seen=filter_seen)[rows]
        if name == "lightgcn":
            vectors = baseline.item_vectors
    return compare(ids, lists, dataset, vectors, filter_seen)


def compare(
    model: np.ndarray,
    baselines: dict[str, np.ndarray],
    dataset: Dataset,
    vectors=None,
    filter_seen: bool = True,
) -> dict:
    """What lists are worth, beside those of the baselines, as a tree for JSON.

    Args:
        model: [U, 20] the model's lists for the users of the dataset that have a target.
        baselines: the same of each baseline. vectors: [N, D] for the diversity of lists.

    Returns:
        `{"model": {"hr@10", "ndcg@10", "hr@20", "ndcg@20"}, "baselines": {name: same keys},
        "standard_errors": {"model" or name: same keys},
        "against": {"hr@10" and "ndcg@10": {"baseline": name of the one that is best by it,
        "difference": of the model to it, "low", "high": its 95 % interval over users}},
        "coverage": {"model" or name: of the catalog, by the first 10},
        "diversity": {"model" or name: within the first 10} (only with vectors),
        "targets": {"total", "in_history", "unseen"}, "filter_seen": bool}`.
    """
    targets = dataset.targets[dataset.targets >= 0]
    lists = {"model": model, **baselines}
    values = {name: user_metrics(ids, targets) for name, ids in lists.items()}
    users, items = len(targets), len(dataset.items)
    means, errors = {}, {}
    for name, row in values.items():
        means[name] = {metric: float(of.mean()) for metric, of in row.items()}
        errors[name] = {metric: float(of.std() / math.sqrt(users)) for metric, of in row.items()}
    result = {
        "model": means["model"],
        "baselines": {name: means[name] for name in baselines},
        "standard_errors": errors,
        "against": {},
        "coverage": {name: catalog_coverage(ids, items) for name, ids in lists.items()},
    }
    if vectors is not None:
        result["diversity"] = {name: list_diversity(ids, vectors) for name, ids in lists.items()}
    for metric in COMPARED if baselines else ():
        best = max(baselines, key=lambda name: means[name][metric])
        interval = paired_bootstrap(values["model"][metric], values[best][metric])
        result["against"][metric] = {
            "baseline": best,
            **dict(zip(INTERVAL, interval)),
        }
    return {**result, "targets": target_counts(dataset), "filter_seen": filter_seen}


def read_metrics(path: Path) -> dict | None:
    """The result of `compare` that a JSON file holds, None without a file.

    Raises:
        ValueError: not JSON, or another tree, in one line that names the file.
    """
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}; remove it to go on") from None
    if wrong := _other_part(tree):
        raise ValueError(
            f"{path}: expected metrics as `evaluate` writes them, got other {wrong}; remove it "
            "to go on"
        )
    return tree


def _other_part(tree) -> str | None:
    """What of a tree from JSON cannot be of a result of `compare`, None if all of it can."""
    parts = ("model", "baselines", "standard_errors", "against", "coverage", "targets")
    if not isinstance(tree, dict):
        return "contents"
    tree = {"diversity": {}, **tree}
    for part in (*parts, "diversity"):
        if not isinstance(tree.get(part), dict):
            return part
    own, errors = tree["baselines"], tree["standard_errors"]
    rows = {"model": tree["model"], **own}
    whole = {
        "model": _has_numbers(tree["model"], METRICS),
        "baselines": all(n in BASELINES and _has_numbers(own[n], METRICS) for n in own),
        "standard_errors": all(_has_numbers(errors.get(name), METRICS) for name in rows),
        "against": tree["against"].keys() == (set(COMPARED) if own else set())
        and all(
            _has_numbers(best, INTERVAL) and best.get("baseline") in [*own]
            for best in tree["against"].values()
        ),
        "coverage": _has_numbers(tree["coverage"], rows),
        "diversity": _has_numbers(tree["diversity"], tree["diversity"]),
    }
    return next((part for part, fits in whole.items() if not fits), None)


def _has_numbers(tree, keys) -> bool:
    return isinstance(tree, dict) and all(isinstance(tree.get(key), (int, float)) for key in keys)


def keep_baselines(metrics: dict, before: dict | None) -> dict:
    """`compare`'s result with the baselines that an earlier one has and this one has not.

    They are of the same model and data only if the earlier metrics of the model, the targets and
    the setting are the same; otherwise nothing of the earlier result is kept.
    """
    same = ("model", "targets", "filter_seen")
    if before is None or any(before.get(key) != metrics[key] for key in same):
        return metrics
    merged = dict(metrics)
    for key in ("baselines", "standard_errors", "coverage", "diversity", "against"):
        if key in metrics or key in before:
            merged[key] = {**before.get(key, {}), **metrics.get(key, {})}
    known = merged["baselines"]
    merged["baselines"] = {name: known[name] for name in BASELINES if name in known}
    for metric in merged["against"]:
        # An interval is that to the best one, which is the best of either result, too.
        best = max(merged["baselines"], key=lambda name: known[name][metric])
        source = metrics if best in metrics["baselines"] else before
        merged["against"][metric] = source["against"][metric]
    return merged
