"""Inference: from a trained model to top-K lists."""

from contrec_fast.engine.recommender import Recommendations, Recommender, stable_id

__all__ = ["Recommendations", "Recommender", "stable_id"]
