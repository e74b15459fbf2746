"""Released state dicts: read from files without running anything, used key by key."""

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from contrec_fast.ops.checks import FLOATS, check

PICKLES = (".pt", ".pth", ".ckpt")
LISTED = 24  # keys of a kind in an error


def read_source(source: str | Path | Mapping) -> tuple[str, Mapping]:
    """Name and content of what was given; a file's tensors are on the CPU."""
    if isinstance(source, Mapping):
        return "source", source
    if not isinstance(source, (str, Path)):
        kind = type(source).__name__
        raise TypeError(f"source: expected a path or a state dict, got {kind}")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got nothing")
    if path.suffix == ".safetensors":
        try:
            return str(path), load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file, got: {error}") from None
    if path.suffix not in PICKLES:
        kinds = ", ".join(PICKLES)
        raise ValueError(f"{path}: expected {kinds} or .safetensors, got {path.suffix!r}")
    try:
        # Mapped, so that the language model in a checkpoint is not read; not the old format.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        got = code[1] if code else f"a damaged file ({type(error).__name__})"
        raise ValueError(
            f"{path}: expected tensors and plain values (torch.load, weights_only), got {got}"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    return str(path), content


class Problems:
    """What is wrong with the keys of a state dict, gathered so that one error names all of it.

    Args:
        where: first words of the error, the file. expected: what the keys should have been.
    """

    def __init__(self, where: str, expected: str):
        self.where, self.expected = where, expected
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.wrong: list[str] = []  # a key and what is wrong with it

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)

    def check(self, key: str, tensor: Tensor, shape: tuple, dtypes: tuple) -> bool:
        """Whether a key's tensor has this shape and one of these dtypes."""
        try:
            check(key, tensor, shape, dtypes)
        except (TypeError, ValueError) as error:
            self.wrong.append(str(error))
            return False
        return True

    def finish(self) -> None:
        """Raise ValueError, in one line, if anything is wrong."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong": self.wrong}
        found = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in kinds.items() if keys)
        if found:
            raise ValueError(f"{self.where}: expected {self.expected}; {found}")


def listed(keys: Iterable[str]) -> str:
    """Each key once, the first ones by name."""
    keys = sorted(set(keys))
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more


class Weights:
    """A released state dict, of which every key is used or known to be ignored.

    What does not fit is gathered and raised by `problems.finish()`; until then a module that has
    been filled may lack weights.

    Args:
        where: first words of every error, the file.
    """

    def __init__(self, where: str, tensors: Mapping[str, Tensor]):
        self.where, self.tensors = where, {str(key): value for key, value in tensors.items()}
        self.problems = Problems(where, "the released keys")
        self.left = set(self.tensors)
        self.dtypes: dict[str, torch.dtype] = {}  # of the weights that were taken

    def any(self, start: str) -> bool:
        """Whether a key starts so."""
        return any(key.startswith(start) for key in self.tensors)

    def size(self, *places: tuple[str, int], otherwise: int = 8) -> int:
        """What most of these tensors have as their size in this dimension.

        Args:
            places: keys and dimensions. otherwise: the result where none of the keys is there, so
            that something can be made whose keys are missing.
        """
        found = Counter()
        for key, dimension in places:
            tensor = self.tensors.get(key)
            if isinstance(tensor, Tensor) and tensor.dim() > dimension and 0 not in tensor.shape:
                found[tensor.shape[dimension]] += 1
        return found.most_common(1)[0][0] if found else otherwise

    def take(
        self, key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """The tensor of this key, or None if it is missing or of another shape.

        Args:
            dtype: the only one allowed; otherwise any float, but the same for all weights.
        """
        self.left.discard(key)
        if key not in self.tensors:
            self.problems.missing.append(key)
            return None
        tensor = self.tensors[key]
        if not self.problems.check(key, tensor, shape, (dtype,) if dtype else FLOATS):
            return None
        if not dtype:
            self.dtypes[key] = tensor.dtype
        return tensor

    def fill(
        self,
        module: nn.Module,
        prefix: str,
        names: Mapping[str, str] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put copies of the weights into a module without storage.

        Args:
            names: the released name of each layer, where it is another one. fixed: values of
            what the release does not have.
        """
        values = dict(fixed or {})
        for name, own in module.state_dict().items():
            if name in values:
                continue
            key, shape = name, tuple(own.shape)
            for ours, theirs in (names or {}).items():
                if f"{name}.".startswith(f"{ours}."):
                    key = theirs + name.removeprefix(ours)
            if name == "null_condition":
                shape = (1, *shape)
            elif name.endswith(("w_1.weight", "w_2.weight")):
                shape = (*shape, 1)  # convolutions of width 1 there
            counter = None if own.dtype.is_floating_point else own.dtype
            tensor = self.take(prefix + key, shape, counter)
            if tensor is not None:
                values[name] = tensor.reshape(own.shape).clone()
        module.load_state_dict(values, strict=False, assign=True)

    def close(self, *ignored: str) -> None:
        """Note keys that were neither taken nor start with one of `ignored`, and odd dtypes."""
        self.problems.unexpected += [key for key in self.left if not key.startswith(ignored)]
        counts = Counter(self.dtypes.values())
        usual = counts.most_common(1)[0][0] if counts else None
        for key, dtype in self.dtypes.items():
            if dtype != usual:
                wanted, got = (str(d).removeprefix("torch.") for d in (usual, dtype))
                self.problems.wrong.append(f"{key}: expected dtype {wanted}, got {got}")
