# SPDX-License-Identifier: BSD-3-Clause
"""Every operation against the oracle: level x dtype x shape x memory order x threads."""

import bounds
import numpy as np
import oracle
import pytest
from arrays import GAPLESS, IDS, ORDERS, SHAPES, assert_near, batch, in_order
from cases import BatchNorm, Case, Expected

import fastbn


def expected_of(shape, dtype, layout=None):
    case = Case("batch", shape, layout=layout)
    return BatchNorm(case, case.batch(dtype), case.gradient(dtype), dtype)


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=IDS)
def test_shapes(dtype, shape, layout, always_parallel):
    expected_of(shape, dtype, layout).check_everywhere(threads=[1, 2, 3, 64])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dy_order", ["C", "channels last", "cropped"])
@pytest.mark.parametrize("shape", [(6, 5, 4, 9), (20, 3, 5, 6), (4, 8), (3, 2, 40, 41)])
def test_memory_orders(level, dtype, order, dy_order, shape):
    case = Case("batch", shape)
    x, dy = in_order(case.batch(dtype), order), in_order(case.gradient(dtype), dy_order)
    y, dx = BatchNorm(case, x, dy, dtype).check()
    if order in GAPLESS:
        assert y.strides == dx.strides == np.empty_like(x).strides


@pytest.mark.parametrize("images", [3, 17])
def test_every_length_of_a_run(level, dtype, images):
    # Whole registers, parts of registers, and trees with any number of rows.
    for length in range(1, 280 if images == 3 else 140):
        expected_of((images, 2, length), dtype).check()


@pytest.mark.parametrize("channels", range(1, 70))
def test_every_number_of_narrow_columns(channels):
    for images in (5, 40):
        expected_of((images, 9, channels), "float32", "NLC").check_everywhere(threads=[1])


@pytest.mark.parametrize(
    "shape",
    [(16, 34, 130, 131), (17, 130, 131, 34), (70, 700, 14, 15), (250, 40, 40, 24), (9000, 1003)],
)
def test_larger_than_the_cache(shape):
    # Above 32 MB: streaming stores, whole phases instead of tile by tile.
    layout = "NHWC" if shape[-1] in (34, 24) else None
    expected_of(shape, "float32", layout).check_everywhere(threads=[2])


def test_dtypes_of_parameters_are_free(dtype, parameters, kept):
    case = Case("batch", (8, 3, 5))
    x = case.batch(dtype)
    Expected(case, x, x, *case.parameters(parameters)).check()
    Expected(case, x, x).check()
    weight, bias = case.parameters(parameters)
    running_mean, running_var = np.zeros(3, kept), np.ones(3, kept)
    y, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=running_mean, running_var=running_var
    )
    assert y.dtype == dtype
    assert mean.dtype == invstd.dtype == np.float64
    assert running_mean.dtype == running_var.dtype == kept


def test_statistics_in_single_precision(dtype):
    case = Case("batch", (8, 3, 5))
    x, (weight, _) = case.batch(dtype), case.parameters("float64")
    expected = Expected(case, x, x, weight)
    rounded = [s.astype(np.float32) for s in (expected.mean, expected.invstd)]
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, *rounded, weight)
    # Those of other statistics, to which the rounding of these has moved.
    exact = oracle.backward(x, x, *rounded, weight)
    found = bounds.Bounds("batch", x, *rounded, weight).of_gradients(x.astype(np.float64))
    for one, other, room in zip((dx, dweight, dbias), exact, found, strict=True):
        assert_near(one, other, room)


def test_the_biases_of_the_two_variances():
    x = np.array([[1.0], [2.0], [6.0]])
    running_mean, running_var = np.zeros(1), np.zeros(1)
    y = fastbn.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, eps=1e-300)
    assert running_var[0] == pytest.approx(x.var(ddof=1))
    assert y.std() == pytest.approx(1.0)
    assert running_mean[0] == pytest.approx(3.0)


def test_eps_is_inside_the_root():
    y = fastbn.batch_norm(np.full((1, 1), 3.0), np.ones(1), np.full(1, 3.0), eps=1.0)
    assert y[0, 0] == 1.0


def test_one_running_array_alone():
    x = batch((5, 2), "float32")
    for name in ("running_mean", "running_var"):
        running = np.zeros(2, np.float32)
        fastbn.batch_norm_forward(x, **{name: running})
        assert running.all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 0)])
def test_empty(dtype, shape):
    x = np.empty(shape, dtype)
    channels = shape[1]
    running_mean, running_var = np.full(channels, 3.0), np.full(channels, 4.0)
    y, mean, invstd = fastbn.batch_norm_forward(
        x, running_mean=running_mean, running_var=running_var
    )
    assert y.shape == shape
    assert (running_mean == 3).all()
    assert (running_var == 4).all()
    assert (mean == 0).all()
    assert np.isnan(invstd).all()
    y, mean, invstd = fastbn.batch_norm_forward(
        x, running_mean=running_mean, running_var=running_var, training=False, eps=0.0
    )
    assert (mean == 3).all()
    assert (invstd == 0.5).all()
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, mean, invstd)
    assert dx.shape == shape
    assert (dweight == 0).all()
    assert (dbias == 0).all()
    stats = fastbn.batch_stats(x)
    assert (stats.count == 0).all()
    assert (stats.mean == 0).all()
    assert np.isnan(stats.var()).all()


def test_a_single_value_can_be_normalised_with_running_statistics(dtype):
    y = fastbn.batch_norm(np.full((1, 2), 5, dtype), np.ones(2), np.ones(2), eps=0)
    assert (y == 4).all()


def test_broadcast_arrays_and_no_copy_of_them():
    row = batch((5,), "float32")
    x = np.broadcast_to(row, (7, 5))
    stats = fastbn.batch_stats(x)
    np.testing.assert_array_equal(stats.mean, row)
    np.testing.assert_array_equal(stats.m2, 0)
    everything = np.broadcast_to(np.float32(2.5), (3, 4, 6, 6))
    y, mean, _ = fastbn.batch_norm_forward(everything, bias=np.arange(4.0))
    assert (mean == 2.5).all()
    assert (y == np.arange(4.0)[:, None, None]).all()


def test_more_elements_than_an_int_counts():
    x = np.broadcast_to(np.arange(3, dtype=np.float32), (2**30 + 1, 3))
    stats = fastbn.batch_stats(x)
    assert (stats.count == 2**30 + 1).all()
    np.testing.assert_array_equal(stats.mean, np.arange(3))
    np.testing.assert_array_equal(stats.m2, 0)


def test_a_broadcast_plane_is_copied_once_for_all_images():
    x = np.broadcast_to(np.float32(1.5), (2**11, 2, 2**19 + 1))
    stats = fastbn.batch_stats(x)
    assert (stats.count == 2**11 * (2**19 + 1)).all()
    assert (stats.mean == 1.5).all()
    assert (stats.m2 == 0).all()
    row = np.broadcast_to(batch((2, 3, 1, 5), "float32"), (2, 3, 40, 5))
    for dy in (row, batch(row.shape, "float32", 1)):
        _, mean, invstd = fastbn.batch_norm_forward(row)
        expected = Expected(Case("batch", row.shape), row, dy)
        for arrays in ((dy, row), (dy.copy(), row.copy())):
            found = fastbn.batch_norm_backward(*arrays, mean, invstd)
            expected.assert_gradients(found, exact=False)


def test_what_runs_without_a_copy():
    # The slab of such a view cannot be told from a copy by values, but by memory.
    import tracemalloc

    x = batch((8, 16, 32, 32), "float32")
    nhwc = batch((8, 32, 32, 16), "float32")
    views = {
        "planes": x,
        "batch slice": x[::2],
        "channel slice": x[:, 2:9],
        "channels reversed": x[:, ::-1],
        "batch reversed": x[::-1],
        "fewer rows of a plane": x[:, :, :1],
        "NHWC memory": nhwc.transpose(0, 3, 1, 2),
        "NHWC batch slice": nhwc.transpose(0, 3, 1, 2)[::2],
        "NHWC batch reversed": nhwc.transpose(0, 3, 1, 2)[::-1],
        "NHWC channel slice": nhwc.transpose(0, 3, 1, 2)[:, 3:8],
        "Fortran": np.asfortranarray(x),
    }
    for name, view in views.items():
        out = np.empty_like(view)
        tracemalloc.start()
        fastbn.batch_norm(view, np.zeros(view.shape[1]), np.ones(view.shape[1]), out=out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < view.nbytes // 4, name
