# SPDX-License-Identifier: BSD-3-Clause
"""The functions of fastbn: names, defaults, documentation. No arithmetic, but on parameters.

Arguments, their order and their defaults follow ``torch.nn.functional``.
"""

from fastbn.functional.batch import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_stats,
)
from fastbn.functional.fold import fold_batch_norm, fold_batch_norm_into_next, scale_shift
from fastbn.functional.group import (
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
)
from fastbn.functional.images import denormalize, normalize
from fastbn.functional.inplace import batch_norm_backward_inplace
from fastbn.functional.layer import (
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_inplace",
    "batch_norm_forward",
    "batch_stats",
    "denormalize",
    "fold_batch_norm",
    "fold_batch_norm_into_next",
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
]
