"""Inference: from a trained model to top-K lists."""

from contrec_fast.engine.recommender import (
    Recommendations,
    Recommender,
    best_of_draws,
    recommend,
    stable_id,
)
from contrec_fast.engine.stream import recommend_iter, write_lists

__all__ = [
    "Recommendations",
    "Recommender",
    "best_of_draws",
    "recommend",
    "recommend_iter",
    "stable_id",
    "write_lists",
]
