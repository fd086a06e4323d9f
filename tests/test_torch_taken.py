# SPDX-License-Identifier: BSD-3-Clause
"""What fastbn's kernels take: none of these calls is left to PyTorch's own kernels.

A call that is passed on has right results, and no other test would notice.
"""

import pytest
from tensors import DTYPES, torch
from torch.autograd.profiler import profile
from torch.nn import functional

import fastbn.torch

SHAPES = [
    ((4, 6), None), ((1, 6, 2), None), ((3, 6, 5), None), ((3, 6, 4, 5), None),
    ((3, 6, 4, 5), torch.channels_last), ((1, 6, 2, 2), torch.channels_last),
    ((2, 6, 3, 2, 2), None), ((2, 6, 3, 2, 2), torch.channels_last_3d),
]  # fmt: skip


def batch_norm(x, w, b, kind):
    mean, var = torch.zeros(6, dtype=kind), torch.ones(6, dtype=kind)
    return functional.batch_norm(x, mean, var, w, b, training=True)


def batch_norm_alone(x, w, b, kind):
    return functional.batch_norm(x, None, None, w, b, training=True)


def inference(x, w, b, kind):
    mean, var = torch.zeros(6, dtype=kind), torch.ones(6, dtype=kind)
    return functional.batch_norm(x, mean, var, w, b)


def group_norm(x, w, b, kind):
    return functional.group_norm(x, 2, w, b)


def instance_norm(x, w, b, kind):
    return functional.instance_norm(x, None, None, w, b)


def layer_norm(x, w, b, kind):
    return functional.layer_norm(x, x.shape[-1:], *(None if v is None else v[: x.shape[-1]]
                                                    for v in (w, b)))  # fmt: skip


NORMS = [batch_norm, batch_norm_alone, inference, group_norm, instance_norm, layer_norm]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_taken(norm, dtypes, affine):
    for shape, order in SHAPES:
        if norm is instance_norm and len(shape) == 2:
            continue
        x = torch.randn(shape).to(dtypes[0])
        if order is not None:
            x = x.contiguous(memory_format=order)
        x.requires_grad_()
        w, b = (torch.rand(6).to(dtypes[1]).requires_grad_() if affine else None for _ in range(2))
        with fastbn.torch.enabled(), profile() as calls:
            norm(x, w, b, dtypes[1]).sum().backward()
        names = {event.key for event in calls.key_averages()}
        assert any("norm_backward" in name for name in names), names
        assert not {name for name in names if name.startswith("fastbn_pytorch::")}, (shape, order)


def test_what_is_passed_on_would_be_seen():
    x = torch.randn(2, 6, 1)  # groups of one value
    with fastbn.torch.enabled(), profile() as calls:
        torch.ops.aten.native_group_norm(x, None, None, 2, 6, 1, 6, 1e-5)
    names = {event.key for event in calls.key_averages()}
    assert "fastbn_pytorch::native_group_norm" in names
