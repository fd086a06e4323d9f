# SPDX-License-Identifier: BSD-3-Clause
"""One call of any operation of the family, so that a test of all of them is written once."""

import itertools
from dataclasses import dataclass

import bounds
import numpy as np
import oracle
from arrays import assert_near, batch

import fastbn
from fastbn import _dispatch

# All that the library has, and their numbers in fastbn.h. Their formulas are in oracle.py.
ACTIVATIONS = {
    "relu": 1, "leaky_relu": 2, "silu": 3, "relu6": 4, "hardswish": 5, "hardsigmoid": 6,
}  # fmt: skip
# Each once, every other one with a residual: where all that may follow would be too much.
EACH_ONCE = [(activation, k % 2 == 1) for k, activation in enumerate(ACTIVATIONS)]


@dataclass(frozen=True)
class Case:
    """An operation on x of a shape; `what` is its normalized_shape or num_groups."""

    op: str
    shape: tuple
    what: object = None
    layout: str | None = None

    def __str__(self):
        parts = [self.op, "x".join(map(str, self.shape))]
        if self.what is not None:
            parts.append("x".join(map(str, np.atleast_1d(self.what))))
        return "-".join([*parts, *filter(None, [self.layout])])

    @property
    def parameter_shape(self):
        if self.op in ("layer", "rms"):
            return tuple(int(n) for n in np.atleast_1d(self.what))
        return (self.shape[oracle.channel_axis(len(self.shape), self.layout)],)

    @property
    def statistics_shape(self):
        if self.op in ("layer", "rms"):
            return self.shape[: len(self.shape) - len(self.parameter_shape)]
        channels = self.parameter_shape[0]
        if self.op == "batch":
            return (channels,)
        n = self.shape[oracle.batch_axis(self.layout)]
        return (n, channels if self.op == "instance" else self.what)

    @property
    def values(self):
        """How many share a mean and a variance."""
        return int(np.prod(self.shape)) // int(np.prod(self.statistics_shape))

    @property
    def has_mean(self):
        return self.op != "rms"

    def _arguments(self, weight, bias, options):
        if self.op in ("layer", "rms", "group"):
            positional = [self.what, weight, bias] if self.has_mean else [self.what, weight]
        else:
            positional = [weight, bias]
        if self.layout is not None:
            options = options | {"layout": self.layout}
        return positional, options

    def forward(self, x, weight=None, bias=None, **options):
        """Return (y, list of what is saved for backward)."""
        positional, options = self._arguments(weight, bias, options)
        y, *saved = getattr(fastbn, f"{self.op}_norm_forward")(x, *positional, **options)
        return y, saved

    def only_y(self, x, weight=None, bias=None, **options):
        positional, options = self._arguments(weight, bias, options)
        if self.op in ("batch", "instance"):
            running = [options.pop(name, None) for name in ("running_mean", "running_var")]
            positional = running + positional
        if self.op == "batch":
            options = {"training": True} | options
        return getattr(fastbn, f"{self.op}_norm")(x, *positional, **options)

    def backward(self, dy, x, saved, weight=None, **options):
        """Return [dx, dweight, dbias], with a residual dresidual; rms norm has no dbias."""
        positional = [self.what, weight] if self.what is not None else [weight]
        if self.layout is not None:
            options["layout"] = self.layout
        return list(
            getattr(fastbn, f"{self.op}_norm_backward")(dy, x, *saved, *positional, **options)
        )

    def parameters(self, dtype, seed=3):
        rng = np.random.default_rng(seed)
        weight = rng.uniform(0.5, 1.5, self.parameter_shape).astype(dtype)
        return weight, rng.uniform(-1, 1, self.parameter_shape).astype(dtype)

    def batch(self, dtype, seed=0, mean=0.5, std=2.0):
        return batch(self.shape, dtype, seed, mean, std)

    def gradient(self, dtype):
        return self.batch(dtype, 1, 0.1, 1.0)


# Single rows to many axes, tiny planes to long ones, every number of groups, odd layouts.
SIBLINGS = [
    Case("layer", (4, 33), 33),
    Case("layer", (50,), 50),
    Case("layer", (5, 1), 1),
    Case("layer", (2, 3, 5, 7), (5, 7)),
    Case("layer", (3, 4, 14, 15), (4, 14, 15)),
    Case("layer", (6, 2, 40), (2, 40)),
    Case("layer", (9, 130, 131), (130, 131)),
    Case("layer", (40, 30, 17), 17),
    Case("rms", (4, 33), 33),
    Case("rms", (50,), 50),
    Case("rms", (5, 1), 1),
    Case("rms", (3, 4, 14, 15), (14, 15)),
    Case("rms", (2, 5, 6, 7), (5, 6, 7)),
    Case("rms", (40, 30, 17), 17),
    Case("group", (2, 6, 1, 1), 2),
    Case("group", (2, 64, 1, 1), 4),
    Case("group", (3, 12, 7, 7), 3),
    Case("group", (2, 8, 14, 14), 8),
    Case("group", (2, 8, 14, 14), 1),
    Case("group", (2, 8, 14, 14), 4),
    Case("group", (2, 6, 33, 32), 3),
    Case("group", (1, 4, 130, 131), 2),
    Case("group", (5, 20), 4),
    Case("group", (5, 20), 1),
    Case("group", (2, 48, 17), 16),
    Case("group", (2, 4, 3, 4, 5), 2),
    Case("group", (3, 7, 9, 30), 5, "NHWC"),
    Case("group", (2, 7, 9, 64), 2, "NHWC"),
    Case("group", (2, 11, 12), 12, "N...C"),
    Case("group", (12, 3, 5, 6), 4, "CNHW"),
    Case("group", (13, 4, 24), 6, "LNC"),
    Case("group", (5, 6, 3, 8), 2, "HWNC"),
    Case("instance", (3, 5, 7, 7)),
    Case("instance", (2, 9, 14, 14)),
    Case("instance", (4, 6, 33, 32)),
    Case("instance", (2, 3, 130, 131)),
    Case("instance", (2, 3, 2)),
    Case("instance", (2, 70, 9)),
    Case("instance", (3, 7, 9, 30), layout="NHWC"),
    Case("instance", (4, 50, 5), layout="N...C"),
    Case("instance", (6, 3, 5, 4), layout="CNHW"),
    Case("instance", (13, 4, 24), layout="LNC"),
    Case("instance", (5, 6, 3, 8), layout="HWNC"),
]


class Expected:
    """What the oracle says of one call, forward and backward, and how far off a result may be.

    `frozen` are the running statistics of a batch norm in inference; `fused` is what
    follows: `activation`, `negative_slope` and `residual`. `room_y` is for the statistics
    that forward computes, `rooms` of the gradients for exact ones.
    """

    def __init__(self, case, x, dy, weight=None, bias=None, eps=1e-5, frozen=None, **fused):
        self.case, self.x, self.dy, self.eps = case, x, dy, eps
        self.weight, self.bias = weight, bias if case.has_mean else None
        self.frozen, self.fused = frozen, fused
        self.where = {"what": case.what, "layout": case.layout}
        self.mean, var = frozen or oracle.moments(case.op, x, **self.where)
        self.var = var.astype(np.float64)
        self.invstd = np.asarray(1 / np.sqrt(self.var + eps))
        self.z = oracle.forward(
            case.op, x, self.mean, self.var, weight, self.bias, eps, **self.where
        )
        if self.adds:
            self.z = self.z + fused["residual"].astype(np.float64)
        self.y = oracle.activated(self.z, *self.activation)
        self.dz = dy.astype(np.float64) * oracle.slope(self.z, *self.activation)
        self.gradients = self.gradients_of(self.dz)

        self.room_z = self.bounds(exact=frozen is not None).of_z(self.z, self.adds)
        self.room_y = bounds.of_y(self.z, self.room_z, x.dtype, *self.activation)
        self.rooms = self.rooms_of(self.dz)
        for numbers in (self.y, self.room_y, *self.gradients, *self.rooms):
            assert np.isfinite(numbers).all()

    @property
    def adds(self):
        return self.fused.get("residual") is not None

    @property
    def activation(self):
        return self.fused.get("activation"), self.fused.get("negative_slope", 0.01)

    def bounds(self, exact=True):
        return bounds.Bounds(
            self.case.op, self.x, self.mean, self.invstd, self.weight, self.bias,
            **self.where, exact=exact,
        )  # fmt: skip

    def gradients_of(self, dz):
        """Of the parameters, too, and with a residual `dz` itself."""
        found = oracle.gradients(
            self.case.op, dz, self.x, self.mean, self.invstd, self.weight, self.frozen is None,
            **self.where,
        )  # fmt: skip
        return (*found, dz) if self.adds else found

    def rooms_of(self, dz, exact=True, given=False):
        """Of what `gradients_of` returns; with `given`, if dz is what backward has written."""
        of, of_dz = self.bounds(exact), 0.0
        if not given:
            of_z = of.of_z(self.z, self.adds)
            of_dz = bounds.of_dz(self.z, of_z, self.dy, self.x.dtype, *self.activation)
        dx, *rooms = of.of_gradients(dz, of_dz, self.frozen is not None)
        rooms = [room.reshape(self.case.parameter_shape) for room in rooms]
        return (dx, *rooms, of_dz) if self.adds else (dx, *rooms)

    def check(self):
        y = self.check_forward()
        return y, self.check_backward()

    def check_forward(self):
        case, x = self.case, self.x
        options = {"eps": self.eps} | self.fused
        if self.frozen:
            options |= zip(("running_mean", "running_var"), self.frozen, strict=True)
            options["training"] = False
        y, saved = case.forward(x, self.weight, self.bias, **options)
        assert y.dtype == x.dtype.name
        assert_near(y, self.y, self.room_y)
        assert case.only_y(x, self.weight, self.bias, **options).tobytes() == y.tobytes()
        for statistic in saved:
            assert statistic.dtype == np.float64
            assert statistic.shape == case.statistics_shape
        share = bounds.ORACLE if self.frozen else bounds.of_invstd(x.dtype)
        assert_near(saved[-1], self.invstd, share * self.invstd)
        if case.has_mean:
            room = 0.0 if self.frozen else bounds.of_mean(self.mean, self.var, x.dtype)
            assert_near(saved[0], self.mean.astype(np.float64), room)
        return y

    def check_backward(self):
        """With exact statistics; return dx."""
        case, x = self.case, self.x
        options = dict(self.fused)
        if self.frozen:
            options["training"] = False
        if self.fused and case.has_mean:
            options["bias"] = self.bias
        exact = [self.mean, self.invstd] if case.has_mean else [self.invstd]
        found = case.backward(self.dy, x, exact, self.weight, **options)
        self.assert_gradients(found)
        narrow = "float64" if x.dtype == np.float64 else "float32"
        dtype = narrow if self.weight is None else self.weight.dtype.name
        expected = [x.dtype.name, dtype, dtype] if case.has_mean else [x.dtype.name, dtype]
        assert [g.dtype for g in found] == expected + [x.dtype.name] * self.adds
        return found[0]

    def assert_gradients(self, found, exact=True, copies=1):
        """Raise unless what backward returns is near; `exact` if its statistics are.

        Its x may have been so many copies of this one: dx is that of one of them.
        """
        assert len(found) == (3 if self.case.has_mean else 2) + self.adds
        found, expected = list(found), self.gradients
        rooms = self.rooms if exact else self.rooms_of(self.dz, exact)
        if self.adds:
            dresidual = found.pop()
            assert_near(dresidual, self.dz, rooms[-1])
            if self.x.dtype.itemsize == 2:
                # The others are computed from what was written.
                dz = dresidual.astype(np.float64)
                expected, rooms = self.gradients_of(dz), self.rooms_of(dz, exact, given=True)
        assert_near(found[0], expected[0], rooms[0])
        for k in range(1, len(found)):
            assert_near(found[k], copies * expected[k], copies * rooms[k])

    def check_everywhere(self, threads=(1, 3)):
        for level, number in itertools.product(_dispatch.runnable(), threads):
            with _dispatch.using(level), fastbn.threads(number):
                try:
                    self.check()
                except AssertionError as error:
                    raise AssertionError(f"{self.case}, {level}, {number} threads") from error


class BatchNorm(Expected):
    """The same of all that batch norm has: inference, and statistics, with running ones."""

    def __init__(self, case, x, dy, kept):
        """`kept` is the dtype of the running statistics."""
        vectors = case.parameters(bounds.arithmetic(x.dtype))
        super().__init__(case, x, dy, *vectors)
        mean, var = case.parameters(kept, 4)
        self.running = mean, var + 2
        self.inference = Expected(case, x, dy, *vectors, frozen=self.running)

    def check(self):
        self.inference.check()
        self.check_statistics()
        y, dx = super().check()
        assert self.check_running(0.3).tobytes() == y.tobytes()
        return y, dx

    def check_statistics(self):
        stats = fastbn.batch_stats(self.x, layout=self.case.layout)
        np.testing.assert_array_equal(stats.count, self.case.values)
        assert stats.mean.dtype == stats.m2.dtype == np.float64
        assert_near(stats.mean, self.mean, bounds.of_mean(self.mean, self.var, self.x.dtype))
        assert_near(stats.var(), self.var, bounds.of_variance(self.x.dtype) * self.var)

    def check_running(self, momentum):
        """Return y."""
        n = self.case.values
        unbiased = self.var * n / (n - 1)
        new = [
            (self.mean, bounds.of_mean(self.mean, self.var, self.x.dtype)),
            (unbiased, bounds.of_variance(self.x.dtype) * unbiased),
        ]
        running = {
            name: array.copy()
            for name, array in zip(("running_mean", "running_var"), self.running, strict=True)
        }
        y, _ = self.case.forward(self.x, self.weight, self.bias, momentum=momentum, **running)
        for found, old, (exact, room) in zip(running.values(), self.running, new, strict=True):
            room = bounds.of_running(old, exact, room, momentum)
            assert_near(found, oracle.running(old, exact, momentum), room)
        return y
