"""First part of gpu_suite.sh: what the machine is, as one JSON line. A missing tool fails it."""

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata

TOOLS = ["nvidia-smi", "nvcc", "git", "c++", "ncu", "nsys", "compute-sanitizer", "cuobjdump"]
NEEDED = ["nvidia-smi", "nvcc"]  # the profilers have parts of their own
PACKAGES = ["torch", "triton", "numpy", "pybind11", "pytest", "hypothesis", "transformers"]
GPU_FIELDS = [
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "mig.mode.current",
]


def output(*command: str) -> str:
    """Standard output; the reason in words where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    said = done.stdout.strip()
    return said if done.returncode == 0 else f"failed: {done.stderr.strip() or said}"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    query = output(
        "nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"
    )
    first = query.splitlines()[0].split(", ") if query else []
    found = {
        "gpu": dict(zip(GPU_FIELDS, first)) if len(first) == len(GPU_FIELDS) else query,
        "nvcc": output("nvcc", "--version").splitlines()[-1:],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "tools": {tool: shutil.which(tool) is not None for tool in TOOLS},
    }
    try:
        import torch
    except ImportError as error:
        found["torch_cuda"] = f"failed: {error}"
    else:
        found["torch_cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found["multiprocessors"] = properties.multi_processor_count
            found["l2_bytes"] = properties.L2_cache_size
            found["compute_capability"] = f"{properties.major}.{properties.minor}"
    print(json.dumps(found))
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        print(f"missing on PATH: {', '.join(missing)}", file=sys.stderr)
    return len(missing)


if __name__ == "__main__":
    sys.exit(main())
