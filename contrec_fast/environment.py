"""What is installed here and what can run: the content of `contrec info`."""

import os
import platform
from importlib import metadata

import contrec_kernels
import torch

import contrec_fast
from contrec_fast import native, ops

OPTIONAL = ("triton", "faiss-cpu", "faiss-gpu-cu12")


def default_device() -> torch.device:
    """The first GPU where there is a usable one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: str | torch.device) -> torch.device:
    """A CPU or GPU that is there.

    Raises:
        ValueError: anything else, in one line.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type not in ("cpu", "cuda") or found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"device: expected cpu or one of {count} GPUs, got {device!r}")
    return found


def describe_environment() -> dict[str, str]:
    """Versions, devices, and backends with the reason where one is absent, as lines of text."""
    lines = {
        "contrec-fast": contrec_fast.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }
    for name in ("transformers", "numpy", *OPTIONAL):
        lines[name] = _version(name)
    lines["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    lines["GPU"] = _gpus()
    build = native.build_info()
    if build is None:
        lines["C++ extension"] = f"no: {native.why_missing()}"
    else:
        features = [name for name, found in build["cpu_features"].items() if found]
        openmp = f"OpenMP with {build['openmp_max_threads']} threads"
        lines["C++ extension"] = f"yes: {build['compiler']}, " + ", ".join(
            [openmp if build["openmp"] else "no OpenMP", *features]
        )
    works, detail = contrec_kernels.available()
    lines["Triton kernels"] = f"can run: {detail}" if works else f"cannot run: {detail}"
    for operation, names in ops.backends().items():
        lines[f"ops.{operation}"] = ", ".join(names)
    return lines


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if torch.version.cuda is None:
        return "none: this build of torch is for the CPU only"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} but finds no usable device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
