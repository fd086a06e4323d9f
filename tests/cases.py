# SPDX-License-Identifier: BSD-3-Clause
"""One call of any operation of the family, so that a test of all of them is written once."""

import itertools
from dataclasses import dataclass

import numpy as np
import oracle
from arrays import assert_near, batch

import fastbn
from fastbn import _dispatch

# All that the library has, and their numbers in fastbn.h. Their formulas are in oracle.py.
ACTIVATIONS = {"relu": 1, "leaky_relu": 2, "silu": 3, "relu6": 4}
# Each once, every other one with a residual: where all that may follow would be too much.
EACH_ONCE = [(activation, k % 2 == 1) for k, activation in enumerate(ACTIVATIONS)]
# Of float32 arithmetic, absolute, on data of about unit size; and of statistics, relative.
TOLERANCE = {"float16": 5e-6, "bfloat16": 5e-6, "float32": 5e-6, "float64": 1e-13}
ROOM = {"float16": 3e-7, "bfloat16": 3e-7, "float32": 3e-7, "float64": 1e-14}


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
    follows: `activation`, `negative_slope` and `residual`.
    """

    def __init__(self, case, x, dy, weight=None, bias=None, eps=1e-5, frozen=None, **fused):
        self.case, self.x, self.dy, self.eps = case, x, dy, eps
        self.weight, self.bias = weight, bias if case.has_mean else None
        self.frozen, self.fused = frozen, fused
        op, where = case.op, {"what": case.what, "layout": case.layout}
        self.mean, var = frozen or oracle.moments(op, x, **where)
        var = var.astype(np.float64)
        self.invstd = np.asarray(1 / np.sqrt(var + eps))
        self.z = oracle.forward(op, x, self.mean, var, weight, self.bias, eps, **where)
        if self.adds:
            self.z = self.z + fused["residual"].astype(np.float64)
        activation = fused.get("activation"), fused.get("negative_slope", 0.01)
        self.y = oracle.activated(self.z, *activation)
        dz = dy.astype(np.float64) * oracle.slope(self.z, *activation)
        self.gradients = self.gradients_of(dz)

        tolerance, self.room = TOLERANCE[x.dtype.name], ROOM[x.dtype.name]
        largest = 1.0 if weight is None else float(np.abs(weight.astype(np.float64)).max())
        self.room_y = tolerance * (largest + 0.5)
        seen, reduced, varying = oracle.see(op, x, **where)
        mean, invstd = (np.expand_dims(v, reduced) for v in (self.mean, self.invstd))
        # Of few values dx is a difference that cancels, times invstd.
        room = tolerance * (1 + invstd * largest * (4 if case.values < 8 else 1))
        room_dx = oracle.unsee(np.broadcast_to(room, seen.shape), op, x, case.layout)
        # A sum errs by a share of all that is added.
        others = tuple(i for i in range(seen.ndim) if i not in varying)
        size = tolerance * np.abs(oracle.see(op, dy, **where)[0])
        rooms = (size * (1 + np.abs(seen - mean) * invstd)).sum(others), size.sum(others)
        self.rooms = room_dx, *(room.reshape(case.parameter_shape) for room in rooms)
        if activation[0] == "silu":
            # The slope of one place in y; in dz it is another term that errs.
            self.room_y *= 1.1
            self.rooms = tuple(2 * room for room in self.rooms)
        if self.adds:
            self.rooms += ((tolerance + self.room_y) * np.abs(dy.astype(np.float64)),)

    @property
    def adds(self):
        return self.fused.get("residual") is not None

    def gradients_of(self, dz):
        """Of the parameters, too, and with a residual `dz` itself."""
        where = {"what": self.case.what, "layout": self.case.layout}
        found = oracle.gradients(
            self.case.op, dz, self.x, self.mean, self.invstd, self.weight, self.frozen is None,
            **where,
        )  # fmt: skip
        return (*found, dz) if self.adds else found

    def check(self):
        case, x = self.case, self.x
        options, backward = {"eps": self.eps} | self.fused, dict(self.fused)
        if self.frozen:
            options |= zip(("running_mean", "running_var"), self.frozen, strict=True)
            options["training"] = backward["training"] = False
        if self.fused and case.has_mean:
            backward["bias"] = self.bias
        y, saved = case.forward(x, self.weight, self.bias, **options)
        assert y.dtype == x.dtype.name
        assert_near(y, self.y, self.room_y)
        assert case.only_y(x, self.weight, self.bias, **options).tobytes() == y.tobytes()
        for statistic in saved:
            assert statistic.dtype == np.float64
            assert statistic.shape == case.statistics_shape
        np.testing.assert_allclose(saved[-1], self.invstd, rtol=self.room)
        if case.has_mean:
            np.testing.assert_allclose(saved[0], self.mean, rtol=0, atol=10 * self.room)

        exact = [self.mean, self.invstd] if case.has_mean else [self.invstd]
        gradients = case.backward(self.dy, x, exact, self.weight, **backward)
        expected, rooms = list(self.gradients), list(self.rooms)
        if self.adds:
            # In x's dtype, and what the others are then computed from.
            assert gradients[-1].dtype == x.dtype.name
            assert_near(gradients[-1], expected.pop(), rooms.pop())
            if x.dtype.itemsize == 2:
                expected = self.gradients_of(gradients[-1].astype(np.float64))[:-1]
        assert len(gradients) == (3 if case.has_mean else 2) + self.adds
        narrow = "float64" if x.dtype == np.float64 else "float32"
        dtype = narrow if self.weight is None else self.weight.dtype.name
        for k, gradient in enumerate(gradients[: len(gradients) - self.adds]):
            assert gradient.dtype == (dtype if k else x.dtype.name)
            assert_near(gradient, expected[k], rooms[k])
        return y, gradients[0]

    def check_everywhere(self, threads=(1, 3)):
        for level, number in itertools.product(_dispatch.runnable(), threads):
            with _dispatch.using(level), fastbn.threads(number):
                try:
                    self.check()
                except AssertionError as error:
                    raise AssertionError(f"{self.case}, {level}, {number} threads") from error
