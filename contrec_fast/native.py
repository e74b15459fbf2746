"""The optional C++ extension ``contrec_fast._C``: whether it is there, and its CPU kernels.

The package works without it; an installation without a C++ compiler leaves it out.
"""

from pathlib import Path

# Before the extension: on Linux it then shares the OpenMP threads that torch brings.
import torch
from torch import Tensor

try:
    import contrec_fast._C as _C
except ModuleNotFoundError as error:
    _C = None
    _missing = (
        f"{error}: not built in {Path(__file__).parent}; "
        "install contrec-fast where a C++17 compiler is found"
    )
except ImportError as error:  # built, but it cannot be loaded: another Python, a missing library
    _C = None
    _missing = str(error)
else:
    _missing = None


def build_info() -> dict | None:
    """What the extension was built with and what it finds on this machine; None without it.

    Keys: ``compiler`` (str, name and version), ``openmp`` (bool), ``openmp_max_threads`` (int),
    ``cpu_features`` (dict of bool: instruction sets that the processor and the operating system
    support).
    """
    return None if _C is None else _C.build_info()


def why_missing() -> str | None:
    """One line: why the extension could not be imported; None where it was."""
    return None if _missing is None else " ".join(_missing.split())


def serves(tensor: Tensor) -> bool:
    """Whether the kernels below can take this tensor: extension there, on the CPU, run eagerly."""
    return _C is not None and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def philox_normal(seed: Tensor, user_ids: Tensor, dim: int, step: int, draw: int = 0) -> Tensor:
    """`contrec_fast.ops.noise.philox_normal` in C++, for tensors that `serves` accepts.

    The integers are identical; the normals are float32 roundings of double-precision values that
    differ in their last places, so that about one in a million is off by one unit in the last.

    Args:
        seed: int64 scalar tensor. user_ids: [B] int64. dim: width D. step, draw: below 65,536.

    Returns:
        [B, D] float32; the same bits whatever the batch, the number of threads and the processor.
    """
    user_ids = user_ids.contiguous()
    out = torch.empty(len(user_ids), dim, dtype=torch.float32)
    _C.philox_normal(
        seed=int(seed) % 2**64,
        user_ids=user_ids.data_ptr(),
        batch=len(user_ids),
        dim=dim,
        column=step + 65536 * draw,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out
