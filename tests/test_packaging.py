"""What is shipped, what is not, and what must import where."""

import importlib.util
import shutil
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import contrec_kernels
import pytest
import torch

import contrec_fast

ROOT = Path(__file__).parents[1]
SHIPPED = (".py", ".json")
PACKAGES = {"contrec_fast": "contrec_fast", "contrec_kernels": "kernels/contrec_kernels"}


def test_kernels_is_a_folder_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root(run_python):
    process = run_python(
        "from transformers import AutoModelForCausalLM, Qwen3Config\n"
        "config = Qwen3Config(vocab_size=11, hidden_size=8, intermediate_size=8, head_dim=4,\n"
        "    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "print(type(model).__name__)"
    )
    assert process.stdout.strip() == "Qwen3ForCausalLM"


def test_every_module_imports_without_triton(run_python):
    process = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil\n"
        "import contrec_fast, contrec_kernels\n"
        "for module in pkgutil.walk_packages(contrec_fast.__path__, 'contrec_fast.'):\n"
        "    if not module.name.endswith(('__main__', '_C')):\n"
        "        importlib.import_module(module.name)\n"
        "print(contrec_kernels.available())"
    )
    assert process.stdout.startswith("(False, ")
    assert "triton cannot be imported: " in process.stdout


def test_kernels_available():
    available, reason = contrec_kernels.available()
    has_triton = importlib.util.find_spec("triton") is not None
    assert available == (has_triton and torch.cuda.is_available())
    assert reason and "\n" not in reason


@pytest.mark.gpu
def test_kernels_available_names_the_gpu():
    pytest.importorskip("triton")
    major, minor = torch.cuda.get_device_capability()
    assert contrec_kernels.available() == (True, f"cuda:{10 * major + minor}")


# ---- what a build holds ----


def missing_build_requirement():
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        return "setuptools is not installed"
    return None if int(found.split(".")[0]) >= 77 else f"setuptools {found} is older than 77"


needs_build_requirements = pytest.mark.skipif(
    missing_build_requirement() is not None,
    reason=f"cannot build: {missing_build_requirement()}",
)


class Build(NamedTuple):
    modules: set[str]  # the modules and tables of the tree, as they are named in a wheel
    wheel: set[str]  # the names in the wheel
    sdist: set[str]  # the names in the source distribution, below its top folder
    output: str  # what the build printed


def build(run_python, folder, **environment):
    """Build a wheel and a source distribution of a copy of the tree."""
    tree = folder / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("contrec_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree)
    for name in ("tests", "bench"):  # as packages they would be found, were they looked for
        (tree / name).mkdir(exist_ok=True)
        (tree / name / "__init__.py").touch()
    process = run_python(
        "from setuptools import build_meta\n"
        "build_meta.build_sdist('../dist')\n"
        "build_meta.build_wheel('../dist')",
        tree,
        **environment,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    modules = {
        f"{package}/{file.relative_to(tree / path).as_posix()}"
        for package, path in PACKAGES.items()
        for file in (tree / path).rglob("*")
        if file.suffix in SHIPPED
    }
    return Build(modules, in_wheel, in_sdist, process.stdout + process.stderr)


@pytest.fixture(scope="module")
def built(run_python, tmp_path_factory):
    return build(run_python, tmp_path_factory.mktemp("built"))


@needs_build_requirements
def test_the_wheel_holds_the_two_packages_and_nothing_else(built):
    metadata = f"contrec_fast-{contrec_fast.__version__}.dist-info"
    assert {name.split("/")[0] for name in built.wheel} == {*PACKAGES, metadata}
    assert {name for name in built.wheel if name.endswith(SHIPPED)} == built.modules
    assert f"{metadata}/licenses/LICENSE" in built.wheel


@needs_build_requirements
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the path")
def test_the_wheel_holds_the_extension(built):
    extensions = [name for name in built.wheel if name.endswith((".so", ".pyd"))]
    assert len(extensions) == 1 and extensions[0].startswith("contrec_fast/_C."), built.output


@needs_build_requirements
def test_the_sdist_holds_what_a_build_needs(built):
    csrc = {
        file.relative_to(ROOT).as_posix() for file in (ROOT / "csrc").rglob("*") if file.is_file()
    }
    assert csrc and csrc <= built.sdist
    assert {"pyproject.toml", "setup.py", "LICENSE"} <= built.sdist


@needs_build_requirements
def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(run_python, tmp_path):
    missing = str(tmp_path / "no-such-compiler")
    built = build(run_python, tmp_path, CC=missing, CXX=missing)
    assert {name for name in built.wheel if ".dist-info/" not in name} == built.modules
    messages = [line for line in built.output.splitlines() if line.startswith("contrec-fast: ")]
    assert len(messages) == 1
    assert "no C++ extension" in messages[0] and "no-such-compiler" in messages[0]


def test_the_top_level_names_are_those_of_their_modules_and_come_when_asked_for(run_python):
    run_python(
        "import sys, contrec_fast\n"
        "assert 'torch' not in sys.modules and not hasattr(contrec_fast, 'nothing')\n"
        "from contrec_fast import Config, ContRec, apply_overrides, preset, read_data\n"
        "from contrec_fast import config, data, presets\n"
        "from contrec_fast.models import contrec\n"
        "assert (Config, apply_overrides) == (config.Config, config.apply_overrides)\n"
        "assert (preset, read_data) == (presets.preset, data.read_data)\n"
        "assert ContRec is contrec.ContRec\n"
    )
