# SPDX-License-Identifier: BSD-3-Clause
"""Ghost batches: one call for each slice, and nothing else."""

import numpy as np
import pytest
from arrays import batch, in_order

import fastbn
from fastbn.functional import ghost

CASES = [
    ((7, 3, 4, 5), None, 2),
    ((6, 5), None, 3),
    ((8, 3, 4), None, 20),
    ((5, 4, 4, 3), "NHWC", 2),
    ((4, 6, 3), "N...C", 1),
    ((3, 7, 6), "CHN", 4),
    ((40, 2, 33, 32), None, 16),
]


def bits(*arrays):
    return [np.ascontiguousarray(a).tobytes() for a in arrays]


def parts_of(x, layout, size):
    axis = 0 if layout in (None, "N...C") else layout.index("N")
    for start in range(0, x.shape[axis], size):
        yield (slice(None),) * axis + (slice(start, start + size),)


def channels_of(shape, layout):
    return shape[1 if layout is None else -1 if layout == "N...C" else layout.index("C")]


@pytest.mark.parametrize(("shape", "layout", "size"), CASES)
@pytest.mark.parametrize("fused", [False, True])
def test_bits_are_those_of_the_slices(level, dtype, shape, layout, size, fused):
    c = channels_of(shape, layout)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(1, 0.3, (2, c)).astype("float32")
    x, dy, residual = (batch(shape, dtype, seed) for seed in range(3))
    options = {"layout": layout} | ({"activation": "silu"} if fused else {})
    adds = {"residual": residual} if fused else {}
    mean, var = np.zeros(c, "float32"), np.ones(c, "float32")
    ours, theirs = (mean.copy(), var.copy()), (mean.copy(), var.copy())
    y, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=ours[0], running_var=ours[1], ghost_batch_size=size,
        **options, **adds,
    )  # fmt: skip
    found = fastbn.batch_norm_backward(
        dy, x, mean, invstd, weight, bias=bias, ghost_batch_size=size, **options, **adds
    )
    slices = [*parts_of(x, layout, size)]
    assert mean.shape == invstd.shape == (len(slices), c)
    sums = np.zeros((2, c))
    for i, part in enumerate(slices):
        more = {"residual": residual[part]} if fused else {}
        one = fastbn.batch_norm_forward(
            x[part], weight, bias, running_mean=theirs[0], running_var=theirs[1], **options, **more
        )
        assert bits(y[part], mean[i], invstd[i]) == bits(*one)
        dx, dweight, dbias, *rest = fastbn.batch_norm_backward(
            dy[part], x[part], *one[1:], weight, bias=bias, **options, **more
        )
        assert bits(found[0][part]) == bits(dx)
        sums += dweight, dbias
        if fused:
            assert bits(found[3][part]) == bits(*rest)
    assert bits(*found[1:3]) == bits(*sums.astype("float32"))
    assert bits(*ours) == bits(*theirs)
    assert bits(fastbn.batch_norm(
        x, None, None, weight, bias, True, ghost_batch_size=size, **options, **adds
    )) == bits(y)  # fmt: skip


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_past_the_cache_which_slices_fit_in(layout):
    shape = (8, 30, 111, 113) if layout == "NCHW" else (8, 111, 113, 30)
    x, dy = (batch(shape, "float32", seed) for seed in range(2))
    weight, bias = np.linspace(0.5, 1.5, 30), np.linspace(-1, 1, 30)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, layout=layout, ghost_batch_size=3)
    dx, *_ = fastbn.batch_norm_backward(
        dy, x, mean, invstd, weight, layout=layout, ghost_batch_size=3
    )
    for i, part in enumerate(parts_of(x, layout, 3)):
        one = fastbn.batch_norm_forward(x[part], weight, bias, layout=layout)
        assert bits(y[part], mean[i], invstd[i]) == bits(*one)
        of_x, *_ = fastbn.batch_norm_backward(dy[part], x[part], *one[1:], weight, layout=layout)
        assert bits(dx[part]) == bits(of_x)


@pytest.mark.parametrize("order", ["F", "sliced", "cropped", "reversed", "channels last"])
def test_memory_orders_and_places(order, half):
    x = in_order(batch((5, 3, 4, 4), half), order)
    slices = [fastbn.batch_norm(x[i : i + 2], None, None, training=True) for i in (0, 2, 4)]
    for out in (None, np.empty(x.shape, x.dtype), x.copy(order="K")):
        given = out if out is not None and (out == x).all() else x
        y = fastbn.batch_norm(given, None, None, training=True, ghost_batch_size=2, out=out)
        assert out is None or y is out
        assert bits(y) == bits(np.concatenate(slices))


def test_guards_are_by_slice():
    x = batch((6, 3, 4), "float32")
    x[3, 1] = np.nan
    ours, theirs = ([np.zeros(3), np.ones(3)] for _ in range(2))
    fastbn.batch_norm(x, *ours, training=True, ghost_batch_size=2, on_nonfinite="skip",
                      unbiased=False)  # fmt: skip
    for i in (0, 2, 4):
        fastbn.batch_norm(x[i : i + 2], *theirs, training=True, on_nonfinite="skip",
                          unbiased=False)  # fmt: skip
    assert bits(*ours) == bits(*theirs)
    before = bits(*ours)
    with pytest.raises(FloatingPointError, match=r"\[1\]"):
        fastbn.batch_norm(x, *ours, training=True, ghost_batch_size=2, on_nonfinite="raise")
    assert bits(*ours) == before


@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize("track", ["average", "pooled"])
def test_the_layer(momentum, track):
    x, dy = batch((5, 3, 4, 4), "float32"), batch((5, 3, 4, 4), "float32", 1)
    options = {"momentum": momentum, "track": track, "on_nonfinite": "skip"}
    bn, other = fastbn.BatchNorm(3, ghost_batch_size=2, **options), fastbn.BatchNorm(3, **options)
    y = bn(x)
    dx = bn.backward(dy)
    parts, grads = [], np.zeros(3)
    for i in (0, 2, 4):
        parts.append((other(x[i : i + 2]), other.backward(dy[i : i + 2])))
        grads += other.weight_grad
    assert bits(y, dx) == bits(*(np.concatenate(p) for p in zip(*parts, strict=True)))
    assert bits(bn.weight_grad) == bits(grads.astype("float32"))
    for name, value in bn.state_dict().items():
        assert bits(value) == bits(other.state_dict()[name])
    assert bits(bn.eval()(x)) == bits(other.eval()(x))
    # Fixed statistics have no slices.
    assert bits(bn.freeze().train()(x)) == bits(other(x) * 0 + bn.eval()(x))


def test_what_is_refused():
    x = batch((5, 3), "float32")
    mean, var = np.zeros(3), np.ones(3)
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match="ghost_batch_size: expected slices of more than one"):
        fastbn.batch_norm(x, mean, var, training=True, ghost_batch_size=2, out=out)
    with pytest.raises(ValueError, match="ghost_batch_size: expected slices of more than one"):
        fastbn.BatchNorm(3, ghost_batch_size=1)(x)
    _, m, s = fastbn.batch_norm_forward(x[:4], ghost_batch_size=2)
    with pytest.raises(ValueError, match=r"^mean: expected shape \(2, 3\), got \(3,\)"):
        fastbn.batch_norm_backward(x[:4], x[:4], m[0], s, ghost_batch_size=2)
    with pytest.raises(ValueError, match="ghost_batch_size: expected slices of more than one"):
        fastbn.batch_norm_backward(x, x, m, s, ghost_batch_size=2)
    with pytest.raises(ValueError, match="layout: expected an 'N'"):
        fastbn.batch_norm(x, mean, var, training=True, layout="HC", ghost_batch_size=2)
    # One slice further: each slice is apart from its own, and not from the next.
    wide = batch((6, 3, 4), "float32")
    before = wide.copy()
    with pytest.raises(ValueError, match="out: expected x itself or memory apart"):
        fastbn.batch_norm(wide[:4], mean, var, training=True, ghost_batch_size=2, out=wide[2:])
    table = np.zeros((6, 3))
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        fastbn.batch_norm_backward(
            np.zeros((4, 3)), np.zeros((4, 3)), table[:2], table[4:], ghost_batch_size=2,
            out=table[1:5],
        )  # fmt: skip
    assert bits(wide) == bits(before)
    assert (out == 7).all()
    assert bits(mean, var) == bits(np.zeros(3), np.ones(3))


def test_an_interrupted_call_moves_nothing(monkeypatch):
    real, calls = ghost.binding.batch_forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the check, a slice, and this one
            raise KeyboardInterrupt
        return real(*arguments)

    class Binding:
        batch_forward = staticmethod(interrupted)

        def __getattr__(self, name):
            return getattr(ghost.binding, name)

    monkeypatch.setattr("fastbn.functional.batch.binding", Binding())
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(KeyboardInterrupt):
        fastbn.batch_norm(batch((6, 3), "float32"), mean, var, training=True, ghost_batch_size=2)
    assert bits(mean, var) == bits(np.zeros(3), np.ones(3))
