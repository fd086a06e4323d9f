# SPDX-License-Identifier: BSD-3-Clause
"""ONNX Runtime: one session for the case, bound to the arrays' memory. It has no backward."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph, NotImplemented

from benchmarks.cases import EPS, MOMENTUM, Arrays
from benchmarks.contenders import Contender, python_calls

KINDS = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
}
node = helper.make_node


def batch(a: Arrays, inputs: dict, outputs: dict) -> list:
    training = a.case.op == "training"
    inputs |= {"mean": a.running_mean, "var": a.running_var}
    if training:
        outputs |= {"new_mean": np.empty_like(a.weight), "new_var": np.empty_like(a.weight)}
    options = {"epsilon": EPS, "momentum": 1 - MOMENTUM, "training_mode": int(training)}
    return [node("BatchNormalization", list(inputs), list(outputs), **options)]


def layer(a: Arrays, inputs: dict, outputs: dict) -> list:
    return [node("LayerNormalization", list(inputs), ["y"], axis=-1, epsilon=EPS)]


def rms(a: Arrays, inputs: dict, outputs: dict) -> list:
    """Its own operator: RMSNormalization of opset 23 becomes that where it can."""
    del inputs["bias"]
    return [node("SimplifiedLayerNormalization", list(inputs), ["y"], axis=-1, epsilon=EPS)]


def group(a: Arrays, inputs: dict, outputs: dict) -> list:
    """As exporters write it: 2.4 times faster than GroupNormalization, which it expands."""
    groups, channels = a.case.groups, [-1, *[1] * (a.x.ndim - 2)]
    inputs["weight"], inputs["bias"] = (inputs[v].reshape(channels) for v in ("weight", "bias"))
    inputs |= {
        "one": np.ones(groups, a.x.dtype),
        "zero": np.zeros(groups, a.x.dtype),
        "grouped": np.array([0, groups, -1]),
        "shape": np.array(a.x.shape),
    }
    return [
        node("Reshape", ["x", "grouped"], ["groups"]),
        node("InstanceNormalization", ["groups", "one", "zero"], ["xhat"], epsilon=EPS),
        node("Reshape", ["xhat", "shape"], ["reshaped"]),
        node("Mul", ["reshaped", "weight"], ["scaled"]),
        node("Add", ["scaled", "bias"], ["y"]),
    ]


def instance(a: Arrays, inputs: dict, outputs: dict) -> list:
    return [node("InstanceNormalization", list(inputs), ["y"], epsilon=EPS)]


NORMS = {"batch": batch, "layer": layer, "rms": rms, "group": group, "instance": instance}


def contenders(a: Arrays) -> Iterator[Contender]:
    if a.case.op == "backward" or a.case.layout == "NHWC":
        return
    inputs, outputs = {"x": a.x, "weight": a.weight, "bias": a.bias}, {"y": a.y}
    nodes = NORMS[a.case.norm](a, inputs, outputs)
    for arrays in inputs, outputs:  # all of x's dtype
        for name, array in arrays.items():
            if array.dtype == a.kept:
                arrays[name] = array.astype(a.x.dtype, copy=False)
    graph = helper.make_graph(
        nodes, a.case.norm, *([_described(*item) for item in v.items()] for v in (inputs, outputs))
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = a.case.threads
    # Its threads would spin for 40 ms beside the next contenders; not to spin at all would
    # slow it down.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (InvalidGraph, NotImplemented):  # it has no kernel for the dtype
        return
    binding = session.io_binding()
    for bind, arrays in (binding.bind_input, inputs), (binding.bind_output, outputs):
        for name, array in arrays.items():
            bind(name, "cpu", 0, KINDS[str(array.dtype)], array.shape, array.ctypes.data)

    def function(owners: tuple[dict, dict] = (inputs, outputs)) -> None:
        session.run_with_iobinding(binding)

    yield Contender(
        "ONNX Runtime", "peer", python_calls(function), lambda: a.y, own_threads=a.case.threads > 1
    )


def _described(name: str, array: np.ndarray) -> object:
    return helper.make_tensor_value_info(name, KINDS[str(array.dtype)], array.shape)
