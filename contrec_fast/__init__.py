"""contrec-fast: generative recommendation with continuous tokens, made fast."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`contrec_fast.ContRec` and `contrec_fast.read_data`, imported when they are asked for."""
    if name == "ContRec":
        from contrec_fast.models.contrec import ContRec

        return ContRec
    if name == "read_data":
        from contrec_fast.data import read_data

        return read_data
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
