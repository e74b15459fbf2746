"""Builds the C++ CPU extension contrec_fast._C; everything else is in pyproject.toml.

Without a working compiler the package installs as pure Python, and says so.
"""

import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

BUILD_ERRORS = (CCompilerError, ExecError, PlatformError, OSError)


class BuildExtension(build_ext):
    """build_ext that adds our flags, and turns a failed build into a pure-Python install."""

    def run(self):
        try:
            super().run()
        except BUILD_ERRORS as error:
            reason = " ".join(str(error).split())
            print(
                f"contrec-fast: no C++ extension, installing pure Python only ({reason}); "
                "with a C++17 compiler such as g++ installed, install again to get it",
                file=sys.stderr,
            )
            self.extensions = []  # nothing to copy or to list among the installed files

    def build_extensions(self):
        if self.compiler.compiler_type == "unix":
            # -ffp-contract=off: the same bits on machines with and without fused multiply-add.
            # The next two change no result, and let sqrt and selections be vectorised.
            # No -march: instruction sets are chosen per function, at run time.
            flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
            if self.supports_openmp():
                flags.append("-fopenmp")
            for extension in self.extensions:
                extension.extra_compile_args += flags
                extension.extra_link_args += [flag for flag in flags if flag == "-fopenmp"]
        super().build_extensions()

    def supports_openmp(self):
        """Whether a program with OpenMP compiles and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }")
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=["-fopenmp"]
                )
                self.compiler.link_executable(
                    objects, "openmp", output_dir=folder, extra_postargs=["-fopenmp"]
                )
            except BUILD_ERRORS:
                return False
        return True


setup(
    ext_modules=[
        # Pybind11Extension adds hidden visibility and strips debugging symbols.
        Pybind11Extension(
            "contrec_fast._C",
            sources=[
                "csrc/bindings.cpp",
                "csrc/bindings_cross_entropy.cpp",
                "csrc/bindings_layers.cpp",
                "csrc/cpu/cross_entropy.cpp",
                "csrc/cpu/cross_entropy_avx2.cpp",
                "csrc/cpu/cross_entropy_avx512.cpp",
                "csrc/cpu/cross_entropy_portable.cpp",
                "csrc/cpu/denoise.cpp",
                "csrc/cpu/features.cpp",
                "csrc/cpu/gather.cpp",
                "csrc/cpu/gather_backward.cpp",
                "csrc/cpu/gather_product.cpp",
                "csrc/cpu/layers.cpp",
                "csrc/cpu/layers_avx2.cpp",
                "csrc/cpu/layers_avx512.cpp",
                "csrc/cpu/layers_portable.cpp",
                "csrc/cpu/philox.cpp",
                "csrc/cpu/philox_avx2.cpp",
                "csrc/cpu/philox_avx512.cpp",
                "csrc/cpu/sampler.cpp",
                "csrc/cpu/sampler_avx2.cpp",
                "csrc/cpu/sampler_avx512.cpp",
                "csrc/cpu/sampler_avx512_bf16.cpp",
                "csrc/cpu/sampler_portable.cpp",
                "csrc/cpu/topk.cpp",
                "csrc/cpu/topk_candidates.cpp",
                "csrc/cpu/topk_exact.cpp",
                "csrc/cpu/topk_scan.cpp",
            ],
            include_dirs=["csrc"],
            depends=[
                "csrc/cpu/clones.h",
                "csrc/cpu/cross_entropy.h",
                "csrc/cpu/cross_entropy_kernel.h",
                "csrc/cpu/denoise.h",
                "csrc/cpu/elementwise.h",
                "csrc/cpu/features.h",
                "csrc/cpu/gather.h",
                "csrc/cpu/gather_avx512.h",
                "csrc/cpu/gather_kernel.h",
                "csrc/cpu/gather_product.h",
                "csrc/cpu/layers.h",
                "csrc/cpu/layers_kernel.h",
                "csrc/cpu/layers_transpose.h",
                "csrc/cpu/philox.h",
                "csrc/cpu/philox_normals.h",
                "csrc/cpu/sampler.h",
                "csrc/cpu/sampler_bf16.h",
                "csrc/cpu/sampler_chain.h",
                "csrc/cpu/sampler_product.h",
                "csrc/cpu/topk.h",
                "csrc/cpu/topk_candidates.h",
                "csrc/cpu/topk_exact.h",
                "csrc/cpu/topk_kernel.h",
                "csrc/cpu/topk_scan.h",
                "csrc/cpu/vec_avx2.h",
                "csrc/cpu/vec_avx512.h",
                "csrc/cpu/vec_float.h",
                "csrc/cpu/vec_portable.h",
                "csrc/cpu/vec_tile.h",
            ],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
