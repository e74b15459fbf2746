"""The evaluation protocol: leave-one-out, the whole catalog ranked, with or without the history."""

import math
from collections.abc import Sequence

import numpy as np

from contrec_fast import names
from contrec_fast.data import Dataset
from contrec_fast.engine import Recommender
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
CHOICES = dict(zip(names.BASELINES, (tuple(BASELINES), QUICK, ()), strict=True))


def evaluate(recommender: Recommender, progress, baselines: str | Sequence[str] = "all") -> dict:
    """Metrics of a model beside the baselines, all on the recommender's own dataset.

    Users without a target are skipped. Whether lists leave out the history is the setting
    `retrieval.filter_seen` of the recommender's model, for it and for the baselines.

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
    dataset = recommender.dataset
    filter_seen = recommender.model.config.retrieval.filter_seen
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
    found = recommender.recommend(rows, k, BATCH, advance)
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
    for metric in ("hr@10", "ndcg@10") if baselines else ():
        best = max(baselines, key=lambda name: means[name][metric])
        interval = paired_bootstrap(values["model"][metric], values[best][metric])
        result["against"][metric] = {
            "baseline": best,
            **dict(zip(("difference", "low", "high"), interval)),
        }
    return {**result, "targets": target_counts(dataset), "filter_seen": filter_seen}


def keep_baselines(metrics: dict, before) -> dict:
    """`compare`'s result with the baselines that an earlier one has and this one has not.

    They are of the same model and data only if the earlier metrics of the model, the targets and
    the setting are the same; otherwise nothing of the earlier result is kept.
    """
    same = ("model", "targets", "filter_seen")
    whole = isinstance(before, dict) and "against" in before
    if not whole or any(before.get(key) != metrics[key] for key in same):
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
