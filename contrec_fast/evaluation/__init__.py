"""How good lists are: metrics over held-out items, and the cheap baselines to beat."""

from contrec_fast.evaluation.baselines import (
    ItemKNN,
    Markov,
    Popularity,
    evaluate_baselines,
    recommend,
)
from contrec_fast.evaluation.metrics import rank_metrics, target_counts

__all__ = [
    "ItemKNN",
    "Markov",
    "Popularity",
    "evaluate_baselines",
    "rank_metrics",
    "recommend",
    "target_counts",
]
