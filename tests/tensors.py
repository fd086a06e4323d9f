# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of fastbn.torch share; without PyTorch they are skipped.

With FASTBN_REQUIRE_PEERS=1 a missing PyTorch is a failure, not a skip.
"""

import os
import warnings

import ml_dtypes
import pytest

if os.environ.get("FASTBN_REQUIRE_PEERS") == "1":
    import expecttest  # noqa: F401  PyTorch's lists of samples need it.
    import torch
else:
    torch = pytest.importorskip("torch")
    pytest.importorskip("expecttest")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

import fastbn.torch

NAMES = ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"]
OPS = {op.name.rpartition(".")[2]: op for op in op_db if op.name.rpartition(".")[2] in NAMES}
#: By dtype: how far two implementations of the same may be apart. A group of one value, of
#: which there are samples, has a variance of 0, and makes of a rounding the 316-fold.
NEAR = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 3e-4, "rtol": 5e-5},
    torch.float16: {"atol": 2e-2, "rtol": 1e-2},
    torch.bfloat16: {"atol": 2e-1, "rtol": 4e-2},
}
assert OPS.keys() == set(NAMES)
#: Of the input and of the parameters: what PyTorch's norms take.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def array(tensor):
    """The memory of a tensor as an array."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def function(name):
    return getattr(fastbn.torch, name)


def differentiable(thing):
    return isinstance(thing, torch.Tensor) and thing.requires_grad


def cloned(thing):
    """A copy with the same strides that derivatives can be taken of."""
    if not isinstance(thing, torch.Tensor):
        return thing
    return thing.detach().clone().requires_grad_(thing.requires_grad)


def results(call, tensors):
    """y, the gradients with respect to what requires one, and the tensors as they are then."""
    y = call()
    wanted = [t for t in tensors if differentiable(t)]
    gradients = []
    if wanted:
        seed = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
        gradients = torch.autograd.grad(y, wanted, seed)
    kept = [t for t in tensors if isinstance(t, torch.Tensor) and not t.requires_grad]
    return [y.detach(), *gradients, *kept]


def assert_same(mine, theirs, dtype):
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, equal_nan=True, **NEAR[dtype])


def nodes(y):
    """The names of all nodes of a graph of autograd."""
    names, seen, waiting = [], set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name().rpartition("::")[2])
            waiting += [child for child, _ in node.next_functions]
    return names
