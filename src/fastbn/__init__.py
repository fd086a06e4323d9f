# SPDX-License-Identifier: BSD-3-Clause
"""Batch, layer, RMS, group and instance norm for NumPy arrays, on the CPU.

The public names, nothing else.
"""

from fastbn import _forks  # noqa: F401  It has to look before OpenMP is loaded.
from fastbn._build import VERSION as __version__
from fastbn._dispatch import show_config
from fastbn._embed import get_include
from fastbn._threads import get_num_threads, set_num_threads, threads
from fastbn.accumulator import StatsAccumulator
from fastbn.engine.core import C_API as _C_API  # noqa: F401  PyCapsule_Import looks here.
from fastbn.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_inplace,
    batch_norm_forward,
    batch_stats,
    denormalize,
    fold_batch_norm,
    fold_batch_norm_into_next,
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    normalize,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    scale_shift,
)
from fastbn.layers import (
    BatchNorm,
    BatchRenorm,
    GroupNorm,
    InPlaceBatchNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    SyncBatchNorm,
    freeze,
    unfreeze,
    update_statistics,
)
from fastbn.stats import BatchStats

from fastbn import dialects as dialects  # isort: skip  It needs the layers.

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "BatchStats",
    "GroupNorm",
    "InPlaceBatchNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "StatsAccumulator",
    "SyncBatchNorm",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_inplace",
    "batch_norm_forward",
    "batch_stats",
    "denormalize",
    "fold_batch_norm",
    "fold_batch_norm_into_next",
    "freeze",
    "get_include",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "normalize",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "scale_shift",
    "set_num_threads",
    "show_config",
    "threads",
    "unfreeze",
    "update_statistics",
]
