# SPDX-License-Identifier: BSD-3-Clause
"""Builds the extension modules; everything static is in pyproject.toml.

The kernels are one source, compiled once for each CPU level and element type
under a name of its own, so that one process can hold them all.

FASTBN_OPENMP=0 in the environment asks for a serial build.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = ROOT / "src" / "fastbn" / "kernels"
ENGINE = ROOT / "src" / "fastbn" / "engine"
INCLUDE = ROOT / "src" / "fastbn" / "include"
SHIMS = ROOT / "build" / "shims"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

IS_WINDOWS = sys.platform == "win32"
IS_MACOS = sys.platform == "darwin"
if IS_MACOS:
    # One kind of CPU at a time, also where Python has code for two.
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
# What is built for, which is not always what is built on.
TARGET = os.environ.get("ARCHFLAGS") if IS_MACOS else sysconfig.get_platform()
IS_X86_64 = TARGET.endswith(("x86_64", "amd64"))
# clang-cl hands to Clang what follows "/clang:".
DRIVER = "/clang:" if IS_WINDOWS else ""
LEVELS = (
    {f"v{n}": [f"{DRIVER}-march=x86-64-v{n}"] for n in (4, 3, 2)} if IS_X86_64 else {"baseline": []}
)
DTYPES = ("float32", "float64", "float16", "bfloat16")

# CONTRIBUTING.md has the reason for each. The "no" flags undo what CFLAGS may bring.
FLAGS = [
    DRIVER + flag
    for flag in ("-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-g0")
]
# Clang makes fewer copies, and does not know these.
IS_GCC = sys.platform == "linux" and "clang" not in (
    os.environ.get("CC") or sysconfig.get_config_var("CC") or ""
)
FEW_COPIES = ["-fno-ipa-cp-clone", "-fno-unswitch-loops"] if IS_GCC else []
OPENMP, OPENMP_LIBRARY = {
    # Apple's Clang has no library; Homebrew's is where no compiler looks.
    "darwin": (
        ["-Xpreprocessor", "-fopenmp", "-I/opt/homebrew/opt/libomp/include"],
        ["-L/opt/homebrew/opt/libomp/lib", "-lomp"],
    ),
    "win32": (["/openmp"], ["libomp.lib"]),
}.get(sys.platform, (["-fopenmp"], ["-fopenmp"]))
WANT_OPENMP = os.environ.get("FASTBN_OPENMP", "1") != "0"

DIRECTIVES = (
    "language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False"
)
MACROS = [
    ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
    ("FASTBN_VERSION", f'"{VERSION}"'),
    ("FASTBN_LEVELS", f'"{",".join(LEVELS)}"'),
    ("FASTBN_FLAGS", f'"{" ".join(FLAGS + OPENMP * WANT_OPENMP)}"'),
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(name: str, *, openmp: bool = False) -> Extension:
    """Return an ordinary module, built for the lowest level."""
    return Extension(
        f"fastbn.{name}",
        [f"src/fastbn/{name.replace('.', '/')}.pyx"],
        include_dirs=[
            np.get_include(),
            relative(KERNELS.parent),
            relative(ENGINE),
            relative(INCLUDE),
        ],
        define_macros=MACROS,
        extra_compile_args=FLAGS + (OPENMP if openmp and WANT_OPENMP else []),
        extra_link_args=OPENMP_LIBRARY if openmp and WANT_OPENMP else [],
    )


def kernels(level: str, dtype: str) -> Extension:
    """Return the kernels of one level and element type: a shim that includes the source."""
    name = f"_{level}_{dtype}"
    shim = SHIMS / f"{name}.pyx"
    source = "images.pxi" if dtype == "images" else "kernels.pxi"
    text = f'# cython: {DIRECTIVES}\n"""Kernels: {level}, {dtype}."""\ninclude "{source}"\n'
    if not shim.exists() or shim.read_text() != text:
        shim.parent.mkdir(parents=True, exist_ok=True)
        shim.write_text(text)
    return Extension(
        f"fastbn.kernels.{name}",
        [relative(shim)],
        depends=sorted(map(relative, [*KERNELS.glob("*.pxi"), *KERNELS.glob("*.h")])),
        include_dirs=[relative(KERNELS), relative(INCLUDE)],
        define_macros=[
            (f"FASTBN_ELEM_{dtype.upper()}", "1"),
            ("CYTHON_INLINE", "__attribute__((always_inline)) inline"),
        ],
        extra_compile_args=FLAGS + FEW_COPIES + LEVELS[level],
    )


class Build(build_ext):
    """Builds in parallel, and says what to install where OpenMP is missing."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def build_extensions(self) -> None:
        if IS_WINDOWS:
            self.use_clang_cl()
        elif WANT_OPENMP:
            self.require_openmp()
        super().build_extensions()

    def use_clang_cl(self) -> None:
        """Compile with clang-cl, since MSVC has no vector types; MSVC's linker stays."""
        clang = shutil.which("clang-cl")
        if clang is None:
            sys.exit("fastbn needs clang-cl: install LLVM, and put its bin folder on PATH.")
        if not self.compiler.initialized:
            self.compiler.initialize(self.plat_name)
        self.compiler.cc = clang
        asked = subprocess.run(
            [clang, "/clang:-print-resource-dir"], capture_output=True, text=True, check=True
        )
        # __builtin_cpu_supports, and OpenMP.
        self.compiler.add_library("clang_rt.builtins-x86_64")
        self.compiler.add_library_dir(str(Path(asked.stdout.strip(), "lib", "windows")))
        self.compiler.add_library_dir(str(Path(clang).parents[1] / "lib"))

    def require_openmp(self) -> None:
        program = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.c")
            source.write_text(program)
            command = [*self.compiler.compiler_so, *OPENMP, str(source), *OPENMP_LIBRARY]
            try:
                done = subprocess.run(
                    [*command, "-o", str(Path(folder, "openmp"))], capture_output=True, text=True
                )
                complaint = done.stderr if done.returncode else ""
            except OSError as error:
                complaint = str(error)
        if complaint:
            sys.exit(
                "fastbn needs a C compiler with OpenMP.\n"
                "  Debian, Ubuntu: apt install gcc libc6-dev (Clang: also libomp-dev)\n"
                "  Fedora:         dnf install gcc (Clang: also libomp-devel)\n"
                "  macOS:          brew install libomp\n"
                "For a build without threads set FASTBN_OPENMP=0 in the environment.\n"
                f"The compiler said:\n{complaint}"
            )


setup(
    ext_modules=cythonize(
        [
            module("_build"),
            module("_threads", openmp=True),
            module("_numpy.binding"),
            module("torch._direct"),
            module("torch._dispatcher"),
            module("engine.core", openmp=True),
            *(kernels(level, dtype) for level in LEVELS for dtype in (*DTYPES, "images")),
        ],
        include_path=["src", relative(KERNELS), relative(ENGINE)],
        # Nothing here relies on the GIL: tests/test_threads.py.
        compiler_directives={"freethreading_compatible": True},
        build_dir="build/cython",
    ),
    cmdclass={"build_ext": Build},
)
