# SPDX-License-Identifier: BSD-3-Clause
"""The layers: parameters, running statistics, training and evaluation mode.

Arguments, their order and their defaults follow ``torch.nn``. May keep state.
May not do arithmetic on tensors.
"""

from fastbn.layers.batch import BatchNorm
from fastbn.layers.group import GroupNorm, InstanceNorm
from fastbn.layers.inplace import InPlaceBatchNorm
from fastbn.layers.layer import LayerNorm, RMSNorm
from fastbn.layers.network import freeze, unfreeze, update_statistics
from fastbn.layers.renorm import BatchRenorm
from fastbn.layers.sync import SyncBatchNorm

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "GroupNorm",
    "InPlaceBatchNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "SyncBatchNorm",
    "freeze",
    "unfreeze",
    "update_statistics",
]
