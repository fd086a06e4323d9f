# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation says is run: doctests, references to lines, the two commands."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).parent.parent
# Each file whose docstrings have examples: doctest looks at what a module itself defines.
MODULES = ["_dispatch", "_embed", "_threads", "functional.batch", "functional.fold",
           "functional.group", "functional.inplace", "functional.layer", "layers.base",
           "layers.batch", "layers.group", "layers.inplace", "layers.layer", "stats"]  # fmt: skip
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


def test_readme():
    failed, attempted = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert attempted
    assert failed == 0


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


def test_references_to_code_exist():
    # `file: name` in the documents: the file is there and holds the name.
    found = 0
    for document in (ROOT / "docs").glob("*.md"):
        for path, name in re.findall(
            r"`([\w./]+\.(?:pxi|pyx|pxd|py|h)): (\w+)`", document.read_text()
        ):
            text = (ROOT / "src" / "fastbn" / path).read_text()
            assert re.search(rf"\b{name}\b", text), (document.name, path, name)
            found += 1
    assert found >= 15
