# SPDX-License-Identifier: BSD-3-Clause
"""Folding: a layer and its batch norm, and the one layer that stands for both."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

import fastbn

RNG = np.random.default_rng(11)


def parameters(channels, dtype="float64"):
    """Running mean and variance, weight, bias: the mean a hundred deviations from 0."""
    vectors = (
        RNG.uniform(90, 110, channels), RNG.uniform(0.5, 2, channels),
        RNG.uniform(0.5, 1.5, channels), RNG.uniform(-1, 1, channels),
    )  # fmt: skip
    return [v.astype(dtype) for v in vectors]


def convolve(x, kernel, bias, groups=1):
    """(N, I, ...) with (O, I / groups, ...), no padding."""
    axes = tuple(range(2, x.ndim))
    windows = sliding_window_view(x, kernel.shape[2:], axes)
    parts = [
        np.tensordot(w, k, [[1, *range(x.ndim, w.ndim)], [1, *axes]])
        for w, k in zip(np.split(windows, groups, 1), np.split(kernel, groups), strict=True)
    ]
    return np.moveaxis(np.concatenate(parts, -1) + bias, -1, 1)


def convolve_transposed(x, kernel, bias, groups=1):
    """(N, I, L) with (I, O / groups, K)."""
    length = x.shape[2] + kernel.shape[2] - 1
    parts = []
    for x_part, k in zip(np.split(x, groups, 1), np.split(kernel, groups), strict=True):
        y = np.zeros((len(x), k.shape[1], length))
        for i in range(k.shape[2]):
            y[:, :, i : i + x.shape[2]] += np.einsum("nil,io->nol", x_part, k[:, :, i])
        parts.append(y)
    return np.concatenate(parts, 1) + bias[:, None]


def folded(kernel, bias, vectors, last=False):
    """Folded as (O, I, ...); with `last`, through the layout (..., I, O)."""
    layout = "OI" + "LHWDT"[: kernel.ndim - 2]
    if not last:
        return fastbn.fold_batch_norm(kernel, bias, *vectors, kernel_layout=layout)
    moved = np.moveaxis(kernel, (0, 1), (-1, -2))
    moved, bias = fastbn.fold_batch_norm(moved, bias, *vectors, kernel_layout=layout[2:] + "IO")
    return np.moveaxis(moved, (-1, -2), (0, 1)), bias


@pytest.mark.parametrize("space", [(), (9,), (8, 9), (5, 6, 7)])
def test_convolutions_of_any_rank(space):
    kernel = RNG.standard_normal((6, 4, *(3,) * len(space)))
    x, bias = RNG.standard_normal((2, 4, *space)), RNG.standard_normal(6)
    vectors = parameters(6)
    before = fastbn.batch_norm(convolve(x, kernel, bias), *vectors)
    for last in (False, True):
        after = convolve(x, *folded(kernel, bias, vectors, last))
        np.testing.assert_allclose(after, before, atol=1e-11)


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(2, 4, 6), (4, 4, 4), (4, 4, 8)])
def test_groups_and_depthwise(groups, inputs, outputs):
    kernel = RNG.standard_normal((outputs, inputs // groups, 3, 2))
    x, bias = RNG.standard_normal((2, inputs, 7, 8)), RNG.standard_normal(outputs)
    vectors = parameters(outputs)
    before = fastbn.batch_norm(convolve(x, kernel, bias, groups), *vectors)
    after = convolve(x, *folded(kernel, bias, vectors), groups)
    np.testing.assert_allclose(after, before, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolutions(groups):
    kernel = RNG.standard_normal((8, 3, 5))
    x, bias = RNG.standard_normal((2, 8, 11)), RNG.standard_normal(3 * groups)
    vectors = parameters(3 * groups)
    before = fastbn.batch_norm(convolve_transposed(x, kernel, bias, groups), *vectors)
    one = fastbn.fold_batch_norm(kernel, bias, *vectors, kernel_layout="IOL")
    np.testing.assert_allclose(convolve_transposed(x, *one, groups), before, atol=1e-11)


def test_what_is_left_out_is_1_and_0():
    kernel = RNG.standard_normal((3, 2))
    mean, var, weight, bias = parameters(3)
    ones, zeros = np.ones(3), np.zeros(3)
    pairs = [
        ((kernel, None, mean, var), (kernel, zeros, mean, var, ones, zeros)),
        ((kernel, ones, mean, var, weight), (kernel, ones, mean, var, weight, zeros)),
        ((kernel, ones, mean, var, None, bias), (kernel, ones, mean, var, ones, bias)),
    ]
    for short, long in pairs:
        a = fastbn.fold_batch_norm(*short, kernel_layout="OI")
        b = fastbn.fold_batch_norm(*long, kernel_layout="OI")
        assert a[0].tobytes() == b[0].tobytes()
        assert a[1].tobytes() == b[1].tobytes()


def test_types_are_the_kernels_and_rounded_once(any_dtype):
    kernel = RNG.standard_normal((5, 3, 2)).astype(any_dtype)
    vectors = parameters(5, "float32")
    mean, var, weight, bias = (v.astype(np.float64) for v in vectors)
    old = kernel.copy()
    new, new_bias = fastbn.fold_batch_norm(kernel, None, *vectors, kernel_layout="OIL")
    scale = weight / np.sqrt(var + 1e-5)
    expected = (kernel.astype(np.float64) * scale[:, None, None]).astype(any_dtype)
    assert new.dtype == new_bias.dtype == kernel.dtype
    assert new.tobytes() == expected.tobytes()
    assert new_bias.tobytes() == (-mean * scale + bias).astype(any_dtype).tobytes()
    assert kernel.tobytes() == old.tobytes()


def test_scale_and_shift_are_batch_norm():
    x = RNG.standard_normal((4, 3, 5))
    vectors = parameters(3)
    scale, shift = fastbn.scale_shift(*vectors, 1e-3)
    assert scale.dtype == shift.dtype == np.float64
    y = x * scale[:, None] + shift[:, None]
    np.testing.assert_allclose(y, fastbn.batch_norm(x, *vectors, eps=1e-3), atol=1e-11)


def test_no_channels():
    none = np.zeros(0)
    kernel, bias = fastbn.fold_batch_norm(np.zeros((0, 3)), None, none, none, kernel_layout="OI")
    assert kernel.shape == (0, 3)
    assert bias.shape == (0,)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kernel": [[1.0]]}, TypeError, "kernel: expected a numpy.ndarray"),
        ({"kernel": np.ones((3, 2, 2, 2), int)}, TypeError, "kernel: .*int64"),
        ({"kernel": np.ones((4, 2, 2, 2))}, ValueError, r"kernel: expected 3 output channels"),
        ({"kernel": np.ones((3, 2))}, ValueError, r"kernel_layout: expected 2 distinct letters"),
        ({"kernel_layout": "NIHW"}, ValueError, "kernel_layout: .*'O'"),
        ({"kernel_layout": "OOHW"}, ValueError, "kernel_layout: "),
        ({"kernel_layout": None}, TypeError, "kernel_layout: .*None"),
        ({"kernel_bias": np.ones(2)}, ValueError, r"kernel_bias: expected shape \(3,\)"),
        ({"running_mean": None}, TypeError, "running_mean: .*None"),
        ({"running_mean": np.ones((3, 1))}, ValueError, r"running_mean: expected shape \(C,\)"),
        ({"running_var": None}, TypeError, "running_var: .*None"),
        ({"running_var": np.ones(2)}, ValueError, r"running_var: expected shape \(3,\)"),
        ({"weight": np.ones(4)}, ValueError, "weight: "),
        ({"bias": 1.0}, TypeError, "bias: "),
        ({"eps": -1.0}, ValueError, "eps: "),
    ],
)
def test_errors(changed, error, message):
    arguments = {
        "kernel": np.ones((3, 2, 2, 2)), "kernel_bias": None,
        "running_mean": np.ones(3), "running_var": np.ones(3),
    }  # fmt: skip
    with pytest.raises(error, match=f"^{message}"):
        fastbn.fold_batch_norm(**arguments | changed)
