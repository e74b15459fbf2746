"""The optional C++ extension ``contrec_fast._C``: whether it is there, and what it found.

The package works without it; an installation without a C++ compiler leaves it out.
"""

try:
    import contrec_fast._C as _C
except ModuleNotFoundError as error:
    _C = None
    _missing = f"{error}: not built; install contrec-fast where a C++17 compiler is found"
except ImportError as error:  # built, but it cannot be loaded: another Python, a missing library
    _C = None
    _missing = str(error)
else:
    _missing = None


def build_info() -> dict | None:
    """What the extension was built with and what it finds on this machine; None without it.

    Keys: ``compiler`` (str, name and version), ``openmp`` (bool), ``openmp_max_threads`` (int, of
    the extension's own OpenMP runtime; torch has another one), ``cpu_features`` (dict of bool:
    instruction sets that the processor and the operating system support).
    """
    return None if _C is None else _C.build_info()


def why_missing() -> str | None:
    """One line: why the extension could not be imported; None where it was."""
    return None if _missing is None else " ".join(_missing.split())
