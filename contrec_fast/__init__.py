"""contrec-fast: generative recommendation with continuous tokens, made fast."""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "Config": "config",
    "ContRec": "models.contrec",
    "Head": "engine",
    "Recommender": "engine",
    "accelerate": "engine.accelerate",
    "apply_overrides": "config",
    "preset": "presets",
    "read_data": "data",
}


def __getattr__(name: str):
    """What `from contrec_fast import` offers, imported when it is asked for (with torch)."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
