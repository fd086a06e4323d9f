# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's modules into those of fastbn, and back.

A module keeps its identity: only its class changes. So hooks, parameters, optimisers,
modules that are used twice, and everything that holds on to them, stay as they are.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fastbn.torch import fuse as fusion
from fastbn.torch import modules

Model = TypeVar("Model", bound=nn.Module)

#: Of exactly these classes: what a subclass does, nobody here knows.
CLASSES = {
    getattr(nn, name): getattr(modules, name)
    for name in [
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "RMSNorm", "GroupNorm",
        "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
    ]
}  # fmt: skip
BACK = {ours: theirs for theirs, ours in CLASSES.items()}


def convert(model: Model, *, fuse: bool = False) -> Model:
    """Turn the normalisation modules of `model` into those of fastbn, in place.

    Parameters
    ----------
    model : Module
        Changed in place; itself, too, where it is such a module.
    fuse : bool, default False
        Let a batch norm do the ReLU or ReLU6 after it, or the addition and one of them, where
        ``torch.fx`` can see that nothing else needs what is between. The result is
        then another module, a ``torch.fx.GraphModule`` with the same submodules and
        parameters. A model that cannot be traced, or whose graph depends on the mode
        (training or not), is returned as without `fuse`, with a warning that says why.

    Returns
    -------
    Module
        `model`; with `fuse`, the graph module.

    Notes
    -----
    Modules of classes derived from PyTorch's are left alone, and so are lazy ones
    that have not seen a batch.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> type(fastbn.torch.convert(model)[1])
    <class 'fastbn.torch.modules.BatchNorm2d'>
    """
    for module in model.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
    return fusion.fused(model) if fuse else model


def restore(model: Model) -> Model:
    """Undo `convert`, in place.

    Parameters
    ----------
    model : Module
        What `convert` returned, or a copy of it. Training and loading since then are kept.

    Returns
    -------
    Module
        `model`, with PyTorch's modules. A graph module stays one, with additions and
        activations of their own again; the model it was made from, which has the same
        modules, is restored with it.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = fastbn.torch.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(8)))
    >>> type(fastbn.torch.restore(model)[0])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    fusion.separated(model)
    for module in model.modules():
        module.__class__ = BACK.get(type(module), type(module))
    return model
