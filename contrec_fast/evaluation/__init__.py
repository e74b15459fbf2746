"""How good lists are: metrics over held-out items, and the baselines to beat."""

from contrec_fast.evaluation.baselines import (
    BASELINES,
    EASE,
    QUICK,
    CatalogTooLarge,
    ItemKNN,
    LightGCNBaseline,
    Markov,
    Popularity,
    SASRec,
    evaluate_baselines,
    fit_baselines,
)
from contrec_fast.evaluation.charts import bar_chart
from contrec_fast.evaluation.metrics import (
    catalog_coverage,
    list_diversity,
    rank_metrics,
    target_counts,
    user_metrics,
)
from contrec_fast.evaluation.ranking import recommend
from contrec_fast.evaluation.statistics import paired_bootstrap

__all__ = [
    "BASELINES",
    "EASE",
    "QUICK",
    "CatalogTooLarge",
    "ItemKNN",
    "LightGCNBaseline",
    "Markov",
    "Popularity",
    "SASRec",
    "bar_chart",
    "catalog_coverage",
    "evaluate_baselines",
    "fit_baselines",
    "list_diversity",
    "paired_bootstrap",
    "rank_metrics",
    "recommend",
    "target_counts",
    "user_metrics",
]
