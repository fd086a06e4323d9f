# SPDX-License-Identifier: BSD-3-Clause
"""How each library carries out one case, prepared as well as it can be.

Whatever can be done beforehand is done beforehand: sessions, compilation, pointers,
tensors that share the arrays' memory. A library without the operation, the dtype or
the layout yields nothing. Where a library has both, its normal call, which returns a
new tensor, and one that writes to an existing tensor are two contenders.
"""

from __future__ import annotations

import ctypes
import timeit
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

import fastbn
from benchmarks import native
from benchmarks.cases import EPS, MOMENTUM, SMALL, Arrays
from fastbn import _dispatch, _threads


@dataclass
class Contender:
    """`run(count)` calls `count` times and returns the seconds that took."""

    name: str
    kind: str  # "copy"; "fastbn", the best level first; "fastbn new"; "peer"; "other"
    run: Callable[[int], float]
    result: Callable[[], np.ndarray]  # of the last call, stored like x
    own_threads: bool = False  # its threads are not OpenMP's


def python_calls(function: Callable[[], object]) -> Callable[[int], float]:
    return timeit.Timer(function).timeit


def c_calls(function: Callable[[int], object]) -> Callable[[int], float]:
    def run(count: int) -> float:
        start = timeit.default_timer()
        function(count)
        return timeit.default_timer() - start

    return run


def copy_contenders(a: Arrays) -> Iterator[Contender]:
    library = native.copies()
    source, to = ctypes.c_void_p(a.x.ctypes.data), ctypes.c_void_p(a.y.ctypes.data)
    size, threads = ctypes.c_size_t(a.x.nbytes), ctypes.c_int(a.case.threads)
    for streaming, name in enumerate(("copy", "copy, streaming stores")):

        def function(count: int, streaming: int = streaming) -> None:
            library.copy(source, to, size, streaming, threads, count)

        yield Contender(name, "copy", c_calls(function), lambda: a.y)
    yield Contender("np.copyto", "copy", python_calls(lambda: np.copyto(a.y, a.x)), lambda: a.y)


def fastbn_contenders(a: Arrays, levels: tuple[str, ...]) -> Iterator[Contender]:
    """Each CPU level with ``out=``, and the best one with a new array for each call."""
    fastbn.set_num_threads(a.case.threads)
    layout = a.fastbn_layout
    mean, var = a.moments
    invstd = 1 / np.sqrt(var + EPS)
    vectors = a.running_mean, a.running_var, a.weight, a.bias

    def calls(out: np.ndarray | None) -> dict[str, Callable[[], object]]:
        return {
            "inference": lambda: fastbn.batch_norm(a.x, *vectors, layout=layout, out=out),
            "training": lambda: fastbn.batch_norm(
                a.x, *vectors, training=True, layout=layout, out=out
            ),
            "backward": lambda: fastbn.batch_norm_backward(
                a.dy, a.x, mean, invstd, a.weight, layout=layout, out=out
            )[0],
        }

    def at_level(level: str, function: Callable[[], object]) -> Callable[[int], float]:
        run = python_calls(function)

        def switched(count: int) -> float:
            _threads.always_parallel(False)  # forgets what other lanes' teams were like
            with _dispatch.using(level):
                return run(count)

        return switched

    existing, fresh = calls(a.y)[a.case.op], calls(None)[a.case.op]
    for level in levels:
        name = f"fastbn {level}"
        yield Contender(name, "fastbn", at_level(level, existing), lambda: a.y)
    run = at_level(levels[0], fresh)

    def result() -> np.ndarray:
        with _dispatch.using(levels[0]):
            return fresh()

    yield Contender("fastbn, new array", "fastbn new", run, result)


def numpy_contenders(a: Arrays) -> Iterator[Contender]:
    """The formula, with existing arrays for everything large."""
    scratch = np.empty_like(a.x)
    weight, bias, running_mean, running_var = (
        a.along(vector) for vector in (a.weight, a.bias, a.running_mean, a.running_var)
    )
    mean = a.x.mean(a.reduced, keepdims=True)
    invstd = 1 / np.sqrt(a.x.var(a.reduced, keepdims=True) + EPS)
    count = a.x.size / a.weight.size

    def inference() -> None:
        scale = weight / np.sqrt(running_var + EPS)
        np.multiply(a.x, scale, out=a.y)
        np.add(a.y, bias - running_mean * scale, out=a.y)

    def training() -> None:
        mean = a.x.mean(a.reduced, keepdims=True)
        np.subtract(a.x, mean, out=a.y)
        var = np.square(a.y, out=scratch).mean(a.reduced, keepdims=True)
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * count / (count - 1)
        np.multiply(a.y, weight / np.sqrt(var + EPS), out=a.y)
        np.add(a.y, bias, out=a.y)

    def backward() -> None:
        np.subtract(a.x, mean, out=scratch)
        np.multiply(scratch, invstd, out=scratch)
        dbias = a.dy.sum(a.reduced, keepdims=True)
        dweight = np.multiply(a.dy, scratch, out=a.y).sum(a.reduced, keepdims=True)
        np.multiply(scratch, dweight / count, out=scratch)
        np.subtract(a.dy, scratch, out=a.y)
        np.subtract(a.y, dbias / count, out=a.y)
        np.multiply(a.y, weight * invstd, out=a.y)

    function = {"inference": inference, "training": training, "backward": backward}[a.case.op]
    yield Contender("NumPy", "peer", python_calls(function), lambda: a.y)


def torch_contenders(a: Arrays) -> Iterator[Contender]:
    import torch

    torch.set_num_threads(a.case.threads)
    torch.set_grad_enabled(False)

    def tensor(stored: np.ndarray) -> torch.Tensor:
        # Channels second, which in memory they need not be: PyTorch's channels_last.
        t = torch.from_numpy(stored)
        if a.channel_axis == 1:
            return t
        if t.ndim == 3:  # it has no such format for (N, C, L), but (N * L, C) is the same
            return t.reshape(-1, t.shape[-1])
        return t.permute(0, t.ndim - 1, *range(1, t.ndim - 1))

    x, dy, y = tensor(a.x), tensor(a.dy), tensor(a.y)
    weight, bias, running_mean, running_var = (
        torch.from_numpy(v) for v in (a.weight, a.bias, a.running_mean, a.running_var)
    )
    training = a.case.op != "inference"
    aten = torch.ops.aten
    _, mean, invstd = aten.native_batch_norm(
        x, weight, bias, running_mean.clone(), running_var.clone(), training, MOMENTUM, EPS
    )
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)

    def forward() -> torch.Tensor:
        return torch.nn.functional.batch_norm(
            x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS
        )

    def forward_out() -> None:
        aten.native_batch_norm.out(
            x, weight, bias, running_mean, running_var, training, MOMENTUM, EPS,
            out=y, save_mean=mean, save_invstd=invstd,
        )  # fmt: skip

    def backward() -> torch.Tensor:
        return aten.native_batch_norm_backward(
            dy, x, weight, running_mean, running_var, mean, invstd, True, EPS, [True] * 3
        )[0]

    def backward_out() -> None:
        aten.native_batch_norm_backward.out(
            dy, x, weight, running_mean, running_var, mean, invstd, True, EPS, [True] * 3,
            out0=y, out1=dweight, out2=dbias,
        )  # fmt: skip

    new, existing = (backward, backward_out) if a.case.op == "backward" else (forward, forward_out)

    def stored() -> np.ndarray:
        result = new()
        if a.channel_axis == 1:
            return result.numpy()
        return (result if a.x.ndim == 3 else result.movedim(1, -1)).numpy().reshape(a.x.shape)

    yield Contender("PyTorch", "peer", python_calls(new), stored)
    yield Contender("PyTorch out=", "peer", python_calls(existing), lambda: a.y)


def onnxruntime_contenders(a: Arrays) -> Iterator[Contender]:
    if a.case.op == "backward" or a.case.layout != "NCHW":
        return
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if a.case.dtype == "float32" else TensorProto.DOUBLE
    vectors = {"scale": a.weight, "B": a.bias, "mean": a.running_mean, "var": a.running_var}
    training = a.case.op == "training"
    outputs = {"y": a.y}
    if training:
        outputs |= {"new_mean": np.empty_like(a.weight), "new_var": np.empty_like(a.weight)}
    node = helper.make_node(
        "BatchNormalization", ["x", *vectors], list(outputs),
        epsilon=EPS, momentum=1 - MOMENTUM, training_mode=int(training),
    )  # fmt: skip
    inputs = {"x": a.x, **vectors}
    graph = helper.make_graph(
        [node], "batch_norm",
        [helper.make_tensor_value_info(name, kind, v.shape) for name, v in inputs.items()],
        [helper.make_tensor_value_info(name, kind, v.shape) for name, v in outputs.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = a.case.threads
    # Its threads would spin beside the next contender; its batch norm does not use them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    values = []  # they own the memory that is bound
    for name, array in inputs.items():
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input(name, values[-1])
    for name, array in outputs.items():
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output(name, values[-1])
    result = values[len(inputs)]

    def function() -> None:
        session.run_with_iobinding(binding)

    yield Contender(
        "ONNX Runtime", "peer", python_calls(function), lambda: result.numpy(), own_threads=True
    )


def jax_contenders(a: Arrays) -> Iterator[Contender]:
    """Compiled for the shape, its output's memory given back to it at each call."""
    import jax

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    count = a.x.size / a.weight.size
    shape = a.along(a.weight).shape

    def inference(old, x, running_mean, running_var, weight, bias):
        scale = weight * jax.lax.rsqrt(running_var + EPS)
        shift = bias - running_mean * scale
        return x * scale.reshape(shape) + shift.reshape(shape)

    def training(old, x, running_mean, running_var, weight, bias):
        mean = x.mean(a.reduced)
        centred = x - mean.reshape(shape)
        var = jnp.square(centred).mean(a.reduced)
        scale = weight * jax.lax.rsqrt(var + EPS)
        y = centred * scale.reshape(shape) + bias.reshape(shape)
        new_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        new_var = (1 - MOMENTUM) * running_var + MOMENTUM * var * count / (count - 1)
        return y, new_mean, new_var

    def backward(old, dy, x, mean, invstd, weight):
        xhat = (x - mean.reshape(shape)) * invstd.reshape(shape)
        dbias, dweight = dy.sum(a.reduced), (dy * xhat).sum(a.reduced)
        scale = (weight * invstd).reshape(shape)
        dx = scale * (dy - (dbias.reshape(shape) + xhat * dweight.reshape(shape)) / count)
        return dx, dweight, dbias

    x, dy, weight, bias, running_mean, running_var = map(
        jnp.asarray, (a.x, a.dy, a.weight, a.bias, a.running_mean, a.running_var)
    )
    mean, var = (jnp.asarray(v, a.case.dtype) for v in a.moments)
    arguments = {
        "inference": (x, running_mean, running_var, weight, bias),
        "training": (x, running_mean, running_var, weight, bias),
        "backward": (dy, x, mean, jax.lax.rsqrt(var + EPS), weight),
    }[a.case.op]
    operation = {"inference": inference, "training": training, "backward": backward}[a.case.op]
    compiled = jax.jit(operation, donate_argnums=0, keep_unused=True)
    last = [compiled(jnp.empty_like(x), *arguments)]

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    def function() -> None:
        last[0] = jax.block_until_ready(compiled(first(last[0]), *arguments))

    yield Contender(
        "JAX", "peer", python_calls(function), lambda: np.asarray(first(last[0])), own_threads=True
    )


def onednn_contenders(a: Arrays) -> Iterator[Contender]:
    """From C: what a program would get that embeds it. For small tensors no peer of
    calls from Python, whose overhead it does not have.
    """
    library = native.onednn()
    if library is None:
        raise ImportError("oneDNN")
    if a.case.dtype != "float32":
        return
    mean, var = (np.float32(v) for v in a.moments)
    if a.case.op == "inference":
        mean, var = a.running_mean, a.running_var
    vectors = [mean, var, a.weight, a.bias, np.empty_like(mean), np.empty_like(mean)]
    dims = np.array(a.case.shape, np.int64)
    prepared = library.bn_prepare(
        ("inference", "training", "backward").index(a.case.op), a.case.layout == "NHWC", len(dims),
        dims.ctypes.data, EPS, *(v.ctypes.data for v in (a.x, a.dy, a.y, *vectors)),
    )  # fmt: skip
    if not prepared:
        return

    class Owner:  # frees what oneDNN has when the contender goes
        arrays = a, vectors

        def __del__(self) -> None:
            library.bn_free(prepared)

    owner = Owner()

    def function(count: int) -> None:
        if library.bn_run(prepared, count):
            raise RuntimeError(f"oneDNN failed, {owner.arrays[0].case.name}")

    kind = "peer" if a.x.nbytes >= SMALL else "other"
    yield Contender("oneDNN (C)", kind, c_calls(function), lambda: a.y)


PEERS = {
    "numpy": numpy_contenders,
    "torch": torch_contenders,
    "onnxruntime": onnxruntime_contenders,
    "jax": jax_contenders,
    "onednn": onednn_contenders,
}


def contenders(a: Arrays, levels: tuple[str, ...], peers: tuple[str, ...]) -> list[Contender]:
    """Return everyone who can carry out the case."""
    found = [*copy_contenders(a), *fastbn_contenders(a, levels)]
    for peer in peers:
        found += PEERS[peer](a)
    return found


def missing_peers(peers: tuple[str, ...]) -> list[str]:
    """Return those of `peers` that are not installed."""
    missing = []
    for peer in peers:
        try:
            if peer == "onednn":
                if native.onednn() is None:
                    raise ImportError
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    __import__(peer)
        except ImportError:
            missing.append(peer)
    return missing
