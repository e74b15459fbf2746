"""Inference: from a trained model to top-K lists."""

from contrec_fast.engine.head import Head, best_of_draws, stable_id
from contrec_fast.engine.index import CandidateIndex
from contrec_fast.engine.lists import Engine, Recommendations
from contrec_fast.engine.recommender import Recommender

__all__ = [
    "CandidateIndex",
    "Engine",
    "Head",
    "Recommendations",
    "Recommender",
    "best_of_draws",
    "stable_id",
]
