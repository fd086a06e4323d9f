# SPDX-License-Identifier: BSD-3-Clause
"""The C interface: the bits of the Python functions, and a code for every mistake.

Through ctypes; test_embed.py has what needs a compiler.
"""

import ctypes
import itertools
import math

import capi
import numpy as np
import oracle
import pytest
from arrays import DTYPES, FLOATS, in_order
from cases import ACTIVATIONS, SIBLINGS, Case

import fastbn
from fastbn import _dispatch

# Planes and rows, tiny to long, one channel to many; enough of them for several phases and tasks.
BATCHES = [
    Case("batch", (17, 31)),
    Case("batch", (5, 4, 7, 7)),
    Case("batch", (3, 4, 33, 32)),
    Case("batch", (1, 2, 150, 151)),
    Case("batch", (9, 40, 60, 61)),
    Case("batch", (4, 14, 15, 64), layout="NHWC"),
    Case("batch", (7, 90, 5), layout="N...C"),
    Case("batch", (6, 2, 9), layout="CHN"),
]
# Channels of a group that are apart in memory are copied for Python, and refused here.
APART = Case("group", (12, 3, 5, 6), 4, "CNHW")
CASES = [*BATCHES, *[case for case in SIBLINGS if case != APART]]


def where(case):
    """The fields that say what the axes of a case mean."""
    if case.op in ("layer", "rms"):
        return {"normalized_ndim": len(case.parameter_shape)}
    axes = {"channel_axis": oracle.channel_axis(len(case.shape), case.layout)}
    if case.op in ("group", "instance"):
        axes["sample_axis"] = oracle.batch_axis(case.layout)
    return axes | ({"groups": case.what} if case.op == "group" else {})


def gradients_from_c(case, operation, x, runner, dx, dweight, dbias, **given):
    """What `case.backward` returns."""
    results = [dx, dweight, dbias] if case.has_mean else [dx, dweight]
    if "residual" in given:
        given["dresidual"] = np.empty_like(x)
        results.append(given["dresidual"])
    runner(capi.new_call(case.op, operation, x, out=dx, dweight=dweight, dbias=dbias,
                         **given, **where(case)))  # fmt: skip
    return [array.copy() for array in results]


def from_c(case, x, dy, weight, bias, running, runner, fused):
    """What `from_python` returns, by the C interface."""
    y, dx = np.empty_like(x), np.empty_like(dy)
    mean, invstd = np.empty(case.statistics_shape), np.empty(case.statistics_shape)
    dweight, dbias = np.empty_like(weight), np.empty_like(weight)
    call = capi.new_call(case.op, capi.FORWARD, x, out=y, weight=weight, bias=bias, mean=mean,
                         invstd=invstd, **where(case), **running, **fused)  # fmt: skip
    runner(call)
    statistics = [mean, invstd] if case.has_mean else [invstd]
    results = [array.copy() for array in (y, *statistics)]
    given = {"dy": dy, "dx": dx, "weight": weight, "mean": mean, "invstd": invstd,
             "dweight": dweight, "dbias": dbias, **fused}  # fmt: skip
    if fused:
        given["bias"] = bias
    results += gradients_from_c(case, capi.BACKWARD, x, runner, **given)
    results += running.values()
    if case.op == "batch" and running:
        m2 = np.empty_like(mean)
        runner(capi.new_call("batch", capi.STATISTICS, x, mean=mean, m2=m2, **where(case)))
        results += [mean.copy(), m2]
        call.operation = capi.INFERENCE
        runner(call)
        results += [y, mean, invstd]
        results += gradients_from_c(case, capi.BACKWARD_INFERENCE, x, runner, **given)
    return results


def from_python(case, x, dy, weight, bias, running, fused):
    y, saved = case.forward(x, weight, bias, eps=1e-5, **running, **fused)
    backward = dict(fused)
    if fused and case.has_mean:
        backward["bias"] = bias
    results = [y, *saved, *case.backward(dy, x, saved, weight, **backward), *running.values()]
    if case.op == "batch" and running:
        stats = fastbn.batch_stats(x, layout=case.layout)
        y, mean, invstd = fastbn.batch_norm_forward(
            x, weight, bias, training=False, layout=case.layout, **running, **fused)  # fmt: skip
        results += [stats.mean, stats.m2, y, mean, invstd]
        results += case.backward(dy, x, [mean, invstd], weight, training=False, **backward)
    return results


def same_bits(case, dtype, parameter_dtype="float32", order="C", runner=capi.run, **fused):
    """`fused`: the activation, and whether it `adds` a residual."""
    x, dy = (in_order(a, order) for a in (case.batch(dtype), case.gradient(dtype)))
    if fused.pop("adds", False):
        fused["residual"] = in_order(case.batch(dtype, 6, 0.3, 1.0), order)
    if "activation" in fused:
        fused["negative_slope"] = 0.2
    weight, bias = case.parameters(parameter_dtype)
    keeps = case.op in ("batch", "instance") and weight.itemsize > 2
    names = ["running_mean", "running_var"] if keeps else []
    running = [{name: np.full(case.parameter_shape, 0.25, parameter_dtype) for name in names}
               for _ in range(2)]  # fmt: skip
    expected = from_python(case, x, dy, weight, bias, running[0], fused)
    actual = from_c(case, x, dy, weight, bias, running[1], runner, fused)
    assert len(actual) == len(expected)
    for k in range(len(actual)):
        assert actual[k].dtype == expected[k].dtype
        assert actual[k].tobytes() == expected[k].tobytes(), (k, actual[k], expected[k])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_python(case, any_dtype):
    wide = "float64" if any_dtype == "float64" else "float32"
    same_bits(case, any_dtype, wide)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_with_other_vectors(case, dtype):
    same_bits(case, dtype, "float32" if dtype == "float64" else "float64")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_with_half_vectors(case, half):
    for dtype in *FLOATS, half:
        same_bits(case, dtype, half)


def test_every_half_number_as_a_weight(half):
    bits = np.arange(1 << 16, dtype=np.uint16)
    weight = bits[bits & 0x7FFF <= np.array(np.inf, half).view(np.uint16)].view(half)  # no NaN
    x = np.random.default_rng(0).normal(size=(2, weight.size))
    y, out = fastbn.rms_norm(x, weight.size, weight, eps=1e-5), np.empty_like(x)
    capi.run(capi.new_call("rms", capi.FORWARD, x, weight=weight, out=out, normalized_ndim=1))
    assert out.tobytes() == y.tobytes()


def test_gradients_of_half_vectors_are_rounded_alike(half):
    # Between two of the half type and next to the middle, further away than float32 sees; at
    # the ends of the range; and all over it.
    one = [scale * (1 + (k + 0.5) * step + rest) for step in (2**-10, 2**-7) for k in (0, 1)
           for rest in (0, 2**-40, -(2**-40)) for scale in (1, -3, 2**-14, 2**-24)]  # fmt: skip
    ends = [0.0, 2**-24, 2**-25, 2**-25 + 2**-60, 2**-26, 65519.999999, 65520.0, -7e4, 3.39e38,
            3.4e38, -1e300, 1e-300, 2**-134, 2**-133]  # fmt: skip
    rng = np.random.default_rng(0)
    many = rng.normal(size=5000) * 2.0 ** rng.integers(-30, 20, 5000)
    dy = np.zeros((2, len(one) + len(ends) + many.size))
    dy[0] = [*one, *ends, *many]
    x = np.concatenate([np.zeros_like(dy[:1]), np.ones_like(dy[:1])])
    mean, invstd = np.zeros(dy.shape[1]), np.ones(dy.shape[1])
    weight = np.ones(dy.shape[1], half)
    dbias, dweight, dx = np.empty_like(weight), np.empty_like(weight), np.empty_like(x)
    capi.run(capi.new_call("batch", capi.BACKWARD, x, dy=dy, out=dx, weight=weight, dbias=dbias,
                           dweight=dweight, mean=mean, invstd=invstd, channel_axis=1))  # fmt: skip
    gradients = fastbn.batch_norm_backward(dy, x, mean, invstd, weight)
    with np.errstate(over="ignore"):
        assert dbias.tobytes() == dy[0].astype(half).tobytes()
    for found, expected in zip([dx, dweight, dbias], gradients, strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("workers", [1, 3, 20])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_with_tasks_of_ones_own(case, workers):
    same_bits(case, "float32", runner=lambda call: capi.run_in_tasks(call, workers))


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_bits_with_threads(case):
    same_bits(case, "float32", runner=lambda call: capi.run(call, 3))


def test_bits_on_every_level(level):
    assert _dispatch.show_config()["isa"] == level
    same_bits(CASES[2], "float32")


@pytest.mark.parametrize("order", ["channels last", "sliced", "reversed", "second axis sliced"])
def test_strides(order):
    # out and dx are gapless; x and dy are not.
    same_bits(Case("batch", (6, 4, 9, 8)), "float32", order=order)
    same_bits(Case("instance", (6, 4, 9, 8)), "float32", order=order)


def test_layer_norm_of_strided_rows():
    same_bits(Case("layer", (8, 5, 33), 33), "float32", order="sliced")
    same_bits(Case("layer", (8, 5, 33), 33), "float32", order="second axis sliced")


# ---- an activation, a residual -----------------------------------------------------------

fused = pytest.mark.parametrize(("activation", "adds"), [
    (activation, adds) for activation in (None, *ACTIVATIONS) for adds in (False, True)
    if activation or adds])  # fmt: skip
# Planes and rows, short and long; each norm.
FUSED = [
    *BATCHES,
    Case("layer", (4, 33), 33),
    Case("layer", (3, 4, 14, 15), (4, 14, 15)),
    Case("layer", (9, 768), 768),
    Case("rms", (2, 5, 6, 7), (5, 6, 7)),
    Case("rms", (40, 30, 17), 17),
    Case("group", (3, 12, 7, 7), 3),
    Case("group", (2, 6, 33, 32), 3),
    Case("group", (3, 7, 9, 30), 5, "NHWC"),
    Case("instance", (3, 5, 7, 7)),
    Case("instance", (2, 3, 130, 131)),
    Case("instance", (3, 7, 9, 30), layout="NHWC"),
]


@fused
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_bits_of_fused_calls(case, any_dtype, activation, adds):
    wide = "float64" if any_dtype == "float64" else "float32"
    same_bits(case, any_dtype, wide, activation=activation, adds=adds)


@fused
@pytest.mark.parametrize("workers", [1, 3, 20])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_bits_with_tasks_of_ones_own(case, workers, activation, adds):
    same_bits(case, "float32", "float64", activation=activation, adds=adds,
              runner=lambda call: capi.run_in_tasks(call, workers))  # fmt: skip


@fused
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_bits_with_threads(case, activation, adds):
    same_bits(case, "float32", runner=lambda call: capi.run(call, 3), activation=activation,
              adds=adds)  # fmt: skip


@pytest.mark.parametrize("order", ["channels last", "sliced", "reversed", "second axis sliced"])
def test_strides_of_a_residual(order):
    for op, activation in itertools.product(("batch", "instance"), ACTIVATIONS):
        case = Case(op, (6, 4, 9, 8))
        same_bits(case, "float32", order=order, activation=activation, adds=True)


def fused_gradients(case, activation, x, dy, residual, dx, dresidual):
    """Of a residual and an activation, each where it is said to be."""
    statistics = {"mean": np.zeros(case.statistics_shape), "invstd": np.ones(case.statistics_shape)}
    capi.run(capi.new_call(case.op, capi.BACKWARD, x, dy=dy, out=dx, activation=activation,
                           residual=residual, dresidual=dresidual, **statistics,
                           **where(case)))  # fmt: skip
    return dx.tobytes(), dresidual.tobytes()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_backward_in_place(case, activation):
    # In memory that it may overwrite, each gradient in every place that is allowed.
    arrays = {name: case.batch("float32", k) for k, name in enumerate(("x", "dy", "residual"))}
    new = np.empty_like(arrays["x"])
    expected = fused_gradients(case, activation, **arrays, dx=np.empty_like(new),
                               dresidual=new.copy())  # fmt: skip
    for dx, dresidual in [
        ("x", "dy"), ("x", "residual"), ("dy", "residual"), ("residual", "dy"), ("dy", "new"),
        ("residual", "new"), ("new", "dy"),
    ]:  # fmt: skip
        inputs = {name: array.copy() for name, array in arrays.items()}
        places = inputs | {"new": new}
        outputs = {"dx": places[dx], "dresidual": places[dresidual]}
        assert fused_gradients(case, activation, **inputs, **outputs) == expected


# ---- overlaps ----------------------------------------------------------------------------


def channels_of_a_buffer(n, c, inner):
    """Two tensors that are neighbouring channels of one, as in a network that concatenates."""
    whole = np.random.default_rng(0).normal(size=(n, 2 * c, inner)).astype(np.float32)
    return whole[:, :c], whole[:, c:]


def images_of_a_buffer(n, c, inner):
    """Two tensors that are every other image of one; the second runs backwards."""
    whole = np.random.default_rng(0).normal(size=(2 * n, c, inner)).astype(np.float32)
    return whole[::2], whole[::-2]


def pixels_of_a_buffer(n, c, inner):
    """Two tensors of channels last."""
    whole = np.random.default_rng(0).normal(size=(n, inner, 2 * c)).astype(np.float32)
    return whole[..., :c].transpose(0, 2, 1), whole[..., c:].transpose(0, 2, 1)


@pytest.mark.parametrize("shape", [(5, 4, 49), (16, 3, 2), (2, 64, 64)], ids=str)
@pytest.mark.parametrize("of_a_buffer", [
    channels_of_a_buffer, images_of_a_buffer, pixels_of_a_buffer])  # fmt: skip
def test_tensors_between_each_other(of_a_buffer, shape):
    x, out = of_a_buffer(*shape)
    y = fastbn.batch_norm_forward(x)[0]
    before = x.tobytes()
    capi.run(batch_call(x, out=out))
    assert out.tobytes() == y.tobytes()
    assert x.tobytes() == before


def some_view(rng, memory, shape, like=None):
    """Without gaps from the channels inwards, of any other strides; often those of another."""
    _, c, inner = shape
    image = int(rng.integers(c * inner, 3 * c * inner)) * int(rng.choice([1, 1, -1]))
    channel = int(rng.choice([inner, inner, inner + 1, 2 * inner, -inner]))
    strides = [8 * step for step in (image, channel, 1)]
    if like is not None and rng.integers(2):
        strides = like.strides
    spans = [(n - 1) * stride // 8 for n, stride in zip(shape, strides, strict=True)]
    low = -sum(min(span, 0) for span in spans)
    start = int(rng.integers(low, memory.size - sum(max(span, 0) for span in spans)))
    return np.lib.stride_tricks.as_strided(memory[start:], shape, strides)


def test_overlaps_are_those_of_python():
    rng, memory = np.random.default_rng(0), np.zeros(360)
    shared = apart = 0
    for _ in range(4000):
        shape = tuple(map(int, rng.integers(2, 6, 3)))
        x = some_view(rng, memory, shape)
        out = some_view(rng, memory, shape, x)
        code = code_of(batch_call(x, out=out))
        if code == capi.BAD_STRIDES or (x.ctypes.data, x.strides) == (out.ctypes.data, out.strides):
            continue
        assert (code == capi.OVERLAP) == np.shares_memory(x, out), (shape, x.strides, out.strides)
        shared += code == capi.OVERLAP
        apart += code == capi.OK and np.may_share_memory(x, out)
    assert min(shared, apart) > 50


PLACES = {"x": 0, "dy": 100, "out": 200, "residual": 300, "dresidual": 400}
MOVED = [
    ({}, capi.OK),
    *[({"out": PLACES[name]}, capi.OK) for name in ("x", "dy", "residual")],
    *[({"dresidual": PLACES[name]}, capi.OK) for name in ("dy", "residual")],
    ({"x": 100, "out": 100, "dresidual": 300}, capi.OK),
    ({"out": 400}, capi.OVERLAP),
    ({"dresidual": 0}, capi.OVERLAP),
    ({"out": 100, "dresidual": 100}, capi.OVERLAP),
    *[({"out": at + away}, capi.OVERLAP)
      for name, at in PLACES.items() if name != "out" for away in (-59, -1, 1, 59)],
    *[({"dresidual": at + away}, capi.OVERLAP)
      for name, at in PLACES.items() if name != "dresidual" for away in (-59, -1, 1, 59)],
]  # fmt: skip


@pytest.mark.parametrize(("moved", "code"), MOVED, ids=str)
def test_overlaps_in_backward(moved, code):
    memory = np.zeros(700, np.float32)
    places = {name: 100 + at for name, at in (PLACES | moved).items()}
    tensors = {name: memory[at : at + 60].reshape(4, 3, 5) for name, at in places.items()}
    call = capi.new_call("batch", capi.BACKWARD, tensors.pop("x"), mean=np.zeros(3),
                         invstd=np.ones(3), channel_axis=1, **tensors)  # fmt: skip
    assert code_of(call) == code


def test_what_nothing_follows():
    # Statistics ignore all of it; so does what has no residual its gradient's place.
    mean, m2 = np.empty(3), np.empty(3)
    call = changed(operation=capi.STATISTICS, mean=mean.ctypes.data, m2=m2.ctypes.data,
                   activation=99, residual=capi.Tensor(2, None))  # fmt: skip
    assert code_of(call) == capi.OK
    assert code_of(changed(dresidual=capi.Tensor(2, None))) == capi.OK
    assert code_of(changed(activation=1, negative_slope=math.nan)) == capi.OK


def batch_call(x=None, **fields):
    x = np.ones((4, 3, 5), np.float32) if x is None else x
    fields = {"channel_axis": 1, "out": np.empty_like(x)} | fields
    return capi.new_call("batch", capi.FORWARD, x, **fields)


def code_of(call, workers=1):
    return capi.API.workspace_size(call, workers, ctypes.c_size_t())


def test_in_place_and_without_gaps():
    case = Case("batch", (4, 3, 5, 6))
    x = case.batch("float32")
    y = fastbn.batch_norm_forward(x)[0]
    call = batch_call(x, out=x)
    call.x.strides = call.out.strides = None
    capi.run(call)
    assert x.tobytes() == y.tobytes()


def test_what_is_not_wanted_is_left_out():
    x = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    y, mean, invstd = fastbn.group_norm_forward(x, 2)
    out = np.empty_like(x)
    kind = {"channel_axis": 1, "sample_axis": 0, "groups": 2, "out": out}
    capi.run(capi.new_call("group", capi.FORWARD, x, **kind))
    assert out.tobytes() == y.tobytes()
    dx = fastbn.group_norm_backward(y, x, mean, invstd, 2)[0]
    capi.run(capi.new_call("group", capi.BACKWARD, x, dy=y, mean=mean, invstd=invstd, **kind))
    assert out.tobytes() == dx.tobytes()


def test_rms_norm_has_no_mean():
    x, mean = np.ones((2, 3), np.float32), np.full(2, 77.0)
    capi.run(capi.new_call("rms", capi.FORWARD, x, out=x, mean=mean, normalized_ndim=1))
    assert mean.tolist() == [77, 77]


def test_running_statistics_wait_for_finish():
    running = np.zeros(3, np.float32)
    call = batch_call(running_mean=running)
    _memory, place, size = capi.workspace_for(call)
    assert capi.API.begin(call, 1, place, size) == capi.OK
    for phase in range(capi.API.phases(place)):
        tasks = capi.API.tasks(place, phase)
        assert capi.API.run_tasks(place, phase, 0, tasks, 0) == capi.OK
    assert running.tolist() == [0, 0, 0]
    assert capi.API.finish(place) == capi.OK
    assert running.tolist() == [np.float32(0.1)] * 3
    assert capi.API.finish(place) == capi.BAD_WORKSPACE


def test_the_callers_floating_point_environment(flushing):
    case = Case("batch", (5, 4, 7, 7))
    x, weight = case.batch("float32"), np.full(4, 1e-40, np.float32)
    y = fastbn.batch_norm_forward(x, weight)[0]
    out = np.empty_like(x)
    call = batch_call(x, out=out, weight=weight)
    _memory, place, size = capi.workspace_for(call)
    flushing(True)
    code = capi.API.run(call, 1, place, size)
    flushing(False)
    assert code == capi.OK
    assert out.tobytes() == y.tobytes()
    assert out.any()


ROW = np.ones((4, 6), np.float32)
MISTAKES = {
    "no call": (None, capi.NULL_POINTER),
    "no size": (lambda: changed(struct_size=0), capi.UNKNOWN_FIELD),
    "norm 0": (lambda: changed(norm=0), capi.BAD_OPERATION),
    "norm -1": (lambda: changed(norm=-1), capi.BAD_OPERATION),
    "operation -1": (lambda: changed(operation=-1), capi.BAD_OPERATION),
    "dtype -1": (lambda: changed(dtype=-1), capi.BAD_DTYPE),
    "norm past the last": (
        lambda: changed(norm=1 + max(capi.NORMS.values())), capi.BAD_OPERATION),
    "operation 0": (lambda: changed(operation=0), capi.BAD_OPERATION),
    "operation past the last": (lambda: changed(operation=8), capi.BAD_OPERATION),
    "inference of rows": (lambda: changed(norm=4, operation=2), capi.BAD_OPERATION),
    "dtype 0": (lambda: changed(dtype=0), capi.BAD_DTYPE),
    "dtype past the last": (
        lambda: changed(dtype=1 + max(capi.DTYPES.values())), capi.BAD_DTYPE),
    "no dtype of vectors": (
        lambda: changed(weight=ROW.ctypes.data, vector_dtype=0), capi.BAD_DTYPE),
    "vectors of a dtype past the last": (
        lambda: changed(weight=ROW.ctypes.data, vector_dtype=1 + max(capi.DTYPES.values())),
        capi.BAD_DTYPE),
    "half running mean": (lambda: changed(running_mean=ROW.ctypes.data, vector_dtype=3),
                          capi.BAD_DTYPE),
    "half running variance": (lambda: changed(running_var=ROW.ctypes.data, vector_dtype=4),
                              capi.BAD_DTYPE),
    "half running statistics": (
        lambda: changed(operation=2, running_mean=ROW.ctypes.data, running_var=ROW.ctypes.data,
                        vector_dtype=4), capi.BAD_DTYPE),
    "no shape": (lambda: changed(shape=None), capi.NULL_POINTER),
    "no x": (lambda: changed(x=capi.Tensor(None, None)), capi.NULL_POINTER),
    "no out": (lambda: changed(out=capi.Tensor(None, None)), capi.NULL_POINTER),
    "no running statistics": (lambda: changed(operation=2), capi.NULL_POINTER),
    "no m2": (lambda: changed(operation=1), capi.NULL_POINTER),
    "no dy": (lambda: changed(operation=4, mean=ROW.ctypes.data, invstd=ROW.ctypes.data),
              capi.NULL_POINTER),
    "no invstd": (lambda: changed(operation=4, mean=ROW.ctypes.data), capi.NULL_POINTER),
    "no mean": (lambda: changed(operation=4, invstd=ROW.ctypes.data), capi.NULL_POINTER),
    "no axes": (lambda: changed(ndim=0), capi.BAD_SHAPE),
    "65 axes": (lambda: changed(ndim=65), capi.BAD_SHAPE),
    "a size of 0": (lambda: changed(shape=capi.sizes([4, 0, 5])), capi.BAD_SHAPE),
    "a size below 0": (lambda: changed(shape=capi.sizes([4, 3, -5])), capi.BAD_SHAPE),
    "sizes that overflow": (lambda: changed(shape=capi.sizes([2**40, 3, 2**40])), capi.BAD_SHAPE),
    "channel axis 3": (lambda: changed(channel_axis=3), capi.BAD_AXIS),
    "channel axis -1": (lambda: changed(channel_axis=-1), capi.BAD_AXIS),
    "samples are channels": (lambda: changed(norm=2, sample_axis=1), capi.BAD_AXIS),
    "no axes of rows": (lambda: changed(norm=4), capi.BAD_AXIS),
    "more axes of rows": (lambda: changed(norm=5, normalized_ndim=4), capi.BAD_AXIS),
    "no groups": (lambda: changed(norm=3), capi.BAD_GROUPS),
    "2 groups of 3": (lambda: changed(norm=3, groups=2), capi.BAD_GROUPS),
    "eps 0": (lambda: changed(eps=0.0), capi.BAD_NUMBER),
    "eps NaN": (lambda: changed(eps=math.nan), capi.BAD_NUMBER),
    "momentum": (lambda: changed(momentum=math.inf), capi.BAD_NUMBER),
    "one value": (lambda: batch_call(np.ones((1, 60, 1), np.float32)), capi.ONE_VALUE),
    "channels of a group apart": (
        lambda: capi.new_call("group", capi.FORWARD, APART.batch("float32"),
                              out=APART.batch("float32"), **where(APART)), capi.BAD_STRIDES),
    "a crop": (lambda: strided(15, 5, 2), capi.BAD_STRIDES),
    "two breaks": (lambda: batch_call(np.ones((8, 8, 3, 3, 5), np.float32)[::2, ::2, ::2],
                                      channel_axis=3), capi.BAD_STRIDES),
    "an output on itself": (lambda: changed(out=capi.Tensor(ROW.ctypes.data,
                                                            capi.sizes([0, 5, 1]))),
                            capi.BAD_STRIDES),
    "activation past the last": (
        lambda: changed(activation=1 + max(ACTIVATIONS.values())), capi.BAD_OPERATION),
    "activation -1": (lambda: changed(activation=-1), capi.BAD_OPERATION),
    "slope": (lambda: changed(activation=2, negative_slope=math.nan), capi.BAD_NUMBER),
    "a crop of a residual": (
        lambda: changed(residual=capi.Tensor(ROW.ctypes.data, capi.sizes([15, 5, 2]))),
        capi.BAD_STRIDES),
    "misaligned residual": (lambda: changed(residual=capi.Tensor(ROW.ctypes.data + 1, None)),
                            capi.MISALIGNED),
    "no dresidual": (lambda: backward_call(dresidual=capi.Tensor(None, None)), capi.NULL_POINTER),
    "dresidual on itself": (
        lambda: backward_call(dresidual=capi.Tensor(ROW.ctypes.data, capi.sizes([0, 5, 1]))),
        capi.BAD_STRIDES),
    "reserved": (lambda: changed(reserved=1), capi.UNKNOWN_FIELD),
    "an output over the weight": (lambda: with_vector("weight", "out"), capi.OVERLAP),
    "running mean in x": (lambda: with_vector("running_mean", "x"), capi.OVERLAP),
    "one array for both running statistics": (
        lambda: changed(running_mean=ROW.ctypes.data, running_var=ROW.ctypes.data,
                        vector_dtype=1), capi.OVERLAP),
    "misaligned": (lambda: changed(x=capi.Tensor(ROW.ctypes.data + 2, None)), capi.MISALIGNED),
}  # fmt: skip


def changed(**fields):
    call = batch_call()
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def backward_call(**fields):
    """With a residual."""
    new = [np.ones((4, 3, 5), np.float32) for _ in range(4)]
    call = capi.new_call("batch", capi.BACKWARD, new[0], dy=new[0], out=new[1], residual=new[2],
                         dresidual=new[3], mean=np.zeros(3), invstd=np.ones(3),
                         channel_axis=1)  # fmt: skip
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def with_vector(name, tensor):
    """With a vector in the memory of a tensor."""
    call = batch_call()
    setattr(call, name, getattr(call, tensor).data)
    call.vector_dtype = 1
    return call


def strided(*strides):
    call = batch_call()
    call.x.strides = capi.sizes(strides)
    return call


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    make, code = MISTAKES[mistake]
    call = make and make()
    size = ctypes.c_size_t(77)
    assert capi.API.workspace_size(call, 1, size) == code
    assert size.value == 77
    memory = np.zeros(1 << 16, np.uint8)
    assert capi.API.begin(call, 1, memory.ctypes.data, memory.size) == code
    assert capi.API.run(call, 1, memory.ctypes.data, memory.size) == code
    assert not memory.any()
    assert capi.API.phases(memory.ctypes.data) == 0


@pytest.mark.parametrize("workers", [0, -1, 1025])
def test_workers(workers):
    assert code_of(batch_call(), workers) == capi.BAD_WORKERS


def test_workspace():
    call = batch_call()
    _memory, place, size = capi.workspace_for(call)
    api = capi.API
    assert api.workspace_size(call, 1, None) == capi.NULL_POINTER
    assert api.begin(call, 1, None, size) == capi.NULL_POINTER
    assert api.begin(call, 1, place, size - 1) == capi.BAD_WORKSPACE
    assert api.run_tasks(place, 0, 0, 1, 0) == capi.BAD_WORKSPACE
    assert api.run_tasks(None, 0, 0, 1, 0) == capi.BAD_WORKSPACE
    assert api.finish(place) == capi.BAD_WORKSPACE
    assert api.phases(None) == 0


def test_tasks():
    call = batch_call()
    _memory, place, size = capi.workspace_for(call, 2)
    api = capi.API
    assert api.begin(call, 2, place, size) == capi.OK
    phases, tasks = api.phases(place), api.tasks(place, 0)
    for phase, begin, end, worker in [
        (-1, 0, 1, 0), (phases, 0, 1, 0), (0, -1, 1, 0), (0, 1, 0, 0), (0, 0, tasks + 1, 0),
        (0, 0, 1, -1), (0, 0, 1, 2),
    ]:  # fmt: skip
        assert api.run_tasks(place, phase, begin, end, worker) == capi.BAD_TASK
    assert api.tasks(place, phases) == api.tasks(place, -1) == 0
    assert api.run_tasks(place, 0, 0, 0, 1) == capi.OK


def test_workers_have_memory_of_their_own():
    x = np.random.default_rng(0).normal(size=(8, 6, 5, 7)).astype(np.float32)
    call = capi.new_call("group", capi.FORWARD, x, out=x, channel_axis=1, sample_axis=0, groups=2,
                         mean=np.empty((8, 2)), invstd=np.empty((8, 2)))  # fmt: skip
    memory, place, size = capi.workspace_for(call, 2)
    assert capi.API.begin(call, 2, place, size) == capi.OK
    assert capi.API.phases(place) == 1
    assert capi.API.tasks(place, 0) == 8
    changed = []
    for worker in 0, 1:
        before = memory.copy()
        assert capi.API.run_tasks(place, 0, 4 * worker, 4 * worker + 4, worker) == capi.OK
        changed.append(set(np.flatnonzero(memory != before)))
    assert changed[0]
    assert changed[1]
    assert not changed[0] & changed[1]


def test_unaligned_workspace():
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    call = batch_call(x, out=np.empty_like(x))
    *_, size = capi.workspace_for(call)
    bigger = np.empty(size + 1, np.uint8)
    assert capi.API.run(call, 1, bigger.ctypes.data + 1, size) == capi.OK
    assert call.keep[1]["out"].tobytes() == fastbn.batch_norm_forward(x)[0].tobytes()


def test_messages():
    messages = [capi.API.error_message(code).decode() for code in range(-1, 19)]
    assert messages[1] == "no error"
    assert messages[0] == messages[-1] == messages[-2] == "unknown error"
    known = messages[1:18]
    assert len(set(known)) == len(known)
    assert not any("unknown" in message for message in known)


# ---- the ABI: these numbers never change ----------------------------------------------

ABI_1 = {
    capi.Tensor: {"data": 0, "strides": 8},
    capi.Call: {
        "struct_size": 0, "norm": 8, "operation": 12, "dtype": 16, "vector_dtype": 20,
        "ndim": 24, "channel_axis": 28, "sample_axis": 32, "normalized_ndim": 36, "shape": 40,
        "groups": 48, "eps": 56, "momentum": 64, "x": 72, "dy": 88, "out": 104, "weight": 120,
        "bias": 128, "running_mean": 136, "running_var": 144, "dweight": 152, "dbias": 160,
        "mean": 168, "invstd": 176, "m2": 184},
    capi.Api: {
        "struct_size": 0, "abi": 8, "version": 16, "error_message": 24, "workspace_size": 32,
        "run": 40, "begin": 48, "phases": 56, "tasks": 64, "run_tasks": 72, "finish": 80},
}  # fmt: skip


NUMBERS_1 = {"relu": 1, "leaky_relu": 2, "silu": 3, "relu6": 4}


def test_numbers():
    assert capi.DTYPES.keys() == {*DTYPES, "uint8", "int8", "uint16", "int16"}
    assert ACTIVATIONS.items() >= NUMBERS_1.items()
    for numbers in (capi.DTYPES, ACTIVATIONS):
        assert sorted(numbers.values()) == list(range(1, 1 + len(numbers)))


# What came after that, and how large the struct was before.
FUSION = {"activation": 192, "reserved": 196, "negative_slope": 200, "residual": 208,
          "dresidual": 224}  # fmt: skip
IMAGES = {"out_dtype": 240, "reserved2": 244, "max_value": 248, "norm_mean": 256, "norm_std": 264,
          "minimum": 272, "maximum": 280}  # fmt: skip
MASKS = {"mask": 288, "lengths": 304, "length_axis": 312, "padding": 316}
OLDER_SIZES = [192, 240, 288]
on_64_bits = pytest.mark.skipif(
    ctypes.sizeof(ctypes.c_void_p) != 8, reason="offsets of 64-bit systems")  # fmt: skip


def offsets_of(struct):
    return {name: getattr(struct, name).offset for name, _ in struct._fields_}


@on_64_bits
@pytest.mark.parametrize("struct", ABI_1)
def test_offsets(struct):
    assert list(offsets_of(struct).items())[: len(ABI_1[struct])] == list(ABI_1[struct].items())


@on_64_bits
def test_offsets_of_what_came_later():
    assert offsets_of(capi.Call) == ABI_1[capi.Call] | FUSION | IMAGES | MASKS


def test_call_has_no_padding():
    # What a later version reads there would be anything in calls of this header.
    sizes = [ctypes.sizeof(kind) for _, kind in capi.Call._fields_]
    assert sum(sizes) == ctypes.sizeof(capi.Call)


def test_table():
    assert capi.API.abi == 1
    assert capi.API.struct_size == ctypes.sizeof(capi.Api)
    assert capi.API.version.decode() == fastbn.__version__


def test_call_of_an_older_header():
    # One that ended before `mean`; what follows in memory is not looked at.
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    out, invstd = np.empty_like(x), np.full(3, 77.0)
    call = batch_call(x, out=out, invstd=invstd)
    call.struct_size = capi.Call.mean.offset
    capi.run(call)
    assert out.tobytes() == fastbn.batch_norm_forward(x)[0].tobytes()
    assert invstd.tolist() == [77] * 3


@on_64_bits
@pytest.mark.parametrize("size", OLDER_SIZES)
@pytest.mark.parametrize("operation", [capi.INFERENCE, capi.FORWARD])
def test_call_of_an_earlier_version(size, operation):
    # Anything may follow it in memory.
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    mean, var, out = np.full(3, 0.5), np.full(3, 2.0), np.empty_like(x)
    call = batch_call(x, out=out, running_mean=mean, running_var=var)
    call.operation, call.struct_size = operation, size
    end = ctypes.addressof(call) + size
    ctypes.memset(end, capi.GARBAGE, ctypes.sizeof(capi.Call) - size)
    running = {"running_mean": mean.copy(), "running_var": var.copy()}
    expected = fastbn.batch_norm_forward(x, training=operation == capi.FORWARD, **running)[0]
    capi.run(call)
    assert out.tobytes() == expected.tobytes()


def test_call_of_a_newer_header():
    class Newer(ctypes.Structure):
        _fields_ = [("call", capi.Call), ("field", ctypes.c_double)]

    newer = Newer(batch_call(np.ones((4, 3, 5), np.float32)), 0.0)
    newer.call.struct_size = ctypes.sizeof(Newer)
    assert code_of(newer.call) == capi.OK
    newer.field = 1.0
    assert code_of(newer.call) == capi.UNKNOWN_FIELD
