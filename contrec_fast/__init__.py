"""contrec-fast: generative recommendation with continuous tokens, made fast."""

__version__ = "0.1.0"
