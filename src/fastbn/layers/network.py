# SPDX-License-Identifier: BSD-3-Clause
"""What is done to the layers of a network together. May not do arithmetic on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np

from fastbn._numpy import binding
from fastbn.functional.running import check_name
from fastbn.layers.base import Layer
from fastbn.layers.batch import BatchNorm
from fastbn.layers.population import PopulationLayer

Input = TypeVar("Input")

#: How `update_statistics` makes one of the statistics of batches.
METHODS = ("pooled", "mean_of_batches")
# What it changes for as long as batches are seen, and what a call keeps for backward.
_RESTORED = ("training", "momentum", "track", "_saved", "_overwritten")


def _listed(layers: Iterable[object]) -> list[object]:
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers: expected an iterable of layers, got {type(layers).__name__}; [layer] is one"
        )
    return list({id(layer): layer for layer in layers}.values())


def freeze(layers: Iterable[object], affine: bool = True) -> None:
    """Freeze all batch norm layers among `layers`; others are skipped.

    Parameters
    ----------
    layers : iterable of layers
        Those of a network, in any order.
    affine : bool, default True
        As for `BatchNorm.freeze`.

    Raises
    ------
    ValueError
        If one of them has no running statistics; none is frozen then.

    Examples
    --------
    >>> import fastbn
    >>> network = [fastbn.BatchNorm(4), fastbn.LayerNorm(4)]
    >>> fastbn.freeze(network)
    >>> network[0].train().frozen
    True
    """
    found = [layer for layer in _listed(layers) if isinstance(layer, BatchNorm)]
    affine = binding.check_flag(affine, "affine")
    for layer in found:
        layer._check_can_be_frozen()
    for layer in found:
        layer.freeze(affine)


def unfreeze(layers: Iterable[object]) -> None:
    """Undo `freeze` for all batch norm layers among `layers`; others are skipped.

    Parameters
    ----------
    layers : iterable of layers
        Those of a network, in any order.

    Examples
    --------
    >>> import fastbn
    >>> network = [fastbn.BatchNorm(4).freeze(), fastbn.LayerNorm(4)]
    >>> fastbn.unfreeze(network)
    >>> network[0].frozen
    False
    """
    for layer in _listed(layers):
        if isinstance(layer, BatchNorm):
            layer.unfreeze()


def _begin(layer: PopulationLayer, method: str) -> dict[str, object]:
    # Returns what has to be put back.
    changed = (*_RESTORED, *layer._while_estimated)
    before = {name: getattr(layer, name) for name in changed}
    before |= {f"array of {name}": np.copy(getattr(layer, name))
               for name in ("running_mean", "running_var")}  # fmt: skip
    before |= {name: getattr(layer, name) for name in ("num_batches_tracked", "pooled")}
    layer.__dict__.update(layer._while_estimated)
    layer.training, layer.momentum = True, None
    layer.track = "pooled" if method == "pooled" else "average"
    layer.reset_running_stats()
    return before


def _bar(batches: Iterable[Input]) -> Iterable[Input]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected False without tqdm; pip install tqdm") from error
    return tqdm(batches, desc="statistics", unit="batch")


def _end(layer: PopulationLayer, before: dict[str, Any], skipped: int) -> None:
    # A layer that has seen nothing keeps what it had.
    pooled = layer.pooled
    for name in (*_RESTORED, *layer._while_estimated):
        setattr(layer, name, before[name])
    layer.skipped += skipped
    if layer.num_batches_tracked:
        if layer.track == "average":
            layer.pooled = None
        elif pooled is None:
            layer.pooled = layer._nothing_pooled()
        return
    layer.num_batches_tracked, layer.pooled = before["num_batches_tracked"], before["pooled"]
    for name in ("running_mean", "running_var"):
        getattr(layer, name)[...] = before[f"array of {name}"]


def update_statistics(
    layers: Iterable[object],
    forward: Callable[[Input], object],
    batches: Iterable[Input],
    *,
    method: str = "pooled",
    progress: bool = False,
) -> int:
    """Estimate the running statistics of a network anew, with its parameters as they are.

    While a network is trained its running statistics follow parameters that change. Here they
    begin from nothing, and batches pass while the parameters stay.

    Parameters
    ----------
    layers : iterable of layers
        Those whose running statistics are meant: of batch norm, not frozen, and with running
        statistics. Others are skipped.
    forward : callable
        Passes a batch through the network: ``forward(batch)``. Meanwhile the layers are in
        training mode.
    batches : iterable
        What `forward` is called with.
    method : {"pooled", "mean_of_batches"}, default "pooled"
        Mean and variance of all that a layer has seen; or the means of those of the batches,
        as ``torch.optim.swa_utils.update_bn``, which leave out how the batches differ.
    progress : bool, default False
        Show a progress bar, which needs tqdm.

    Returns
    -------
    int
        The number of batches.

    Raises
    ------
    ValueError
        If there is no batch, or for another `method`.
    TypeError
        For arguments of a wrong type.

    Notes
    -----
    If anything fails or is interrupted, all layers are as they were. Afterwards they have the
    mode and the momentum that they had; `num_batches_tracked` is what they have seen. A layer
    that has seen nothing keeps its statistics. `BatchRenorm` normalises as batch norm meanwhile.

    References
    ----------
    Y. Wu, J. Johnson, "Rethinking Batch in BatchNorm", 2021: section 3, "precise batch norm".

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2).eval()
    >>> batches = np.arange(24.0).reshape(3, 4, 2)
    >>> fastbn.update_statistics([bn], bn, batches)
    3
    >>> bn.running_mean, bn.running_var
    (array([11., 12.], dtype=float32), array([52., 52.], dtype=float32))
    """
    listed = _listed(layers)
    found = [
        layer
        for layer in listed
        if isinstance(layer, PopulationLayer)
        and not getattr(layer, "frozen", False)
        and layer.running_mean is not None
        and layer.running_var is not None
    ]
    if not callable(forward):
        raise TypeError(f"forward: expected a callable, got {type(forward).__name__}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable, got {type(batches).__name__}")
    check_name(method, "method", METHODS)
    if binding.check_flag(progress, "progress"):
        batches = _bar(batches)
    with ExitStack() as stack:
        for layer in listed:
            if isinstance(layer, Layer):
                stack.enter_context(layer._as_before_on_error())
        skipped = [layer.skipped for layer in found]
        before = [_begin(layer, method) for layer in found]
        number = 0
        for batch in batches:
            forward(batch)
            number += 1
        if number == 0:
            raise ValueError("batches: expected at least one batch, got none")
        for arguments in zip(found, before, skipped, strict=True):
            _end(*arguments)
    return number
