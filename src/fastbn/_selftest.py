# SPDX-License-Identifier: BSD-3-Clause
"""Does this machine compute what all others do? SHA-256 of a fixed set of results per operation.

``python -m fastbn --selftest`` compares them with those of `_digests`, at every CPU level
that runs here, on one thread and on two. ``python -m fastbn._selftest`` prints a new
`_digests`. To add an operation: a function in `OPERATIONS`.

Inputs come from integers alone, so they never depend on a version of NumPy; there is no NaN
among the results, whose bits a CPU may choose; bytes are hashed in little-endian order.
May: call the public functions. May not: compute with anything but integers and powers of 2.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn import _digests, _dispatch, _threads
from fastbn._types import ACTIVATIONS

Array = np.ndarray[Any, Any]

# Significant binary digits of each dtype.
DIGITS = {"float32": 24, "float64": 53, "float16": 11, "bfloat16": 8}

# Every way in which a kernel walks through memory has a shape here.
SHAPES: tuple[tuple[tuple[int, ...], str], ...] = (
    ((9, 20, 7, 7), "NCHW"),  # a row is an image
    ((3, 8, 33, 32), "NCHW"),  # long runs
    ((2, 4, 190, 191), "NCHW"),  # more than a segment of them
    ((4, 14, 15, 64), "NHWC"),  # rows of pixels
    ((3, 13, 17, 6), "NHWC"),  # sixteen pixels a row
    ((3100, 24), "NC"),
)


def numbers(shape: tuple[int, ...], dtype: str, stream: int) -> Array:
    """Return exact numbers of [-1, 3), one in 97 of them 1024 times as large."""
    z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(stream << 32)
    # The constants of splitmix64 (S. Vigna); uint64 wraps around.
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    digits = DIGITS[dtype]
    integers = (z >> np.uint64(64 - digits)).astype(np.int64) - (1 << (digits - 2))
    x = np.ldexp(integers.astype(np.float64), 2 - digits)
    x[::97] *= 1024
    return x.reshape(shape).astype(dtype)


def integers_of(x: Array, dtype: str) -> Array:
    """Return integers of x's shape, from its bits."""
    parts = x.view(dtype).reshape(*x.shape, -1)
    return np.ascontiguousarray(parts[..., 0])


class Inputs(NamedTuple):
    """One batch and all that goes with it; parameters are float32."""

    x: Array
    dy: Array
    layout: str
    weight: Array
    bias: Array

    def running(self) -> tuple[Array, Array]:
        """Return new running statistics: a mean and a variance."""
        return self.bias * np.float32(0.5), np.abs(self.weight) + np.float32(1)


def inputs(dtype: str) -> Iterator[Inputs]:
    """Yield a batch of each shape."""
    for shape, layout in SHAPES:
        channels = (shape[layout.index("C")],)
        x, dy = (numbers(shape, dtype, stream) for stream in (1, 2))
        yield Inputs(
            x, dy, layout, numbers(channels, "float32", 3), numbers(channels, "float32", 4)
        )


def _stats(a: Inputs) -> list[Array]:
    stats = fastbn.batch_stats(a.x, layout=a.layout)
    merged = stats + fastbn.batch_stats(a.dy, layout=a.layout)
    return [stats.mean, stats.m2, merged.mean, merged.m2]


def _integers(a: Inputs) -> list[Array]:
    # The bits of a batch, as integers of each type. Sums as parts of 32 bits.
    results: list[Any] = []
    for dtype in ("uint8", "int8", "uint16", "int16"):
        x = a.x.reshape(-1, a.x.shape[-1]).view(dtype)
        found = fastbn.batch_stats(x) + fastbn.batch_stats(x[::-3], nodata=7)
        results += [found.count, found.mean, found.m2, found.min, found.max]
        sums = [*(found.sum or []), *(found.sum_of_squares or [])]
        results += [np.array([number >> shift & 0xFFFFFFFF for number in sums])
                    for shift in (0, 32, 64)]  # fmt: skip
    return results


def _normalized(a: Inputs) -> list[Array]:
    # To the dtype of the batch, of integers and of itself; and back.
    results: list[Array] = []
    mean, std = a.bias.astype(np.float64), np.abs(a.weight.astype(np.float64)) + 1
    turned = a.layout[::-1]
    for x, most in ((integers_of(a.x, "uint8"), 255.0), (integers_of(a.x, "int16"), 32767.0),
                    (a.x, 1.0)):  # fmt: skip
        y = fastbn.normalize(
            x, mean, std, layout=a.layout, out_layout=turned, max_value=most, dtype=a.x.dtype
        )
        results += [y]
        results += [
            fastbn.denormalize(
                y, mean, std, layout=turned, out_layout=a.layout, max_value=most, dtype=dtype
            )
            for dtype in ("uint8", "int16", "float32", "float64")
        ]
    return results


def _batch_forward(a: Inputs) -> list[Array]:
    mean, var = a.running()
    results = fastbn.batch_norm_forward(
        a.x, a.weight, a.bias, running_mean=mean, running_var=var, layout=a.layout
    )
    return [*results, mean, var]


def _batch_inference(a: Inputs) -> list[Array]:
    return [fastbn.batch_norm(a.x, *a.running(), a.weight, a.bias, layout=a.layout)]


def _batch_backward(a: Inputs) -> list[Array]:
    _, mean, invstd = fastbn.batch_norm_forward(a.x, layout=a.layout)
    results: list[Array] = []
    for training in (True, False):
        results += fastbn.batch_norm_backward(
            a.dy, a.x, mean, invstd, a.weight, training=training, layout=a.layout
        )
    return results


# What "fused" has always been made of; other activations have digests of their own.
FUSED = ("relu", "leaky_relu", "silu")


def _fused_options(a: Inputs, activations: Iterable[str]) -> Iterator[dict[str, Any]]:
    for activation in activations:
        yield {"activation": activation}
        yield {"activation": activation, "negative_slope": 0.25, "residual": a.dy}


def _batch_fused(a: Inputs, activations: Iterable[str] = FUSED) -> list[Array]:
    results: list[Array] = []
    for options in _fused_options(a, activations):
        options |= {"layout": a.layout}
        found = fastbn.batch_norm_forward(a.x, a.weight, a.bias, **options)
        results += found
        results += fastbn.batch_norm_backward(
            a.dy, a.x, *found[1:], a.weight, bias=a.bias, **options
        )
    return results


def _batch_in_place(a: Inputs) -> list[Array]:
    options: dict[str, Any] = {"activation": "leaky_relu", "layout": a.layout}
    weight = np.where(a.weight == 0, np.float32(1), a.weight)
    y, _, invstd = fastbn.batch_norm_forward(a.x, weight, a.bias, **options)
    return list(fastbn.batch_norm_backward_inplace(a.dy, y, invstd, weight, a.bias, **options))


def _fold(a: Inputs) -> list[Array]:
    # A linear layer, whose outputs are the channels.
    kernel = np.moveaxis(a.x, a.layout.index("C"), 0).reshape(len(a.weight), -1)
    layer = fastbn.fold_batch_norm(kernel, None, *a.running(), a.weight, a.bias, kernel_layout="OI")
    return [*layer, *fastbn.scale_shift(*a.running(), a.weight, a.bias)]


def _features(a: Inputs) -> tuple[int, ...]:
    return a.x.shape[-1:] if a.layout.endswith("C") else a.x.shape[1:]


def _layer_parameters(a: Inputs) -> tuple[Array, Array]:
    shape = _features(a)
    return numbers(shape, "float32", 5), numbers(shape, "float32", 6)


def _layer_forward(a: Inputs) -> list[Array]:
    return list(fastbn.layer_norm_forward(a.x, _features(a), *_layer_parameters(a)))


def _layer_backward(a: Inputs) -> list[Array]:
    _, mean, invstd = fastbn.layer_norm_forward(a.x, _features(a))
    weight, _ = _layer_parameters(a)
    return list(fastbn.layer_norm_backward(a.dy, a.x, mean, invstd, _features(a), weight))


def _layer_fused(a: Inputs, activations: Iterable[str] = FUSED) -> list[Array]:
    results: list[Array] = []
    weight, bias = _layer_parameters(a)
    for options in _fused_options(a, activations):
        found = fastbn.layer_norm_forward(a.x, _features(a), weight, bias, **options)
        results += found
        results += fastbn.layer_norm_backward(
            a.dy, a.x, *found[1:], _features(a), weight, bias=bias, **options
        )
    return results


def _rms_forward(a: Inputs) -> list[Array]:
    weight, _ = _layer_parameters(a)
    return list(fastbn.rms_norm_forward(a.x, _features(a), weight))


def _rms_backward(a: Inputs) -> list[Array]:
    _, invrms = fastbn.rms_norm_forward(a.x, _features(a))
    weight, _ = _layer_parameters(a)
    return list(fastbn.rms_norm_backward(a.dy, a.x, invrms, _features(a), weight))


def _group_forward(a: Inputs) -> list[Array]:
    return list(fastbn.group_norm_forward(a.x, 2, a.weight, a.bias, layout=a.layout))


def _group_backward(a: Inputs) -> list[Array]:
    _, mean, invstd = fastbn.group_norm_forward(a.x, 2, layout=a.layout)
    return list(fastbn.group_norm_backward(a.dy, a.x, mean, invstd, 2, a.weight, layout=a.layout))


def _instance_forward(a: Inputs) -> list[Array]:
    if a.x.ndim == 2:  # one value an instance
        return []
    mean, var = a.running()
    options: dict[str, Any] = {"running_mean": mean, "running_var": var, "layout": a.layout}
    results = fastbn.instance_norm_forward(a.x, a.weight, a.bias, **options)
    return [*results, mean, var]


def _instance_backward(a: Inputs) -> list[Array]:
    if a.x.ndim == 2:
        return []
    _, mean, invstd = fastbn.instance_norm_forward(a.x, layout=a.layout)
    return list(fastbn.instance_norm_backward(a.dy, a.x, mean, invstd, a.weight, layout=a.layout))


OPERATIONS: dict[str, Callable[[Inputs], list[Array]]] = {
    "batch statistics": _stats,
    "batch training": _batch_forward,
    "batch inference": _batch_inference,
    "batch backward": _batch_backward,
    "batch fused": _batch_fused,
    "batch in place": _batch_in_place,
    "batch folded": _fold,
    "layer forward": _layer_forward,
    "layer backward": _layer_backward,
    "layer fused": _layer_fused,
    "rms forward": _rms_forward,
    "rms backward": _rms_backward,
    "group forward": _group_forward,
    "group backward": _group_backward,
    "instance forward": _instance_forward,
    "instance backward": _instance_backward,
    "integers": _integers,
    "normalize": _normalized,
}
for _name in ACTIVATIONS:
    if _name is not None and _name not in FUSED:
        OPERATIONS[f"batch {_name}"] = partial(_batch_fused, activations=(_name,))
        OPERATIONS[f"layer {_name}"] = partial(_layer_fused, activations=(_name,))


def dtypes() -> list[str]:
    """Return the dtypes that can be had here: bfloat16 is that of ml_dtypes."""
    try:
        import ml_dtypes  # noqa: F401  It teaches NumPy the name.
    except ImportError:
        return [dtype for dtype in DIGITS if dtype != "bfloat16"]
    return list(DIGITS)


def digest(operation: str, batches: list[Inputs]) -> str:
    """Return the SHA-256 of an operation's results, in hexadecimal."""
    sha = hashlib.sha256()
    for batch in batches:
        for array in OPERATIONS[operation](batch):
            patterns = np.ascontiguousarray(array).view(f"u{array.itemsize}")
            sha.update(patterns.astype(f"<u{array.itemsize}").tobytes())
    return sha.hexdigest()


def compare(operation: str, dtype: str, batches: list[Inputs]) -> list[str]:
    """Return what differs from the published digest: at which level, on how many threads."""
    differs = []
    for level, threads in itertools.product(_dispatch.runnable(), (1, 2)):
        with _dispatch.using(level), fastbn.threads(threads):
            found = digest(operation, batches)
        if found != _digests.DIGESTS[dtype].get(operation):
            differs.append(f"{level}, {threads} threads: {found}")
    return differs


def main() -> bool:
    """Compare everything, print what was found; return whether all is as published."""
    ok = True
    _threads.always_parallel(True)
    try:
        for dtype in dtypes():
            batches = list(inputs(dtype))
            for operation in OPERATIONS:
                differs = compare(operation, dtype, batches)
                print(f"{dtype:9} {operation:18}", "DIFFERS" if differs else "ok", flush=True)
                print(*(f"    {line}\n" for line in differs), sep="", end="")
                ok = ok and not differs
    finally:
        _threads.always_parallel(False)
    levels = ", ".join(_dispatch.runnable())
    print(f"{'as published' if ok else 'NOT as published'}; levels {levels}; threads 1, 2")
    if "bfloat16" not in dtypes():
        print("without bfloat16: ml_dtypes is not installed")
    return ok


def publish() -> None:
    """Print `_digests` anew."""
    if "bfloat16" not in dtypes():
        raise SystemExit("needs ml_dtypes, for bfloat16")
    print("# SPDX-License-Identifier: BSD-3-Clause")
    print('"""What `_selftest` has to find. Printed by `python -m fastbn._selftest`; data only."""')
    print("\nDIGESTS = {")
    for dtype in DIGITS:
        batches = list(inputs(dtype))
        print(f'    "{dtype}": {{')
        for operation in OPERATIONS:
            print(f'        "{operation}": "{digest(operation, batches)}",')
        print("    },")
    print("}")


if __name__ == "__main__":
    publish()
