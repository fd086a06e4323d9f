# SPDX-License-Identifier: BSD-3-Clause
"""The same bits: over levels, threads, alignment, `out=`, in place, and runs.

Compared byte by byte, NaN payloads included where there are none.
"""

import itertools

import numpy as np
import pytest
from arrays import IDS, SHAPES, Guarded, batch, channels_of, in_order
from everywhere import assert_same

import fastbn


def results(x, dy, layout=None, out=None):
    channels = channels_of(x.shape, layout)
    weight = np.linspace(0.5, 1.5, channels)
    bias = np.linspace(-1.0, 1.0, channels)
    native = x.dtype.newbyteorder("=")
    running_mean, running_var = np.zeros(channels, native), np.ones(channels, native)
    stats = fastbn.batch_stats(x, layout=layout)
    y, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=running_mean, running_var=running_var, layout=layout, out=out
    )
    y = y.copy()
    inferred = fastbn.batch_norm(x, running_mean, running_var, weight, bias, layout=layout)
    gradients = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, layout=layout)
    frozen = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, training=False, layout=layout)
    arrays = stats.mean, stats.m2, y, mean, invstd, running_mean, running_var, inferred
    return [np.ascontiguousarray(a).tobytes() for a in (*arrays, *gradients, *frozen)]


def nasty(shape, dtype):
    """A batch with outliers, constants, infinities and scales in some channels."""
    x = batch(shape, dtype)
    flat = x.reshape(-1)
    flat[0] = 1e4
    flat[flat.size // 2] = -1e9
    return x


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=IDS)
def test_levels_and_threads(dtype, shape, layout, always_parallel):
    x, dy = nasty(shape, dtype), batch(shape, dtype, 1)
    assert_same(lambda: results(x, dy, layout), threads=[1, 2, 3, 64])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 5, 130, 131), None),
        ((40, 300, 7, 7), None),
        ((2, 1, 700, 700), None),
        ((9, 120, 121, 8), "NHWC"),
        ((3000, 1030), None),
        ((16, 34, 130, 131), None),
        ((17, 130, 131, 34), "NHWC"),
        # Narrow rows, past the cache with one thread.
        ((90003, 32), None),
        ((60001, 48), None),
        ((45007, 64), None),
        ((1000, 977, 3), "NTC"),
    ],
)
def test_levels_and_threads_where_tasks_are_many(dtype, shape, layout):
    test_levels_and_threads(dtype, shape, layout, None)


def test_runs(level, always_parallel):
    x, dy = nasty((20, 33, 15, 15), "float32"), batch((20, 33, 15, 15), "float32", 1)
    with fastbn.threads(2):
        assert len({tuple(results(x, dy)) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 6, 21, 21), None),
        ((5, 21, 21, 6), "NHWC"),
        ((70, 112), None),
        ((11, 1030), None),
        ((40, 64, 3, 3), None),
        ((40, 32, 4, 4), None),
    ],
)
@pytest.mark.parametrize("alike", [True, False])
def test_alignment_and_out(level, dtype, shape, layout, alike):
    x, dy = nasty(shape, dtype), batch(shape, dtype, 1)
    expected = results(x, dy, layout)
    for offset in range(0, 64, x.itemsize):
        offsets = [offset * k % 64 for k in ((1, 1, 1) if alike else (3, 5, 1))]
        moved, moved_dy, out = (Guarded(shape, dtype, place) for place in offsets)
        moved.array[...] = x
        moved_dy.array[...] = dy
        assert results(moved.array, moved_dy.array, layout, out.array) == expected
        assert moved.intact()
        assert moved_dy.intact()
        assert out.intact()


@pytest.mark.parametrize("channels", [16, 24, 32, 48, 64])
@pytest.mark.parametrize("order", ["sliced", "second axis sliced", "broadcast"])
def test_narrow_rows_beside_others(level, dtype, channels, order):
    x, dy = nasty((643, channels), dtype), batch((643, channels), dtype, 1)
    if order == "broadcast":
        dy = np.broadcast_to(dy[0], dy.shape)
    expected = results(x, dy.copy())
    if order == "broadcast":
        assert results(x, dy) == expected
    else:
        assert results(x, in_order(dy, order)) == expected
        assert results(in_order(x, order), dy) == expected


def test_guards_around_vectors(level, dtype, parameters, kept):
    x, dy = batch((6, 19, 5), dtype), batch((6, 19, 5), dtype, 1)
    for offset in (0, 8, 24):
        weight, bias = (Guarded((19,), parameters, offset) for _ in range(2))
        mean, var = (Guarded((19,), kept, offset) for _ in range(2))
        for vector in (weight, bias, mean, var):
            vector.array[:] = 1
        _, saved_mean, saved_invstd = fastbn.batch_norm_forward(
            x, weight.array, bias.array, running_mean=mean.array, running_var=var.array
        )
        fastbn.batch_norm(x, mean.array, var.array, weight.array, bias.array)
        fastbn.batch_norm_backward(dy, x, saved_mean, saved_invstd, weight.array)
        assert all(vector.intact() for vector in (weight, bias, mean, var))
        assert (weight.array == 1).all()


@pytest.mark.parametrize("shape", [(100, 400, 14, 14), (600, 300, 7, 7)])
def test_slices_of_channels_past_the_cache(level, shape):
    x = batch(shape, "float32")[:, ::2]
    weight = np.linspace(0.5, 1.5, x.shape[1])
    out = np.zeros(shape, "float32")[:, ::-2]
    expected, mean, invstd = fastbn.batch_norm_forward(x.copy(), weight)
    y, *_ = fastbn.batch_norm_forward(x, weight, out=out)
    assert y.tobytes() == expected.tobytes()
    dx, *_ = fastbn.batch_norm_backward(y.copy(), x.copy(), mean, invstd, weight)
    found, *_ = fastbn.batch_norm_backward(y, x, mean, invstd, weight, out=out)
    assert found.tobytes() == dx.tobytes()
    assert not out.base[:, 0::2].any(), "the channels between are not written"


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((16, 34, 130, 131), None),
        ((45, 500, 14, 15), None),
        ((170, 1024, 7, 7), None),
        ((700, 501, 5, 5), None),
        ((130, 500, 130), None),
        ((110, 40, 40, 48), "NHWC"),
        ((300, 57, 59, 9), "NHWC"),
        ((90000, 100), None),
        ((9000, 1003), None),
    ],
)
def test_alignment_of_streamed_output(level, shape, layout):
    x = batch(shape, "float32")
    channels = channels_of(shape, layout)
    mean, var, weight = np.zeros(channels), np.ones(channels), np.linspace(0.5, 1.5, channels)
    expected = fastbn.batch_norm(x, mean, var, weight, layout=layout).tobytes()
    first = fastbn.batch_norm(x[:1], mean, var, weight, layout=layout).tobytes()
    assert expected.startswith(first), "what is streamed has the bits of what is not"
    for offset in (0, 4, 20, 60):
        out = Guarded(shape, "float32", offset)
        fastbn.batch_norm(x, mean, var, weight, layout=layout, out=out.array)
        assert out.array.tobytes() == expected
        assert out.intact()
    fastbn.batch_norm(x, mean, var, weight, layout=layout, out=x)
    assert x.tobytes() == expected


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 6, 21, 21), None), ((5, 21, 21, 6), "NHWC"), ((70, 100), None), ((8, 200, 7, 7), None),
     ((16, 34, 130, 131), None)],
)  # fmt: skip
def test_in_place(level, dtype, shape, layout):
    x, dy = nasty(shape, dtype), batch(shape, dtype, 1)
    y, mean, invstd = fastbn.batch_norm_forward(x, layout=layout)
    z = x.copy()
    assert fastbn.batch_norm_forward(z, layout=layout, out=z)[0] is z
    assert z.tobytes() == y.tobytes()
    for training in (True, False):
        dx = fastbn.batch_norm_backward(dy, x, mean, invstd, training=training, layout=layout)[0]
        for overwritten in (0, 1):
            operands = [dy.copy(), x.copy()]
            fastbn.batch_norm_backward(
                *operands, mean, invstd, training=training, layout=layout,
                out=operands[overwritten],
            )  # fmt: skip
            assert operands[overwritten].tobytes() == dx.tobytes()


@pytest.mark.parametrize("order", ["sliced", "reversed", "cropped", "swapped", "misaligned"])
@pytest.mark.parametrize("shape", [(6, 5, 9, 8), (40, 3, 5, 7), (3, 2, 40, 41)])
@pytest.mark.parametrize("last", [False, True])
def test_strides_do_not_matter_but_their_order(level, dtype, order, shape, last):
    x, dy = nasty(shape, dtype), batch(shape, dtype, 1)
    if last:
        x, dy = in_order(x, "channels last"), in_order(dy, "channels last")
    strided = [
        np.moveaxis(in_order(np.moveaxis(a, 1, -1), order), -1, 1) if last else in_order(a, order)
        for a in (x, dy)
    ]
    assert results(*strided) == results(x, dy)


def test_a_neighbours_nan_changes_nothing(level, dtype):
    for shape in [(40, 37), (20, 9, 7, 7), (4, 9, 50, 50)]:
        x = batch(shape, dtype)
        spoiled = x.copy()
        spoiled[3, 4] = np.nan
        spoiled[2, 6] = np.inf
        clean = np.delete(np.arange(shape[1]), [4, 6])
        a, b = fastbn.batch_norm_forward(x), fastbn.batch_norm_forward(spoiled)
        assert a[0][:, clean].tobytes() == b[0][:, clean].tobytes()
        assert a[1][clean].tobytes() == b[1][clean].tobytes()
        da = fastbn.batch_norm_backward(x, x, a[1], a[2])
        db = fastbn.batch_norm_backward(spoiled, spoiled, b[1], b[2])
        for grad_a, grad_b in zip(da, db, strict=True):
            grad_a, grad_b = (
                np.moveaxis(grad_a, 1 if grad_a.ndim > 1 else 0, 0),
                np.moveaxis(grad_b, 1 if grad_b.ndim > 1 else 0, 0),
            )
            assert grad_a[clean].tobytes() == grad_b[clean].tobytes()


def test_the_floating_point_environment_of_the_caller(level, dtype, flushing, always_parallel):
    tiny = 1e-40 if dtype == "float32" else 1e-310
    for scale, threads in itertools.product([1.0, tiny], [1, 2]):
        x, dy = batch((300, 133), dtype) * scale, batch((300, 133), dtype, 1)
        x = x.astype(dtype)
        mean, invstd = np.zeros(133), np.ones(133)
        found = []
        with fastbn.threads(threads):
            for on in (False, True):
                flushing(on)
                try:
                    found.append(
                        [
                            fastbn.batch_stats(x).to_array(),
                            *fastbn.batch_norm_forward(x),
                            *fastbn.batch_norm_backward(dy, x, mean, invstd),
                            fastbn.batch_norm(x, mean, invstd, eps=0.0),
                        ]
                    )
                    # NumPy shows that the register is still as the caller set it.
                    assert (np.array([tiny], dtype) * np.ones(1, dtype) == 0).all() == on
                finally:
                    flushing(False)
        for a, b in zip(*found, strict=True):
            assert a.tobytes() == b.tobytes()


def test_subnormals_survive_the_import():
    tiny = np.array([1e-42], np.float32)
    assert (tiny * np.ones(1, np.float32) != 0).all()
