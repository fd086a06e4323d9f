# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch.SyncBatchNorm in one process; test_distributed.py has several."""

import doctest
import inspect

import pytest
from tensors import torch
from torch import nn

import fastbn.torch
from fastbn.torch import sync

SyncBatchNorm = fastbn.torch.SyncBatchNorm


def test_docstrings():
    failed, attempted = doctest.testmod(sync)
    assert attempted
    assert not failed


def test_the_constructor_is_that_of_pytorch():
    given, wanted = (inspect.signature(c).parameters for c in (SyncBatchNorm, nn.SyncBatchNorm))
    names = [name for name in given if name != "bias"]
    assert names == [name for name in wanted if name != "bias"]
    for name in names:
        assert given[name].default == wanted[name].default
    assert "convert_sync_batchnorm" in vars(SyncBatchNorm)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False},
                                     {"momentum": None}], ids=str)  # fmt: skip
def test_state_and_results_without_a_group(options):
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3, **options)
    mine = SyncBatchNorm(3, **options)
    assert repr(mine) == repr(theirs).replace("BatchNorm2d", "SyncBatchNorm")
    mine.load_state_dict(theirs.state_dict())
    assert list(mine.state_dict()) == list(nn.SyncBatchNorm(3, **options).state_dict())
    for training in True, True, False:
        x = torch.randn(8, 3, 20, 20)
        results = []
        for module in mine, theirs:
            module.train(training)
            own = x.clone().requires_grad_()
            y = module(own)
            y.square().sum().backward()
            results.append((y, own.grad))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.state_dict(), dict(theirs.state_dict()))


@pytest.mark.parametrize("shape", [(3,), (2, 0, 4)])
def test_errors_are_those_of_pytorch(shape):
    found = []
    for layer in SyncBatchNorm(3), nn.SyncBatchNorm(3):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            layer(torch.zeros(shape))
        found.append(str(error.value))
    assert found[0] == found[1]


def test_conversion():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm1d(4, affine=False)),
        fastbn.torch.BatchNorm3d(5), nn.InstanceNorm2d(3), nn.SyncBatchNorm(6)
    ).eval()  # fmt: skip
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    group = object()
    converted = SyncBatchNorm.convert_sync_batchnorm(model, group)
    assert converted is model
    kinds = [type(module) for module in model.modules() if not list(module.children())]
    assert kinds == [nn.Conv2d, SyncBatchNorm, SyncBatchNorm, SyncBatchNorm, nn.InstanceNorm2d,
                     SyncBatchNorm]  # fmt: skip
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    torch.testing.assert_close(dict(model.state_dict()), state)
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            assert module.process_group is group
            assert not module.training
    alone = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert type(alone) is SyncBatchNorm
    # DistributedDataParallel refuses PyTorch's own on the CPU.
    assert not isinstance(alone, nn.SyncBatchNorm)
