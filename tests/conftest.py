"""What every test shares: a fresh seed, one thread, and the skip of tests that need a GPU."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]

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
