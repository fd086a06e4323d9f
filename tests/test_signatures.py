# SPDX-License-Identifier: BSD-3-Clause
"""Signatures, stubs and docstrings of the family agree with each other."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn
from fastbn import _docs

ROOT = Path(__file__).parent.parent / "src" / "fastbn"
NORMS = ("batch", "group", "instance", "layer", "rms")
FUNCTIONS = {
    name: getattr(fastbn, name)
    for name in fastbn.__all__
    if inspect.isfunction(getattr(fastbn, name))
}
FAMILY = {name: f for name, f in FUNCTIONS.items() if re.match(f"({'|'.join(NORMS)})_norm", name)}
LAYERS = {
    f.__name__: f
    for f in (fastbn.BatchNorm, fastbn.BatchRenorm, fastbn.GroupNorm, fastbn.InPlaceBatchNorm,
              fastbn.InstanceNorm, fastbn.LayerNorm, fastbn.RMSNorm)
}  # fmt: skip
each_function = pytest.mark.parametrize("name", FAMILY)
each_layer = pytest.mark.parametrize("name", LAYERS)


def parameters(function):
    return inspect.signature(function).parameters


def by_keyword(function):
    return [n for n, p in parameters(function).items() if p.kind is p.KEYWORD_ONLY]


def is_in_order(names, order):
    return names == [name for name in order if name in names]


# ---- functions ---------------------------------------------------------------------------

# What an operation has of its own: there names, defaults or annotations differ.
OWN = {
    "bias": {"rms_norm_backward"},
    "eps": {"rms_norm", "rms_norm_forward"},
    "use_input_stats": {"instance_norm", "instance_norm_forward"},
    "training": {"batch_norm_forward", "batch_norm_backward"},
    "running_mean": {"batch_norm_forward", "instance_norm", "instance_norm_forward"},
    "running_var": {"batch_norm_forward", "instance_norm", "instance_norm_forward"},
}


def test_the_family_is_complete():
    names = {f"{norm}_norm{end}" for norm in NORMS for end in ("", "_forward", "_backward")}
    assert set(FAMILY) == names | {"batch_norm_backward_inplace"}


@each_function
def test_keyword_arguments_have_the_order_of_batch_norm(name):
    order = ["bias", *by_keyword(fastbn.batch_norm_forward)]
    order.insert(order.index("training"), "use_input_stats")
    assert is_in_order(by_keyword(FAMILY[name]), order)
    # What follows a normalisation is in each of them, and last.
    inplace = name == "batch_norm_backward_inplace"
    fused = ["activation", "negative_slope", *([] if inplace else ["residual"]), "out"]
    assert by_keyword(FAMILY[name])[-len(fused) :] == fused


@each_function
def test_defaults_and_types_are_those_of_batch_norm(name):
    expected = parameters(fastbn.batch_norm) | {
        n: parameters(fastbn.batch_norm_backward)[n] for n in ("dy", "mean", "invstd")
    }
    for argument, parameter in parameters(FAMILY[name]).items():
        if argument in expected and name not in OWN.get(argument, ()):
            assert parameter.default == expected[argument].default, argument
            assert parameter.annotation == expected[argument].annotation, argument


@pytest.mark.parametrize("norm", NORMS)
def test_forward_takes_what_the_norm_takes(norm):
    short, long = (parameters(FAMILY[f"{norm}_norm{end}"]) for end in ("", "_forward"))
    assert set(short) == set(long)
    for name in short:
        if not (norm == "batch" and name in ("training", "running_mean", "running_var")):
            assert short[name].default == long[name].default, name
            assert short[name].annotation == long[name].annotation, name


def test_both_ways_of_folding_take_the_same():
    behind, before = (
        list(parameters(f).values())
        for f in (fastbn.fold_batch_norm, fastbn.fold_batch_norm_into_next)
    )
    assert before[: len(behind)] == behind


# ---- layers ------------------------------------------------------------------------------


@each_layer
def test_arguments_of_layers_are_those_of_batch_norm(name):
    given = parameters(LAYERS[name])
    assert is_in_order(by_keyword(LAYERS[name]), ["r_max", "d_max", *by_keyword(fastbn.BatchNorm)])
    assert by_keyword(LAYERS[name])[-3:] == ["activation", "negative_slope", "dtype"]
    own = {
        "InPlaceBatchNorm": {"activation"},
        "InstanceNorm": {"affine", "track_running_stats", "momentum"},
        "RMSNorm": {"eps"},
    }
    for argument, parameter in parameters(fastbn.BatchNorm).items():
        if argument in given and argument not in own.get(name, ()):
            assert given[argument] == parameter


@each_layer
def test_layers_have_the_defaults_of_their_functions(name):
    norm = name.removeprefix("InPlace").removesuffix("Norm").removesuffix("Renorm").lower()
    given, expected = parameters(LAYERS[name]), parameters(FAMILY[f"{norm}_norm"])
    for argument in given.keys() & expected.keys() - {"bias"}:
        if (name, argument) != ("InPlaceBatchNorm", "activation"):
            assert given[argument].default == expected[argument].default


def default(name):
    numbers = {"num_channels": 6, "num_groups": 2, "num_features": 3, "normalized_shape": 4}
    layer = LAYERS[name]
    return layer(*[numbers[n] for n, p in parameters(layer).items() if p.default is p.empty])


@each_layer
def test_repr_leaves_defaults_out(name):
    layer = default(name)
    for argument, value in layer._defaults:
        assert parameters(LAYERS[name])[argument].default == value
        assert f"{argument}=" not in repr(layer)
    shown = {"eps", "momentum", "activation"} if name == "InPlaceBatchNorm" else {"eps", "momentum"}
    assert set(re.findall(r"(\w+)=", repr(layer))) <= shown


@each_layer
def test_layers_may_be_made_without_eps(name):
    layer = default(name)
    required = [p for p in parameters(LAYERS[name]).values() if p.default is p.empty]
    numbers = [getattr(layer, p.name) for p in required]
    for zero in (0, 0.0):
        assert LAYERS[name](*numbers, eps=zero).eps == 0.0
    with pytest.raises(ValueError, match=r"^eps: expected a number >= 0, got -1.0"):
        LAYERS[name](*numbers, eps=-1.0)


@each_layer
def test_calls_of_layers(name):
    call = LAYERS[name].__call__
    expected = ["self", "x"] if name == "InPlaceBatchNorm" else ["self", "x", "out", "residual"]
    if not name.startswith(("InPlace", "Layer", "RMS")):
        expected += ["mask", "lengths", "length_axis"]
    if name in ("BatchNorm", "BatchRenorm"):
        expected += ["update_running"]
    assert list(parameters(call)) == expected
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"{section}\n{'-' * len(section)}\n" in inspect.getdoc(call)


# ---- docstrings -----------------------------------------------------------------------------


def documented():
    """Everything public: functions, classes, their methods and `__call__`."""
    for name in fastbn.__all__:
        thing = getattr(fastbn, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            yield name, thing
            for member, method in inspect.getmembers(thing, inspect.isroutine):
                if not member.startswith("_") or (member == "__call__" and name in LAYERS):
                    yield f"{name}.{member}", method


DOCUMENTED = dict(documented())


def section(text, title):
    """The entries of a section of a docstring: the names, the line."""
    found = re.search(rf"(?ms)^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)", text)
    lines = found[1].split("\n") if found else []
    entries = [line for line in lines if line and not line.startswith(" ")]
    return [name for line in entries for name in line.partition(" : ")[0].split(", ")]


# `threads` is a compiled class, without a signature.
@pytest.mark.parametrize("name", sorted(DOCUMENTED.keys() - {"threads"}))
def test_docstrings_have_the_arguments_in_order(name):
    names = [n for n in parameters(DOCUMENTED[name]) if n != "self"]
    assert section(inspect.getdoc(DOCUMENTED[name]), "Parameters") == names


@pytest.mark.parametrize("name", DOCUMENTED)
def test_paragraphs_are_filled_in(name):
    text = inspect.getdoc(DOCUMENTED[name])
    assert not re.search(r"(?m)^ *\{", text)
    assert max(map(len, text.split("\n"))) < 100


def test_all_paragraphs_are_shared():
    source = "".join(path.read_text() for path in ROOT.glob("*/*.py"))
    for name in _docs.PARAGRAPHS:
        assert len(re.findall(rf"(?m)^ +\{{{name}(: .+)?\}}$", source)) > 1, name


def test_a_paragraph_has_the_indentation_of_its_line():
    def function():
        """Do.

        {out}
        {weights: of *}
          {y}
            More of it.
        """

    lines = _docs.filled(function).__doc__.split("\n")
    indent = lines[-1]  # none from Python 3.13 on
    assert lines[2] == indent + _docs.PARAGRAPHS["out"].split("\n")[0]
    assert lines[3] == indent + _docs.PARAGRAPHS["out"].split("\n")[1]
    assert lines[4] == indent + "weight, bias : ndarray of shape of *, or None"
    assert lines[5] == indent + "  y : ndarray"
    assert lines[7] == indent + "    More of it."


def test_without_docstrings():
    code = "import fastbn; print(fastbn.batch_norm.__doc__, fastbn.BatchNorm.__call__.__doc__)"
    run = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["None", "None"], run.stderr


# ---- stubs ------------------------------------------------------------------------------------

STUBS = ["_build", "_threads", "_numpy/binding", "engine/core"]


def stub(name):
    return ast.parse((ROOT / f"{name}.pyi").read_text()).body


@pytest.mark.parametrize("name", STUBS)
def test_a_stub_has_the_functions_of_its_module(name):
    module = importlib.import_module(f"fastbn.{name.replace('/', '.')}")
    functions = {node.name for node in stub(name) if isinstance(node, ast.FunctionDef)}
    assert functions == {
        key
        for key, value in vars(module).items()
        if type(value).__name__ == "cython_function_or_method" and not key.startswith("_")
    }
    for node in stub(name):
        if isinstance(node, ast.ClassDef):
            assert inspect.isclass(getattr(module, node.name))
        if isinstance(node, ast.AnnAssign):
            assert hasattr(module, node.target.id)


@pytest.mark.parametrize("name", STUBS)
def test_a_stub_has_the_arguments_in_the_order_of_the_module(name):
    module = importlib.import_module(f"fastbn.{name.replace('/', '.')}")
    for node in stub(name):
        if isinstance(node, ast.FunctionDef):
            declared = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            if node.args.vararg:
                declared.append(node.args.vararg.arg)
            declared += [a.arg for a in node.args.kwonlyargs]
            # A name with an underscore behind it is what has not been checked yet.
            there = [n.rstrip("_") for n in parameters(getattr(module, node.name))]
            assert declared == there, node.name
