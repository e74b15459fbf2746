"""Inference: from a trained model to top-K lists."""

from contrec_fast.engine.head import Head, best_of_draws, stable_id
from contrec_fast.engine.recommender import Recommendations, Recommender, recommend
from contrec_fast.engine.stream import recommend_iter, write_lists

__all__ = [
    "Head",
    "Recommendations",
    "Recommender",
    "best_of_draws",
    "recommend",
    "recommend_iter",
    "stable_id",
    "write_lists",
]
