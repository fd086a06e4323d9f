# SPDX-License-Identifier: BSD-3-Clause
"""Folding: a layer and the batch norm behind or before it, and the one layer for both."""

import itertools

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


def convolve_depthwise(x, kernel, bias):
    """(N, C, H, W) with (H, W, C, M): output c * M + m is channel c with kernel m."""
    height, width, channels, multiplier = kernel.shape
    windows = sliding_window_view(x, (height, width), (2, 3))
    y = [
        np.einsum("nyxhw,hw->nyx", windows[:, c], kernel[..., c, m]) + bias[c * multiplier + m]
        for c in range(channels)
        for m in range(multiplier)
    ]
    return np.stack(y, 1)


def to_nearest(values, dtype):
    """float64 rounded once to a dtype, also where ml_dtypes rounds twice."""
    if dtype == "bfloat16":
        step = np.maximum(np.frexp(values)[1] - 8, -133)
        values = np.ldexp(np.rint(np.ldexp(values, -step)), step)
    return values.astype(dtype)


def unshifted(channels):
    """Running mean and variance, weight, bias of a batch norm that adds nothing."""
    mean = RNG.integers(-9, 9, channels).astype(np.float64)
    ones = np.ones(channels)
    return [mean, 4 * ones, 2 * ones, mean.copy()]  # eps=0


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
    expected = to_nearest(kernel.astype(np.float64) * scale[:, None, None], any_dtype)
    assert new.dtype == new_bias.dtype == kernel.dtype
    assert new.tobytes() == expected.tobytes()
    assert new_bias.tobytes() == to_nearest(-mean * scale + bias, any_dtype).tobytes()
    assert kernel.tobytes() == old.tobytes()


def test_bfloat16_is_rounded_once():
    pytest.importorskip("ml_dtypes")
    near_ties = [1 + 2.0**-8 + s * 2.0**-k for k in range(9, 52) for s in (-1, 0, 1)]
    near_ties += [3 * v for v in near_ties] + [1 + 3 * (v - 1) for v in near_ties]
    scale = np.array([*near_ties, 0.0, 3.38e38, 3.4e38, 1e300, 1e-45, 3e-39, 9.2e-41, 4.6e-41])
    scale = np.concatenate([scale, -scale])
    kernel = np.ones((scale.size, 1), "bfloat16")
    zeros, ones = np.zeros(scale.size), np.ones(scale.size)
    new, _ = fastbn.fold_batch_norm(
        kernel, None, zeros, ones, scale, None, 0.0, kernel_layout="OI"
    )  # fmt: skip
    with np.errstate(over="ignore"):
        expected = to_nearest(scale, "bfloat16")
    np.testing.assert_array_equal(new[:, 0].astype(np.float64), expected.astype(np.float64))
    bias = np.array([np.inf, -np.inf, np.nan, 1.5])
    _, new_bias = fastbn.fold_batch_norm(
        kernel[:4], bias, zeros[:4], ones[:4], eps=0.0, kernel_layout="OI"
    )
    np.testing.assert_array_equal(new_bias.astype(np.float64), bias)


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
    for layout, shape, outputs in (
        ("OI", (3, 0), 3), ("OI", (0, 0), 0), ("HWIO", (3, 3, 0, 2), 2),
        ("IOHW", (0, 4, 1, 1), 4), ("HWCM", (3, 3, 0, 2), 0),
    ):  # fmt: skip
        kernel, bias = fastbn.fold_batch_norm_into_next(
            np.ones(shape), np.arange(float(outputs)), none, none, kernel_layout=layout
        )
        assert kernel.shape == shape
        assert bias.tolist() == list(range(outputs))
    kernel, bias = fastbn.fold_batch_norm(
        np.ones((3, 3, 0, 2)), None, none, none, kernel_layout="HWCM"
    )
    assert kernel.shape == (3, 3, 0, 2)
    assert bias.shape == (0,)


# ---- depthwise kernels of Keras and TensorFlow ---------------------------------------


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_kernels_of_any_order(multiplier):
    kernel = RNG.standard_normal((2, 3, 4, multiplier))
    x, bias = RNG.uniform(90, 110, (2, 4, 6, 7)), RNG.standard_normal(4 * multiplier)
    behind, before = parameters(4 * multiplier), parameters(4)
    for letters in itertools.permutations("HWCM"):
        layout = "".join(letters)
        order = ["HWCM".index(letter) for letter in layout]
        for vectors, fold, expected in (
            (behind, fastbn.fold_batch_norm,
             fastbn.batch_norm(convolve_depthwise(x, kernel, bias), *behind)),
            (before, fastbn.fold_batch_norm_into_next,
             convolve_depthwise(fastbn.batch_norm(x, *before), kernel, bias)),
        ):  # fmt: skip
            new, new_bias = fold(kernel.transpose(order), bias, *vectors, kernel_layout=layout)
            new = new.transpose(np.argsort(order))
            np.testing.assert_allclose(convolve_depthwise(x, new, new_bias), expected, atol=1e-10)


def test_a_depthwise_kernel_has_the_bits_of_the_one_in_groups():
    kernel = RNG.standard_normal((2, 3, 4, 3))
    grouped = kernel.transpose(2, 3, 0, 1).reshape(12, 1, 2, 3)
    for fold, vectors, options in (
        (fastbn.fold_batch_norm, parameters(12), {}),
        (fastbn.fold_batch_norm_into_next, parameters(4), {"groups": 4}),
    ):
        new, new_bias = fold(kernel, None, *vectors, kernel_layout="HWCM")
        other, other_bias = fold(grouped, None, *vectors, **options)
        assert new.transpose(2, 3, 0, 1).tobytes() == other.tobytes()
        assert new_bias.tobytes() == other_bias.tobytes()


@pytest.mark.parametrize("layout", ["OCMW", "COMW", "OXYZ"])
def test_beside_an_o_other_letters_mean_nothing(layout):
    kernel = RNG.standard_normal((4, 4, 4, 4))
    vectors = parameters(4)
    new, _ = fastbn.fold_batch_norm(kernel, None, *vectors, kernel_layout=layout)
    scale = np.moveaxis(np.broadcast_to(fastbn.scale_shift(*vectors)[0], kernel.shape), -1,
                        layout.index("O"))  # fmt: skip
    assert new.tobytes() == (kernel * scale).tobytes()


# ---- into the next layer --------------------------------------------------------------


@pytest.mark.parametrize("space", [(), (9,), (8, 9), (5, 6, 7)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_into_the_next_convolution(space, groups):
    kernel = RNG.standard_normal((8, 4 // groups, *(3,) * len(space)))
    x, bias = RNG.uniform(90, 110, (2, 4, *space)), RNG.standard_normal(8)
    vectors = parameters(4)
    expected = convolve(fastbn.batch_norm(x, *vectors), kernel, bias, groups)
    layout = "OI" + "LHWDT"[: len(space)]
    for kept in {layout, layout[2:] + "IO", "O" + layout[2:] + "I", layout[2:] + "OI"}:
        if kept == "IO" and groups > 1:
            continue  # transposed
        order = [layout.index(letter) for letter in kept]
        new, new_bias = fastbn.fold_batch_norm_into_next(
            kernel.transpose(order), bias, *vectors, kernel_layout=kept, groups=groups
        )
        new = new.transpose(np.argsort(order))
        np.testing.assert_allclose(convolve(x, new, new_bias, groups), expected, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_into_the_next_transposed_convolution(groups):
    x, bias = RNG.uniform(90, 110, (2, 8, 11)), RNG.standard_normal(3 * groups)
    for vectors, taps, eps in ((parameters(8), 1, 1e-5), (unshifted(8), 5, 0.0)):
        kernel = RNG.standard_normal((8, 3, taps))
        normal = fastbn.batch_norm(x, *vectors, eps=eps)
        expected = convolve_transposed(normal, kernel, bias, groups)
        one = fastbn.fold_batch_norm_into_next(
            kernel, bias, *vectors, eps, kernel_layout="IOL", groups=groups
        )
        np.testing.assert_allclose(convolve_transposed(x, *one, groups), expected, atol=1e-10)


def test_shifts_that_do_not_reach_all_outputs():
    kernel, vectors = RNG.standard_normal((6, 4, 3)), parameters(4)
    with pytest.raises(ValueError, match=r"^padded: .*got True and a shift of .* for channel 0"):
        fastbn.fold_batch_norm_into_next(kernel, None, *vectors, kernel_layout="OIL", padded=True)
    mean, var, weight, bias = unshifted(4)
    bias[2] += 0.5
    with pytest.raises(ValueError, match=r"^padded: .*True and a shift of 0.5 for channel 2"):
        fastbn.fold_batch_norm_into_next(
            kernel, None, mean, var, weight, bias, 0.0, kernel_layout="OIL", padded=True
        )
    transposed = kernel.swapaxes(0, 1)
    with pytest.raises(ValueError, match=r"^kernel: expected one tap .* taps \(3,\) .*'IOL'"):
        fastbn.fold_batch_norm_into_next(transposed, None, *vectors, kernel_layout="IOL")


def test_padding_with_zeros_where_nothing_is_added():
    kernel, vectors = RNG.standard_normal((6, 4, 3)), unshifted(4)
    x, bias = RNG.standard_normal((2, 4, 9)), RNG.standard_normal(6)

    def padded(x):
        return np.pad(x, ((0, 0), (0, 0), (1, 1)))

    expected = convolve(padded(fastbn.batch_norm(x, *vectors, eps=0.0)), kernel, bias)
    one = fastbn.fold_batch_norm_into_next(
        kernel, bias, *vectors, 0.0, kernel_layout="OIL", padded=True
    )
    np.testing.assert_allclose(convolve(padded(x), *one), expected, atol=1e-12)


def test_what_goes_into_the_next_layer_is_rounded_once(any_dtype):
    kernel = RNG.standard_normal((6, 2, 3, 3)).astype(any_dtype)
    old_bias = RNG.standard_normal(6).astype(any_dtype)
    vectors = parameters(4, "float32")
    scale, shift = (v.reshape(2, 1, 2, 1, 1) for v in fastbn.scale_shift(*vectors))
    wide = kernel.astype(np.float64).reshape(2, 3, 2, 3, 3)
    expected = to_nearest((wide * scale).reshape(kernel.shape), any_dtype)
    added = old_bias.astype(np.float64) + (wide * shift).sum((2, 3, 4)).reshape(6)
    for kept in (kernel, np.asfortranarray(kernel), np.repeat(kernel, 2, 3)[..., ::2],
                 np.ascontiguousarray(kernel[::-1])[::-1]):  # fmt: skip
        kept.flags.writeable = False
        before = kept.tobytes()
        new, new_bias = fastbn.fold_batch_norm_into_next(kept, old_bias, *vectors, groups=2)
        assert new.dtype == new_bias.dtype == any_dtype
        assert new.tobytes() == expected.tobytes()
        assert new_bias.tobytes() == to_nearest(added, any_dtype).tobytes()
        assert not np.shares_memory(new, kept)
        assert kept.tobytes() == before


def test_what_is_left_out_before_the_next_layer_is_1_and_0():
    kernel = RNG.standard_normal((3, 2))
    mean, var, *_ = parameters(2)
    zeros, ones = np.zeros(2), np.ones(2)
    a = fastbn.fold_batch_norm_into_next(kernel, None, mean, var, kernel_layout="OI")
    b = fastbn.fold_batch_norm_into_next(
        kernel, np.zeros(3), mean, var, ones, zeros, 1e-5, kernel_layout="OI"
    )
    for one, other in zip(a, b, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kernel": [[1.0]]}, TypeError, "kernel: expected a numpy.ndarray"),
        ({"kernel": np.ones((4, 2, 2, 2), int)}, TypeError, "kernel: .*int64"),
        ({"kernel": np.ones((4, 3, 2, 2))}, ValueError, "kernel: expected 4 input .* got 6"),
        ({"kernel": np.ones((5, 2, 2, 2))}, ValueError, "groups: .*5 output channels .*got 2"),
        ({"kernel": np.ones((4, 2))}, ValueError, "kernel_layout: expected 2 distinct letters"),
        ({"kernel_layout": "OWHN"}, ValueError, "kernel_layout: .*one 'O' and one 'I'"),
        ({"kernel_layout": "OCMW"}, ValueError, "kernel_layout: "),
        ({"kernel_layout": "ICMW"}, ValueError, "kernel_layout: "),
        ({"kernel_layout": "OIHH"}, ValueError, "kernel_layout: "),
        ({"kernel_layout": "OIH."}, ValueError, "kernel_layout: "),
        ({"kernel_layout": None}, TypeError, "kernel_layout: .*None"),
        ({"kernel_layout": "HWCM"}, ValueError, "groups: expected 1, since 'HWCM' is .*got 2"),
        ({"kernel_layout": "HWCM", "groups": 1}, ValueError, "kernel: expected 4 input .*got 2"),
        ({"kernel_layout": "IOHW"}, ValueError, "kernel: expected one tap"),
        ({"kernel_layout": "IOHW", "groups": 3}, ValueError, "groups: .*4 input channels .*got 3"),
        ({"groups": 0}, ValueError, "groups: .*got 0"),
        ({"groups": -2}, ValueError, "groups: .*got -2"),
        ({"groups": 2.0}, TypeError, "groups: "),
        ({"groups": True}, TypeError, "groups: "),
        ({"groups": 4}, ValueError, "kernel: expected 4 input .* got 8"),
        ({"padded": 1}, TypeError, "padded: "),
        ({"padded": True}, ValueError, "padded: .*shift of"),
        ({"kernel_bias": np.ones(2)}, ValueError, r"kernel_bias: expected shape \(4,\)"),
        ({"running_mean": None}, TypeError, "running_mean: .*None"),
        ({"running_var": np.ones(2)}, ValueError, r"running_var: expected shape \(4,\)"),
        ({"weight": np.ones(5)}, ValueError, "weight: "),
        ({"bias": 1.0}, TypeError, "bias: "),
        ({"eps": -1.0}, ValueError, "eps: "),
    ],
)
def test_errors_before_the_next_layer(changed, error, message):
    arguments = {
        "kernel": np.ones((4, 2, 2, 2)), "kernel_bias": None,
        "running_mean": np.ones(4), "running_var": np.ones(4), "groups": 2,
    }  # fmt: skip
    with pytest.raises(error, match=f"^{message}"):
        fastbn.fold_batch_norm_into_next(**arguments | changed)


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
        ({"kernel_layout": "HWCN"}, ValueError, "kernel_layout: .*one 'O', or one 'C' and one 'M'"),
        ({"kernel_layout": "ICMW"}, ValueError, "kernel_layout: "),
        ({"kernel_layout": "HWCM"}, ValueError, r"kernel: expected 3 output channels.* got 4"),
        ({"kernel_layout": "IOHW"}, ValueError, r"kernel: expected 3 output channels.* got 2"),
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
