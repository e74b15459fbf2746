"""The evaluation protocol: leave-one-out, the whole catalog ranked, history excluded."""

import math

import numpy as np

from contrec_fast.engine import Recommender
from contrec_fast.evaluation.baselines import evaluate_baselines
from contrec_fast.evaluation.metrics import rank_metrics, target_counts

CUTOFF = 20
BATCH = 128


def evaluate(recommender: Recommender, progress) -> dict:
    """Metrics of a model beside the baselines, all on the recommender's own dataset.

    Args:
        progress: shows long work (`progress.ProgressBars`).

    Returns:
        `{"model": {"hr@10", "ndcg@10", "hr@20", "ndcg@20"}, "baselines": {name: same keys},
        "targets": {"total", "in_history", "unseen"}}`.

    Raises:
        FloatingPointError: a score is not a number.
    """
    dataset = recommender.dataset
    rows = np.flatnonzero(dataset.targets >= 0)
    advance = progress.stage("Evaluation", math.ceil(len(rows) / BATCH))
    k = min(CUTOFF, len(dataset.items))
    lists = recommender.recommend(rows, k, BATCH, advance)
    if not np.isfinite(lists.scores[lists.ids >= 0]).all():
        raise FloatingPointError("evaluate: expected finite scores, got some that are not")
    ids = np.pad(lists.ids, ((0, 0), (0, CUTOFF - k)), constant_values=-1)
    return {
        "model": rank_metrics(ids, dataset.targets[rows]),
        "baselines": evaluate_baselines(dataset),
        "targets": target_counts(dataset),
    }
