"""What every test shares: a fresh seed, one thread, and the skip of tests that need a GPU."""

import functools
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]

# Without a GPU, Triton kernels run in triton's interpreter, which is chosen when they are imported.
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="seed of the random inputs (default: a new one)")


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")


def pytest_report_header(config):
    return f"random inputs: --seed {config.option.seed}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded(request):
    """Seed python, numpy and torch before each test; `--seed` repeats a run's random inputs."""
    seed = request.config.option.seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def run_python():
    """run_python(code, folder=the repository, **environment): run `code` in its own process."""

    def run(code, folder=ROOT, **environment):
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path} | environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request):
    """Where a test of Triton kernels runs: on a GPU, and without one in triton's interpreter."""
    if request.param == "cuda":
        return torch.device("cuda")
    reason = interpreter_obstacle()
    if reason:
        pytest.skip(reason)
    repair_interpreter()
    return torch.device("cpu")


def interpreter_obstacle():
    """Why triton's interpreter cannot be used in this process; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed"
    if not INTERPRETED:
        return "kernels are compiled in this process: the same test runs on the GPU"
    import triton

    release = [
        tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, np)
    ]
    if release[0] < (3, 9) and release[1] >= (2, 4):
        found = f"found triton {triton.__version__} and numpy {np.__version__}"
        return f"the interpreter of triton before 3.9 needs numpy below 2.4, {found}"
    return None


@functools.cache
def repair_interpreter():
    """Right what triton's interpreter gets wrong, so that kernels do what they do compiled.

    bfloat16 is held as raw bits: products multiply these, and casts to it cut instead of rounding.
    An exclusive or over an axis, of which its sort consists, takes a Python call per element.
    Numpy sums a product of float32 in an order that depends on the shape, as a processor's matrix
    unit does not: sums are kept in float64 here, and rounded when added.
    A truth value spread over a block becomes 32-bit integers, which 3.9 refuses as a mask.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    builder, reduction = interpreter.InterpreterBuilder, interpreter.ReduceOps
    dot, cast, reduce = builder.create_dot, builder.cast_impl, reduction.apply_impl
    splat = builder.create_splat

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        if d.dtype.scalar != tl.float32:
            return dot(self, a, b, d, *options)
        a, b = (widened(part).data.astype(np.float64) for part in (a, b))
        return interpreter.TensorHandle((a @ b + d.data).astype(np.float32), tl.float32)

    def cast_impl(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return widened(source)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy().reshape(source.data.shape), tl.bfloat16)

    def apply_impl(self, inputs):
        if self.combine_fn != tl.standard._xor_combine:
            return reduce(self, inputs)
        data = inputs[0].handle.data
        combined = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(combined, inputs[0].dtype)

    def create_splat(self, target, value):
        block = splat(self, target, value)
        if value.data.dtype == bool:
            block.data = block.data.astype(bool)
        return block

    builder.create_dot, builder.cast_impl, reduction.apply_impl = create_dot, cast_impl, apply_impl
    builder.create_splat = create_splat
    for name in ("fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)
