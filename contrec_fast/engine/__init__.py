"""Inference: from a trained model to top-K lists."""

from contrec_fast.engine.recommender import (
    Recommendations,
    Recommender,
    best_of_draws,
    recommend,
    stable_id,
)

__all__ = ["Recommendations", "Recommender", "best_of_draws", "recommend", "stable_id"]
