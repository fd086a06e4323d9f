# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation says is run: doctests, references to lines, the two commands."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).parent.parent
# Each file whose docstrings have examples: doctest looks at what a module itself defines.
MODULES = ["_dispatch", "_embed", "_threads", "accumulator", "dialects", "functional.batch",
           "functional.fold", "functional.group", "functional.images", "functional.inplace",
           "functional.layer", "layers.base", "layers.batch", "layers.group", "layers.inplace",
           "layers.layer", "layers.network", "layers.population", "layers.renorm", "layers.sync",
           "stats", "sync.functional"]  # fmt: skip
PUBLIC = [getattr(fastbn, name) for name in fastbn.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"fastbn.{name}")
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner()
    tests = [test for test in finder.find(module) if test.examples]
    assert tests
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def test_no_example_is_left_out():
    found = {thing.__module__.removeprefix("fastbn.") for thing in PUBLIC}
    found |= {base.__module__.removeprefix("fastbn.") for thing in PUBLIC if inspect.isclass(thing)
              for base in thing.__mro__ if base.__module__.startswith("fastbn.")}  # fmt: skip
    assert found <= set(MODULES)


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
         if page.exists() and ">>> " in page.read_text()]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages(page):
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert attempted
    assert failed == 0


def test_the_readme_has_an_example():
    assert ROOT / "README.md" in PAGES


def test_the_figures_of_the_readme_are_those_of_the_pages():
    figures = re.findall(
        r"^\|.*\| [\d.]+(?: / [\d.]+)? \|.*$", (ROOT / "README.md").read_text(), re.M
    )
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("performance", "family")]
    assert len(figures) == 9
    for row in figures:
        assert any(row in page for page in pages), row


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_public_docstrings_are_complete(thing):
    documented = [thing]
    if inspect.isclass(thing):
        documented += [
            member
            for name, member in inspect.getmembers(thing, inspect.isroutine)
            if not name.startswith("_")
        ]
    for item in documented:
        text = inspect.getdoc(item)
        assert "Examples\n--------\n>>> import" in text, item
        if inspect.isfunction(item) or inspect.ismethod(item):
            for name in inspect.signature(item).parameters:
                assert name == "self" or re.search(rf"\b{name}\b", text), (item, name)


# ---- names that the documents say are in a file ------------------------------------------

DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()),
]
FILE = r"[\w./]+\.(?:pxi|pyx|pxd|py|h|c)"
# `file: name`; `name` in `file`, of `file`; `name` (file).
ATTRIBUTIONS = [
    rf"`(?P<file>{FILE}): (?P<name>\w+)`",
    rf"`(?P<name>\w+)`\s+(?:in|of)\s+`(?P<file>{FILE})`",
    rf"`(?P<name>\w+)`\s+\(`?(?P<file>{FILE})`?\)",
]


def attributed(text):
    """(file, name) of all that a document says is in a file."""
    found = [match for pattern in ATTRIBUTIONS for match in re.finditer(pattern, text)]
    return [(match["file"], match["name"]) for match in found]


def path_of(file):
    """The one file of the sources, or at the root, that a document means."""
    places = [*(ROOT / "src").rglob(Path(file).name), ROOT / file]
    found = {path for path in places if path.is_file() and f"/{path}".endswith(f"/{file}")}
    assert len(found) == 1, (file, found)
    return found.pop()


def enumerated(bodies):
    """The members of enums."""
    members = re.compile(r"(\w+)\s*(?:=[^,\n]*)?(?:,|\n|$)")
    return [name for body in bodies for name in members.findall(body)]


def defined_by_python(name, text):
    tree = ast.parse(text)
    constants = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return name in constants | {node.name for node in ast.walk(tree) if isinstance(node, named)}


def defined_by_cython(name, text):
    text = re.sub(r"#[^\n]*", "", text)
    enums = re.findall(r"^cdef enum\b[^\n]*:\s*\n((?:[ \t]+[^\n]*\n|\n)*)", text, re.M)
    patterns = (
        rf"^\s*(?:cdef|cpdef|def)\s[^=(\n]*\b{name}\s*\(",  # a function
        rf"^\s*(?:cdef|ctypedef)?\s*(?:class|struct|union|enum)\s+{name}\b[^\n]*:",
        rf"^ctypedef\s[^\n]*\b\(?\*?{name}\)?\s*(?:\(|$)",
        rf"^cdef\s[^=(\n]*\b{name}\s*(?:\[[^]]*\]\s*)*(?:=|$)",  # a variable
        rf"^{name}\s*(?::[^=\n]*)?=",
    )
    return name in enumerated(enums) or any(re.search(p, text, re.M) for p in patterns)


def defined_by_c(name, text):
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    enums = re.findall(r"enum\s*\w*\s*\{([^}]*)\}", text)
    patterns = (
        rf"^#define\s+{name}\b",
        rf"^[A-Za-z_][\w \t*()]*?\b{name}\s*\([^;{{}}]*\)\s*\{{",  # a function, with its body
        rf"^(?:typedef\s+)?(?:struct|union|enum)\s+{name}\s*\{{",
        rf"\}}\s*{name}\s*;|^typedef\s[^;{{}}]*\b{name}\s*;",
        rf"^(?:static\s+)?(?:const\s+)?\w+\s+\**{name}\s*(?:\[[^]]*\]\s*)*=",  # a variable
    )
    return name in enumerated(enums) or any(re.search(p, text, re.M) for p in patterns)


def is_defined(name, text, kind):
    """Is a name defined by this text? To be mentioned is not enough."""
    by = {".py": defined_by_python, ".h": defined_by_c, ".c": defined_by_c}
    return by.get(kind, defined_by_cython)(name, text)


CYTHON = """
# mentioned here
cdef enum:
    FIRST, SECOND       # not THIRD
    FOURTH = 4

cdef struct Held:
    double member

cdef double TABLE[3]
cdef inline Held function(const Held* a,
                          int argument) noexcept nogil:
    cdef double local = called(argument)
    return other(a)

ctypedef void (*Task)(int n) noexcept nogil
LIMIT: int = 3
cdef class Kept:
    def method(self):
        pass
"""
C = """
/* mentioned here */
#define MACRO 3
enum kind { ONE = 1, TWO };
typedef struct held { int member; } held_type;
static inline int function(int argument) { return called(argument); }
int declared(int argument);
static const double TABLE[] = {1, 2};
"""
PYTHON = "# mentioned\nLIMIT = 3\nkept: int = 4\ndef function(argument):\n    local = called()\n"


@pytest.mark.parametrize(
    ("kind", "text", "defined", "mentioned"),
    [
        (".pxi", CYTHON, "FIRST SECOND FOURTH Held TABLE function Task LIMIT Kept method",
         "mentioned here THIRD member argument local called other a"),
        (".h", C, "MACRO ONE TWO held held_type function TABLE",
         "mentioned member argument called declared"),
        (".py", PYTHON, "LIMIT kept function", "mentioned argument local called"),
    ],
)  # fmt: skip
def test_what_is_a_definition(kind, text, defined, mentioned):
    for name in defined.split():
        assert is_defined(name, text, kind), name
    for name in mentioned.split():
        assert not is_defined(name, text, kind), name


def test_what_a_document_attributes():
    text = "`a/b.pxi: one`, `two` in `b.pyx`, `three` of `c.h`, `four` (d.py), `five`\n(`d.py`)"
    assert sorted(attributed(text)) == [
        ("a/b.pxi", "one"), ("b.pyx", "two"), ("c.h", "three"), ("d.py", "five"), ("d.py", "four"),
    ]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_said_to_be_in_a_file_is_defined_there(document):
    for file, name in attributed(document.read_text()):
        path = path_of(file)
        assert is_defined(name, path.read_text(), path.suffix), (file, name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_of_the_kernels_exist(document):
    for file in re.findall(r"`([\w./]+\.(?:pxi|pyx|pxd))`", document.read_text()):
        path_of(file)


def test_derivation_names_what_computes_each_equation():
    assert len(attributed((ROOT / "docs" / "derivation.md").read_text())) >= 30
