"""Released state dicts: read from files without running anything, used key by key."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from contrec_fast.ops.checks import FLOATS, check

PICKLES = (".pt", ".pth", ".ckpt")


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


class Weights:
    """A released state dict, of which every key is used or known to be ignored.

    Args:
        where: first words of every error, the file.
    """

    def __init__(self, where: str, tensors: Mapping[str, Tensor]):
        self.where, self.tensors = where, {str(key): value for key, value in tensors.items()}
        self.left = set(self.tensors)
        self.dtype = None  # of all weights, once the first is known

    def any(self, start: str) -> bool:
        """Whether a key starts so."""
        return any(key.startswith(start) for key in self.tensors)

    def shape(self, key: str) -> torch.Size:
        """Of a matrix."""
        self._require(key)
        check(f"{self.where}: {key}", self.tensors[key], ("rows", "columns"), FLOATS)
        return self.tensors[key].shape

    def take(self, key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this key, which has to have this shape, and the dtype of all others."""
        self._require(key)
        tensor = self.tensors[key]
        dtypes = (dtype,) if dtype else (self.dtype,) if self.dtype else FLOATS
        check(f"{self.where}: {key}", tensor, shape, dtypes)
        self.dtype = self.dtype or tensor.dtype
        self.left.discard(key)
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
            values[name] = self.take(prefix + key, shape, counter).reshape(own.shape).clone()
        module.load_state_dict(values, assign=True)

    def finish(self, *ignored: str) -> None:
        """Refuse keys that were neither taken nor start with one of `ignored`."""
        left = sorted(key for key in self.left if not key.startswith(ignored))
        if left:
            raise ValueError(f"{self.where}: expected the released keys only, got {left[0]}")

    def _require(self, key: str) -> None:
        if key not in self.tensors:
            raise ValueError(f"{self.where}: expected the key {key}, got a state dict without it")
