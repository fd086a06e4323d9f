# SPDX-License-Identifier: BSD-3-Clause
"""What needs a compiler: the examples of embedding, built, linked and compared bit by bit.

With one CPU level and little optimisation, which takes the compiler a third of the time
and has the same bits.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import capi
import numpy as np
import pytest

import fastbn
from fastbn import _dispatch, _selftest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "embed"
HEADER = Path(fastbn.get_include(), "fastbn.h")
PYTHON_HEADERS = sysconfig.get_paths()["include"]


def have(*tools):
    missing = [tool for tool in tools if not shutil.which(tool)]
    if importlib.util.find_spec("Cython") is None:
        missing.append("Cython")
    if not Path(PYTHON_HEADERS, "Python.h").exists():
        missing.append("Python.h")
    if sys.platform != "linux":
        missing.append("linker of ELF")
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


def command(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, timeout=300,
                          **options)  # fmt: skip
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout


def array(seed, *shape):
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)


# ---- without Python --------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return where the programs of examples/embed and the library are."""
    build = tmp_path_factory.mktemp("embed")
    level = _dispatch.runnable()[-1]
    command("cmake", "-S", EXAMPLES, "-B", build, f"-DFASTBN_LEVELS={level}",
            "-DFASTBN_OPTIMIZATION=-O1", f"-DPython_EXECUTABLE={sys.executable}")  # fmt: skip
    command("cmake", "--build", build, "-j", os.cpu_count())
    return build


class TestWithoutPython:
    pytestmark = have("cmake", "cc", "c++")

    def test_pthreads(self, programs):
        x = array(0, 6, 40, 30, 31)
        y = command(programs / "pthreads", *x.shape, input=x.tobytes())
        assert y == fastbn.batch_norm_forward(x)[0].tobytes()

    def test_pool(self, programs):
        x = array(1, 6, 30, 31, 40)
        y, mean, invstd = fastbn.batch_norm_forward(x, layout="NHWC")
        expected = fastbn.batch_norm_backward(y, x, mean, invstd, layout="NHWC")[0]
        dx = command(programs / "pool", *x.shape, input=x.tobytes())
        assert dx == expected.tobytes()

    def test_plain(self, programs):
        x = np.array([[1, 2, 3, 4], [0, 0, 8, 8], [-1e4, 1, 2, 3]], np.float32)
        rows = [" ".join(f"{v:9.6f}" for v in row) for row in fastbn.layer_norm(x, 4)]
        lines = command(programs / "plain").decode().splitlines()
        assert lines == [*rows, "no error"]

    def test_nothing_of_python_is_linked(self, programs):
        library = programs / "fastbn" / "libfastbn.so"
        names = command("nm", "-D", library).decode()
        assert not re.search(r"\b_?Py", names)
        assert re.findall(r" T (\w+)", names) == ["fastbn_get_api"]
        # Nor is anything allocated.
        assert not re.search(r"\b(malloc|calloc|realloc|free)\b", names)
        assert "python" not in command("ldd", programs / "pthreads").decode()

    def test_the_shared_library_from_here(self, programs, monkeypatch):
        # Every operation and element type, by the tests of the other table.
        library = ctypes.CDLL(str(programs / "fastbn" / "libfastbn.so"))
        library.fastbn_get_api.restype = ctypes.POINTER(capi.Api)
        table = library.fastbn_get_api().contents
        assert table.version.decode() == fastbn.__version__
        monkeypatch.setattr(capi, "API", table)
        from test_capi import CASES, same_bits

        for dtype in _selftest.dtypes():
            for case in CASES:
                same_bits(case, dtype, "float64" if dtype == "float64" else "float32")
                same_bits(case, dtype, "float16", activation="relu", adds=True)


def test_flags_are_those_of_the_package():
    # Those that decide about bits; setup.py has them once more.
    text = (ROOT / "CMakeLists.txt").read_text()
    for flag in _dispatch.show_config()["flags"].split():
        assert flag in text or flag == "-fopenmp", flag


# ---- extension modules -----------------------------------------------------------------


def built(source, folder, include=None):
    """Compile an extension module and return it, imported."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("the examples are for Python with its lock, and would bring it back")
    folder.mkdir(exist_ok=True)
    target = folder / (source.stem + sysconfig.get_config_var("EXT_SUFFIX"))
    command("cc", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unused", "-I", PYTHON_HEADERS,
            "-I", include or HEADER.parent, source, "-o", target)  # fmt: skip
    loader = importlib.machinery.ExtensionFileLoader(source.stem, str(target))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(source.stem, loader))
    loader.exec_module(module)
    return module


def standardizes(module):
    x = array(2, 300, 7)
    y = fastbn.batch_norm_forward(x)[0]
    module.standardize(x)
    assert x.tobytes() == y.tobytes()


@have("cc")
def test_c_extension(tmp_path):
    module = built(EXAMPLES / "c_extension.c", tmp_path)
    standardizes(module)
    with pytest.raises(ValueError, match="more than one value for each mean"):
        module.standardize(np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="dtype"):
        module.standardize(np.ones((2, 3)))


@have("cc")
def test_cython_module(tmp_path):
    c = tmp_path / "cython_module.c"
    command(sys.executable, "-m", "cython", "-I", Path(fastbn.__file__).parent.parent,
            EXAMPLES / "cython_module.pyx", "-o", c)  # fmt: skip
    module = built(c, tmp_path)
    x, weight = array(3, 50, 33), array(4, 33)
    out = np.empty_like(x)
    module.rms_norm(x, weight, out)
    assert out.tobytes() == fastbn.rms_norm(x, 33, weight, eps=1e-5).tobytes()
    with pytest.raises(ValueError, match="eps"):
        module.rms_norm(x, weight, out, -1.0)


def without_last_member(text, struct):
    """Return a header in which a struct ends one member earlier."""
    start, end = re.search(rf"typedef struct {struct} {{.*?}} {struct};", text, re.S).span()
    body = text[start:end]
    members = [m.start() for m in re.finditer(r"^    (?=\w)[^;]*;", body, re.M)]
    return text[:start] + body[: members[-1]] + f"}} {struct};" + text[end:]


@have("cc")
def test_extension_of_the_first_header(tmp_path):
    # Before there was an activation.
    text = HEADER.read_text()
    end = text.index("    /* What follows the normalisation")
    text = text[:end] + text[text.index("} fastbn_call;") :]
    assert "activation;" not in text
    text += '\n_Static_assert(sizeof(void *) != 8 || sizeof(fastbn_call) == 192, "");\n'
    (tmp_path / "fastbn.h").write_text(text)
    standardizes(built(EXAMPLES / "c_extension.c", tmp_path, tmp_path))


@have("cc")
def test_extension_of_an_older_header(tmp_path):
    text = HEADER.read_text()
    for struct in (*["fastbn_call"] * 18, "fastbn_api"):
        text = without_last_member(text, struct)
    assert "activation;" not in text
    assert "double *m2;" not in text
    assert "double *invstd;" not in text
    assert "(*finish)" not in text
    (tmp_path / "fastbn.h").write_text(text)
    standardizes(built(EXAMPLES / "c_extension.c", tmp_path, tmp_path))


@have("cc")
@pytest.mark.parametrize("changes", [
    ("#define FASTBN_ABI 1", "#define FASTBN_ABI 2"),
    ("(*finish)(void *workspace);", "(*finish)(void *workspace); int (*more)(void);"),
])  # fmt: skip
def test_extension_of_a_newer_header(tmp_path, changes):
    text = HEADER.read_text()
    assert changes[0] in text
    (tmp_path / "fastbn.h").write_text(text.replace(*changes))
    with pytest.raises(ImportError, match="built for another fastbn than"):
        built(EXAMPLES / "c_extension.c", tmp_path, tmp_path)


@have("cc", "c++")
def test_the_header_is_what_ctypes_has(tmp_path):
    # Its offsets and numbers, and that it is C99 and C++11 without a warning.
    numbers = re.findall(r"FASTBN_(\w+) = (\d+)", HEADER.read_text())
    numbers = {name: int(value) for name, value in numbers}
    known = {name.upper(): value for name, value in capi.DTYPES.items()}
    known |= {(name or "identity").upper(): value for name, value in capi.ACTIVATIONS.items()}
    known |= {f"{name.upper()}_NORM": value for name, value in capi.NORMS.items()}
    codes = numbers.keys() - known.keys()  # of operations and errors
    assert len(codes) >= 15
    assert numbers == known | {name: getattr(capi, name) for name in codes}
    checks = [
        f"static_assert(offsetof({c_name}, {member}) == {getattr(struct, member).offset}, \"\");"
        for c_name, struct in [("fastbn_tensor", capi.Tensor), ("fastbn_call", capi.Call),
                               ("fastbn_api", capi.Api)]
        for member, _ in struct._fields_
    ] + [f"static_assert(sizeof(fastbn_call) == {ctypes.sizeof(capi.Call)}, \"\");"]  # fmt: skip
    source = tmp_path / "offsets.c"
    source.write_text("#include <fastbn.h>\n#include <assert.h>\n" + "\n".join(checks))
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I", HEADER.parent]
    command("cc", "-std=c11", *strict, source)
    command("c++", "-std=c++11", "-x", "c++", *strict, source)
