# SPDX-License-Identifier: BSD-3-Clause
"""Paragraphs that several docstrings share, each of them once.

A line of a docstring that is nothing but ``{name}`` stands for the paragraph of that name;
``{name: words}`` for the paragraph with these words in place of its ``...``. `filled` puts
the paragraphs in, when a module is imported, so that help() and Sphinx show them. It may
not touch anything but ``__doc__``.
"""

import re
from typing import TypeVar

from fastbn._types import ACTIVATIONS

Documented = TypeVar("Documented")

_NAMES = ", ".join(f'"{name}"' for name in ACTIVATIONS if name)

PARAGRAPHS = {
    # ---- what forward takes
    "x": """\
x : ndarray of float16, bfloat16, float32 or float64
    The input. Any strides, any byte order; it may be read-only.""",
    "normalized_shape": """\
normalized_shape : int or sequence of int
    The lengths of the last axes of `x`, over which it is normalised.""",
    "num_groups": """\
num_groups : int
    G, the number of groups; it divides C, the number of channels.""",
    "running": """\
running_mean, running_var : ndarray of shape (C,), float32 or float64, ...
    Running statistics. Updated in place where the statistics are those of `x`; needed
    otherwise. The variance kept here is unbiased (divided by n - 1), if not said otherwise.""",
    "affine": """\
weight, bias : ndarray of shape ..., optional
    The affine part; 1 and 0 if not given. Of any dtype that `x` may have, whichever
    that is; half precision is widened.""",
    "rms_weight": """\
weight : ndarray of shape `normalized_shape`, optional
    1 if not given. Of any dtype that `x` may have, whichever that is; half precision is
    widened.""",
    "group": """\
group : communicator of mpi4py, ProcessGroup of torch.distributed, or any object, optional
    The processes whose parts make the batch. An object has `rank`, `size` and
    ``allgather(array)``, which returns the float64 arrays of all ranks in a list, in rank
    order. ``None``: this process alone.""",
    "momentum": """\
momentum : float, default 0.1
    The share of the new value: ``(1 - momentum) * running + momentum * new``.""",
    "eps": """\
eps : float, default 1e-5
    Added to the variance, inside the root. More than 0 where the variance is that of `x`.""",
    "rms_eps": """\
eps : float, optional
    Added to the mean square, inside the root. Without it, the machine epsilon of what is
    computed with: float64 for float64 `x`, else float32.""",
    "layout": """\
layout : str, optional
    A letter for each axis of `x`, with one ``C`` for the channels, such as ``"NHWC"``; or
    ``"N...C"``: channels last at any rank. Without it, channels are axis 1.""",
    "instance_layout": """\
layout : str, optional
    A letter for each axis of `x`, with one ``N`` and one ``C``, such as ``"NHWC"``; or
    ``"N...C"``: channels last at any rank. Without it, instances are axis 0 and channels
    axis 1.""",
    "activation": f"""\
activation : {{{_NAMES}}}, optional
    What `y` goes through, in the same pass. NaN stays NaN.""",
    "negative_slope": """\
negative_slope : float, default 0.01
    Of the leaky ReLU, below 0.""",
    "ghost": """\
ghost_batch_size : int, optional
    In training each slice of so many instances, along axis 0 or the `N` of the layout, is
    normalised with statistics of its own; the last may be shorter. Running statistics follow
    the slices in order.""",
    "update_running": """\
update_running : bool, default True
    Move the running statistics in training; otherwise they stay as they are.""",
    "unbiased": """\
unbiased : bool, default True
    Whether the running variance is that divided by n - 1, as in PyTorch, or by n, as in
    Keras, Flax and ONNX. `y` always has the latter.""",
    "on_nonfinite": """\
on_nonfinite : {"propagate", "skip", "raise"}, default "propagate"
    What running statistics do about channels of a batch whose mean or variance is not finite
    in their dtype: follow; stay as they were; or stay, all of them, and a FloatingPointError
    names the channels. `y` has been written then.""",
    "residual": """\
residual : ndarray of the shape and dtype of `x`, optional
    Added before the activation. Its memory order may differ from that of `x`, at the
    price of a copy.""",
    "out": """\
out : ndarray of the shape and dtype of `x`, optional
    Where to write `y`: `x` itself, or memory apart from all inputs.""",
    "counted": """\
mask : ndarray of bool, optional
    Which elements count: with the axes of `x` but that of the channels, in their order, each
    of its size or 1. The others enter no statistics, and the results are 0 there, whatever
    they hold.
lengths : array_like of int, shape (N,), optional
    In place of a mask: how many positions of each instance count, the first ones.
length_axis : str, optional
    The letter of `layout` along which `lengths` are. Not needed where there is one axis
    beside those of instances and channels.""",
    "counted_tensors": """\
mask : Tensor of bool, optional
    Which elements count: of the shape of `input` without its channel axis, or 1 in place of
    a size. The others enter no statistics, and the result is 0 there.
lengths : Tensor of int, shape (N,), optional
    In place of a mask, of an input (N, C, T): how many positions of each count, the first.""",
    # ---- what a layer is called with
    "layer_out": """\
out : ndarray of the shape and dtype of `x`, optional
    Where to write `y`; `x` itself is allowed, but rules out `backward`.""",
    "layer_residual": """\
residual : ndarray of the shape and dtype of `x`, optional
    Added before the activation. In training it is kept as `x` is.""",
    "layer_channels": """\
x : ndarray of float16, bfloat16, float32 or float64
    With the channels of the layer. In training a reference to it is kept for
    `backward`, until the next call or `eval`.""",
    # ---- what forward returns, and what is to know of it
    "y": """\
y : ndarray
    `out`, or a new array of the shape, dtype and memory order of `x`.""",
    "mean_and_invstd": """\
mean : ndarray of float64, ...
    The mean that was subtracted.
invstd : ndarray of float64, of the same shape
    ``1 / sqrt(var + eps)``.""",
    "empty": """\
An empty `x` gives an empty `y`. All arguments are checked before anything is written.""",
    "half": """\
bfloat16 is ``ml_dtypes.bfloat16``. Both half types are computed in float32, and
statistics in float64, whatever `x` is; `y` is rounded at the end.""",
    # ---- backward
    "dy": """\
dy : ndarray of the shape and dtype of `x`
    The gradient of the loss with respect to `y`; its memory order may differ from that of
    `x`, at the price of a copy.""",
    "forward_x": """\
x : ndarray of float16, bfloat16, float32 or float64
    The input of the forward pass.""",
    "forward_statistics": """\
mean, invstd : ndarray ..., float64 or float32
    What the forward pass returned. float32 costs accuracy where the mean is large.""",
    "forward_shape": """\
normalized_shape : int or sequence of int
    As in the forward pass.""",
    "forward_affine": """\
weight, bias : ndarray of shape ..., optional
    As in the forward pass; the bias matters to an activation only.""",
    "forward_layout": """\
layout : str, optional
    As in the forward pass.""",
    "forward_fusion": """\
activation, negative_slope, residual : optional
    As in the forward pass; what the activation had before it is computed again.""",
    "dx_out": """\
out : ndarray of the shape and dtype of `x`, optional
    Where to write `dx`: `dy` or `x` itself, or memory apart from all inputs.""",
    "forward_counted": """\
mask, lengths, length_axis : optional
    As in the forward pass; elsewhere `dx` is 0.""",
    "dx": """\
dx : ndarray
    `out`, or a new array of the shape, dtype and memory order of `x`.""",
    "dparameters": """\
... : ndarray of the shape of the parameter
    Of the dtype of `weight`; without it float64 for a float64 `x`, else float32.""",
    "dresidual": """\
dresidual : ndarray
    Only with a residual: its gradient, a new array like `dx`.""",
    # ---- layers
    "num_features": """\
num_features : int
    C, the number of channels; at least 1.""",
    "keep_affine": """\
affine : bool, default ...
    Keep `weight` and `bias`; otherwise both are ``None``.""",
    "average_momentum": """\
momentum : float or None, default 0.1
    The share of the new value: ``(1 - momentum) * running + momentum * new``. ``None``:
    running statistics are the plain average over all batches so far.""",
    "track": """\
track_running_stats : bool, default True
    Keep running statistics; otherwise evaluation, too, normalises with the statistics of
    the batch.""",
    "dtype": """\
dtype : dtype, default float32
    Of ...: float32 or float64. The input may
    be either, float16 or bfloat16; `y` has the dtype of `x`.""",
    "weights": """\
weight, bias : ndarray of shape ..., or None""",
    "gradients": """\
weight_grad, bias_grad : ndarray of shape ..., or None
    Set by `backward`.""",
    "tracked": """\
running_mean, running_var : ndarray of shape (C,), or None
num_batches_tracked : int or None
    How many batches the running statistics have seen.""",
    "training": """\
training : bool
    Set by `train` and `eval`.""",
    # ---- data sets
    "source": """\
source : path, array, list or iterable
    A path is a folder of images, a glob, an image, TIFF, .npy, ``file.npz/name``,
    ``store.zarr/group/array``, ``file.h5/group/dataset`` or ``file.nc/variable``. An array
    is of NumPy, h5py, Zarr or xarray. A list has paths or arrays; an iterable gives arrays;
    of what a PyTorch DataLoader gives, the first item counts.""",
    "source_layout": """\
layout : str, optional
    A letter for each axis, with one ``C`` for the channels, such as ``"NHWC"``; or
    ``"N...C"``. Without it, channels are axis 1; images are NHWC, and the axes of a TIFF
    are its own.""",
    "mode": """\
mode : str, optional
    A mode of Pillow, such as ``"RGB"``, that images are converted to. Without it, a palette
    image counts as what it expands to.""",
    "workers": """\
workers : int, default 1
    How many threads read.""",
    "progress": """\
progress : bool, default False
    Show a bar on stderr, if that is a terminal.""",
    "wrong_arguments": """\
ValueError, TypeError
    For arguments out of range or of a wrong type.""",
}

_LINE = re.compile(r"^( *)\{(\w+)(?:: (.+))?\}$", re.MULTILINE)


def _paragraph(line: re.Match[str]) -> str:
    indent, name, words = line.groups()
    text = PARAGRAPHS[name]
    if words is not None:
        text = text.replace("...", words, 1)
    return "\n".join(indent + part for part in text.split("\n"))


def filled(thing: Documented) -> Documented:
    """Put the paragraphs into the docstring of a function or class; return it."""
    if thing.__doc__ is not None:  # as it is under python -OO
        thing.__doc__ = _LINE.sub(_paragraph, thing.__doc__)
    return thing
