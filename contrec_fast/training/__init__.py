"""Training: collaborative vectors, tokenizer, then the model."""

from contrec_fast.training.loop import train

__all__ = ["train"]
