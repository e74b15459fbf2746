"""Which backend serves an operation.

An implementation registers itself under (operation, backend name). All implementations of an
operation take the same tensors, so a caller never knows which one runs; `last_backend` tells.
"""

from collections.abc import Callable

REFERENCE = "reference"
_implementations: dict[str, dict[str, Callable]] = {}
_served: dict[str, str] = {}


def implements(operation: str, backend: str = REFERENCE):
    """Decorator: register a function as `operation`'s implementation under a backend name."""

    def register(function: Callable) -> Callable:
        _implementations.setdefault(operation, {})[backend] = function
        return function

    return register


def resolve(operation: str, backend: str) -> Callable:
    """The implementation that serves a call, noted for `last_backend`.

    Raises:
        ValueError: the operation has no such backend.
    """
    available = _implementations[operation]
    name = REFERENCE if backend == "auto" else backend
    if name not in available:
        names = ", ".join(["auto", *available])
        raise ValueError(f"backend: {operation} has {names}, got {backend!r}")
    _served[operation] = name
    return available[name]


def backends() -> dict[str, list[str]]:
    """Backends of each operation, e.g. `{"sample": ["reference"], ...}`."""
    return {operation: list(names) for operation, names in sorted(_implementations.items())}


def last_backend(operation: str) -> str | None:
    """The backend that served the latest call of `operation` in this process."""
    return _served.get(operation)
