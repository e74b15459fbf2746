"""What kernels compile to, without a GPU: registers, spills, shared memory, instructions.

`compiled` runs host code on CPU tensors with a stub in the driver's place: every kernel that the
code launches is compiled for the wanted architecture, specialised as that launch would be, and not
run. So nothing lists signatures twice, and what is measured are the launches that users get. Not
in a process that interprets kernels.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory a block can have
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "HMMA", "QGMMA", "IMMA", "LDL", "STL", "LDGSTS", "UTMALDG")
COUNTED += ("LDG.E.128", "STG.E.128")  # 16 bytes of a thread


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(function: Callable[[], object], capability: int) -> list:
    """The distinct compiled kernels that `function()` launches, in order of first launch.

    Args:
        function: host code on CPU tensors; it must not depend on what kernels compute.
        capability: 80, 90.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset where kernels are compiled, got 1")
    found = {}
    run, active = JITFunction.run, driver._active

    @functools.wraps(run)
    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, kernel)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(capability))
    try:
        function()
    finally:
        JITFunction.run, driver._active = run, active
    return list(found.values())


def figures(kernel) -> dict:
    """Of one compiled kernel: `kernel`, `warps`, `stages`, `registers` per thread, `stack` and
    `local` bytes per thread, `shared` bytes per block, and counts of some instructions.

    Registers that do not fit are spilled to local memory, read by LDL and written by STL.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    counts = Counter(re.findall(rf"\b({'|'.join(map(re.escape, COUNTED))})\b", code))
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "shared": kernel.metadata.shared,
        "instructions": {name: counts[name] for name in COUNTED if counts[name]},
    }


def faults(row: dict, capability: int) -> list[str]:
    """What is wrong with a kernel of these `figures`: spills, too much shared memory."""
    found = []
    spilled = row["instructions"].get("LDL", 0) + row["instructions"].get("STL", 0)
    if spilled or row["local"]:
        found.append(f"{spilled} spilling instructions, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_LIMIT[capability]:
        found.append(f"{row['shared']} bytes of shared memory, {SHARED_LIMIT[capability]} there")
    return found


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
