"""The C++ extension: present or not, it says so in one line."""

import platform
from pathlib import Path

import pytest

from contrec_fast import native

CPUINFO = Path("/proc/cpuinfo")

needs_extension = pytest.mark.skipif(
    native.build_info() is None, reason=f"the C++ extension is absent: {native.why_missing()}"
)


def test_exactly_one_of_info_and_reason():
    assert (native.build_info() is None) == (native.why_missing() is not None)


def test_without_the_extension(run_python):
    output = run_python(
        "import sys; sys.modules['contrec_fast._C'] = None\n"
        "from contrec_fast import native\n"
        "assert native.build_info() is None\n"
        "print(native.why_missing())"
    ).stdout
    assert len(output.splitlines()) == 1
    assert "contrec_fast._C" in output and "compiler" in output


def test_an_extension_that_does_not_load(run_python, tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('libgomp.so.1:\\n  cannot open')")
    output = run_python(
        f"import contrec_fast; contrec_fast.__path__.insert(0, {str(tmp_path)!r})\n"
        "from contrec_fast import native\n"
        "assert native.build_info() is None\n"
        "print(native.why_missing())"
    ).stdout
    assert output.strip() == "libgomp.so.1: cannot open"


@needs_extension
def test_build_info():
    info = native.build_info()
    assert set(info) == {"compiler", "openmp", "openmp_max_threads", "cpu_features"}
    assert any(digit in info["compiler"] for digit in "0123456789")
    assert info["openmp_max_threads"] >= 1


@needs_extension
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists(),
    reason="compares with /proc/cpuinfo of an x86-64 Linux",
)
def test_cpu_features_agree_with_the_kernel():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    flags = set(flags.split())
    features = native.build_info()["cpu_features"]
    assert set(features) == {"avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni"}
    assert features == {name: name in flags for name in features}


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
def test_openmp_threads_follow_the_environment(run_python, threads):
    code = "from contrec_fast import native; print(native.build_info()['openmp_max_threads'])"
    expected = threads if native.build_info()["openmp"] else 1
    assert int(run_python(code, OMP_NUM_THREADS=str(threads)).stdout) == expected


@needs_extension
def test_the_extension_does_not_need_torch(run_python):
    run_python(
        "import sys; sys.modules['torch'] = None\n"
        "import contrec_fast._C as extension\n"
        "assert extension.build_info()"
    )
