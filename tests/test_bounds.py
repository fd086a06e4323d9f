# SPDX-License-Identifier: BSD-3-Clause
"""The bounds themselves: that a fault in one channel, or one element, is beyond them."""

import bounds
import numpy as np
import oracle
import pytest
from arrays import half_ulp
from cases import BatchNorm, Case, Expected

import fastbn

# One of each kind of sum: of rows, of planes, over samples, over rows of features.
SUMMED = [
    Case("batch", (9000, 33)),
    Case("batch", (90, 7, 10, 10)),
    Case("instance", (90, 7, 10, 10)),
    Case("group", (90, 6, 10, 10), 2),
    Case("layer", (9000, 33), 33),
    Case("rms", (9000, 33), 33),
]


def expected_of(case, dtype="float32"):
    parameters = case.parameters(bounds.arithmetic(dtype))
    return Expected(case, case.batch(dtype), case.gradient(dtype), *parameters)


def spoil(monkeypatch, name, change):
    """Have a function change what it returns: `change` is called with that and the arguments."""
    function = getattr(fastbn, name)

    def spoiled(*arguments, **options):
        results = function(*arguments, **options)
        change(function, results, *arguments, **options)
        return results

    monkeypatch.setattr(fastbn, name, spoiled)


@pytest.mark.parametrize("rows", [100, 1])
@pytest.mark.parametrize(
    ("case", "which"),
    [(case, which) for case in SUMMED for which in (1, 2) if which == 1 or case.has_mean],
    ids=str,
)
def test_rows_that_one_channel_leaves_out_are_noticed(any_dtype, monkeypatch, case, which, rows):
    expected = expected_of(case, any_dtype)
    expected.check()

    def leave_out(backward, results, dy, *arguments, **options):
        dy = dy.copy()
        dy[: -(-rows * len(dy) // 9000)] = 0
        results[which][5] = backward(dy, *arguments, **options)[which][5]

    spoil(monkeypatch, f"{case.op}_norm_backward", leave_out)
    with pytest.raises(AssertionError, match=r"^1 of \d+ wrong, first at \(5,\)"):
        expected.check()


@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_each_gradient_has_a_room_of_its_own(any_dtype, case):
    expected = expected_of(case, any_dtype)
    found = [
        (number + room).astype(np.float64)
        for number, room in zip(expected.gradients, expected.rooms, strict=True)
    ][: 3 if case.has_mean else 2]
    expected.assert_gradients(found)
    for gradient, room in zip(found, expected.rooms[: len(found)], strict=True):
        at = np.unravel_index(np.argmin(room), room.shape)
        right = gradient[at]
        gradient[at] += 0.01 * room[at]
        with pytest.raises(AssertionError, match="1 of"):
            expected.assert_gradients(found)
        gradient[at] = right


def test_what_one_channel_holds_widens_no_other():
    case = Case("batch", (50, 4, 5))
    x, dy, parameters = case.batch("float32"), case.gradient("float32"), case.parameters("float32")
    first = Expected(case, x, dy, *parameters)
    x, dy, parameters = x.copy(), dy.copy(), [p.copy() for p in parameters]
    for array in (x[:, 2], dy[:, 2]):
        array *= 1e6
    for vector in parameters:
        vector[2] *= 1e6
    other = Expected(case, x, dy, *parameters)
    for one, two in zip((first.room_y, *first.rooms), (other.room_y, *other.rooms), strict=True):
        one, two = (np.moveaxis(room, 1 if room.ndim > 1 else 0, 0) for room in (one, two))
        np.testing.assert_array_equal(np.delete(one, 2, 0), np.delete(two, 2, 0))
        assert (two[2] > 100 * one[2]).all()


def nudge(array):
    """Move one number by a few units of float32, or of its own dtype."""
    at = (3, *(0 for _ in array.shape[1:]))
    size = np.abs(array[at].astype(np.float64))
    array[at] += (3 * half_ulp(size, array.dtype.name) + 1e-6 * max(1.0, size)).astype(array.dtype)


@pytest.fixture
def expected(any_dtype):
    case = Case("batch", (30, 5, 7))
    return BatchNorm(case, case.batch(any_dtype), case.gradient(any_dtype), "float64")


@pytest.mark.parametrize("which", [0, 1, 2], ids=["y", "mean", "invstd"])
def test_one_number_that_forward_gets_wrong_is_noticed(monkeypatch, expected, which):
    expected.check()
    spoil(monkeypatch, "batch_norm_forward", lambda _, results, *a, **o: nudge(results[which]))
    for call in (expected.check_forward, expected.inference.check_forward):
        with pytest.raises(AssertionError, match=r"^1 of"):
            call()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_running_statistic_that_is_wrong_is_noticed(monkeypatch, expected, name):
    spoil(monkeypatch, "batch_norm_forward", lambda _, results, *a, **o: nudge(o[name]))
    with pytest.raises(AssertionError, match=r"^1 of"):
        expected.check_running(0.3)


@pytest.mark.parametrize("name", ["mean", "m2"])
def test_a_statistic_that_is_wrong_is_noticed(monkeypatch, expected, name):
    spoil(monkeypatch, "batch_stats", lambda _, results, *a, **o: nudge(getattr(results, name)))
    with pytest.raises(AssertionError, match=r"^1 of"):
        expected.check_statistics()


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_what_is_said_of_activations(activation):
    follows = bounds.FOLLOWS[activation]
    z = np.linspace(-12, 12, 4001)
    for kink in oracle.ACTIVATIONS[activation].kinks:
        z = z[np.abs(z - kink) > 1e-3]
    rise = oracle.slope(z + 1e-5, activation) - oracle.slope(z - 1e-5, activation)
    assert (np.abs(rise) / 2e-5 <= follows.curved(z) + 1e-6).all()
    # In float32, as a kernel might compute it: within the roundings that it is said to take.
    single = z.astype(np.float32)
    exact = single.astype(np.float64)
    with np.errstate(under="ignore"):
        y = oracle.activated(single, activation).astype(np.float64)
        slope = oracle.slope(single, activation).astype(np.float64)
    room = bounds.of_y(exact, 0.0, "float32", activation) + half_ulp(np.abs(y), "float32")
    assert (np.abs(y - oracle.activated(exact, activation)) <= room).all()
    room = bounds.of_dz(exact, 0.0, np.ones_like(z), "float32", activation)
    assert (np.abs(slope - oracle.slope(exact, activation)) <= room + 2.0**-24).all()
