"""Which backend serves an operation.

An implementation registers itself under (operation, backend name). All implementations of an
operation take the same arguments, so a caller never knows which one runs; `last_backend` tells.

"auto" means: on the CPU the C++ extension where it can serve and is not known to be slower, else
the reference. On a GPU a kernel is chosen only where a stored run on such a GPU, of the very source
that is installed, showed it right and faster (`measured.json`); else the reference. Calls that
torch.func or forward-mode differentiation transforms are the reference's.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFERENCE = "reference"
CPP = "cpp"
TABLE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class _Implementation:
    function: Callable
    obstacle: Callable[..., str | None] | None
    bucket: Callable[..., str] | None
    sources: tuple[str, ...]
    slower: Callable[..., bool] | None = None


_implementations: dict[str, dict[str, _Implementation]] = {}
_served: dict[str, str] = {}


def implements(
    operation: str,
    backend: str = REFERENCE,
    obstacle: Callable[..., str | None] | None = None,
    bucket: Callable[..., str] | None = None,
    sources: tuple[str, ...] = (),
    slower: Callable[..., bool] | None = None,
):
    """Decorator: register a function as `operation`'s implementation under a backend name.

    Args:
        obstacle: called with the operation's arguments; None if the backend can serve them, else
            what it would need, in a few words.
        bucket: called with the same; names the class of shapes that one measurement stands for.
        sources: modules whose text decides whether a measurement is of this implementation.
        slower: called with the same; whether the reference is faster, so that "auto" on the CPU
            takes that.
    """

    def register(function: Callable) -> Callable:
        found = _Implementation(function, obstacle, bucket, sources, slower)
        _implementations.setdefault(operation, {})[backend] = found
        return function

    return register


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation watches the calls that are being made."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def resolve(operation: str, backend: str, *arguments) -> Callable:
    """The implementation that serves a call with these arguments, noted for `last_backend`.

    Raises:
        ValueError: the operation has no such backend, or it cannot serve these arguments.
    """
    available = _implementations[operation]
    name = _choose(operation, *arguments) if backend == "auto" else backend
    if name not in available:
        names = ", ".join(["auto", *available])
        raise ValueError(f"backend: {operation} has {names}, got {backend!r}")
    found = available[name]
    if backend not in ("auto", REFERENCE):
        obstacle = found.obstacle(*arguments) if found.obstacle else None
        if transformed():
            obstacle = "a call that torch.func and forward-mode differentiation leave alone"
        if obstacle:
            raise ValueError(f"backend: {name} cannot serve this {operation}: {obstacle}")
    _served[operation] = name
    return found.function


def _choose(operation: str, *arguments) -> str:
    if transformed():
        return REFERENCE
    available = _implementations[operation]
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    if device.type == "cpu":
        found = available.get(CPP)
        slower = found is None or (found.slower is not None and found.slower(*arguments))
        candidates = [] if slower else [CPP]
    else:
        candidates = _measured(operation, device, *arguments)
    for name in candidates:
        if not (available[name].obstacle and available[name].obstacle(*arguments)):
            return name
    return REFERENCE


def _measured(operation: str, device: torch.device, *arguments) -> list[str]:
    """Backends that a stored run showed right and faster for such arguments, best first."""
    rows = [row for row in measurements() if row["operation"] == operation and row["speedup"] > 1]
    if not rows or device.type != "cuda":
        return []
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    found = []
    for row in sorted(rows, key=lambda row: -row["speedup"]):
        kernel = _implementations[operation].get(row["backend"])
        if (
            kernel is not None
            and kernel.bucket is not None
            and row["architecture"] == architecture
            and row["bucket"] == kernel.bucket(*arguments)
            and row["source"] == source_hash(*kernel.sources)
        ):
            found.append(row["backend"])
    return found


@functools.cache
def measurements() -> list[dict]:
    """Rows {operation, backend, architecture ("sm_90"), bucket, source, speedup}, from the GPU."""
    return json.loads(TABLE.read_text())


@functools.cache
def source_hash(*modules: str) -> str:
    """SHA-256 of the source files of some modules."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(importlib.util.find_spec(module).origin).read_bytes())
    return digest.hexdigest()


def backends() -> dict[str, list[str]]:
    """Backends of each operation, e.g. `{"sample": ["reference"], ...}`."""
    return {operation: list(names) for operation, names in sorted(_implementations.items())}


def last_backend(operation: str) -> str | None:
    """The backend that served the latest call of `operation` in this process."""
    return _served.get(operation)
