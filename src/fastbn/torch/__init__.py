# SPDX-License-Identifier: BSD-3-Clause
"""Normalisation for PyTorch on the CPU: functions with autograd, modules, conversion, fusion.

    dispatch.py                 fastbn's kernels in PyTorch's dispatcher: enable, disable
        _dispatcher.pyx             the kernels, through PyTorch's stable C interface
    convert.py, fuse.py         another forward function for modules of a model
        modules.py                  what the forward function of each norm does
        _graphs.py                  what that of another module does, as a graph
        _forward.py                 how a function takes the place of another
    sync.py                     batch norm over several processes
    functional.py               names, defaults; which way a call goes:
        _direct.pyx                 eager: fastbn.h on the tensors' memory, an autograd.Function
        _formulas.py                compiled, traced, transformed, differentiated twice:
                                    PyTorch's own functions

The public names, nothing else. `import fastbn` does not import this package.
"""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError(
        "fastbn.torch needs PyTorch: python -m pip install 'fastbn[torch]'"
    ) from error
if not hasattr(_torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"fastbn.torch needs PyTorch 2.10 or later, found {_torch.__version__}: "
        "python -m pip install 'fastbn[torch]'"
    )

from fastbn.torch.convert import convert, restore
from fastbn.torch.dispatch import disable, enable, enabled, is_enabled
from fastbn.torch.functional import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from fastbn.torch.fuse import fuse, unfuse
from fastbn.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from fastbn.torch.sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "disable",
    "enable",
    "enabled",
    "fuse",
    "group_norm",
    "instance_norm",
    "is_enabled",
    "layer_norm",
    "restore",
    "rms_norm",
    "unfuse",
]
