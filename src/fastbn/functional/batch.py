# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbn._docs import filled
from fastbn._numpy import INPUT, ONLY_Y, WITH_STATISTICS, binding
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Vector


@filled
def batch_norm(
    x: NDArray[Floating],
    running_mean: Kept | None,
    running_var: Kept | None,
    weight: Vector | None = None,
    bias: Vector | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
) -> NDArray[Floating]:
    r"""Normalise each channel of a batch, as ``torch.nn.functional.batch_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    In training, mean and variance are those of the batch, and the running
    arrays are moved towards them; otherwise they are the running arrays.

    Parameters
    ----------
    {x}
    {running: or None}
    {affine: (C,)}
    training : bool, default False
        Normalise with the statistics of the batch.
    {momentum}
    {eps}
    {layout}
    {activation}
    {negative_slope}
    {residual}
    {out}
    {counted}

    Returns
    -------
    {y}

    Raises
    ------
    ValueError
        For a wrong shape, rank, layout, `eps` or `momentum`; for read-only or
        overlapping memory that would be written; in training, for a batch with
        one value per channel.
    TypeError
        For anything that is not an array of such a dtype, and for running
        arrays that are missing when `training` is False.

    Notes
    -----
    {empty}
    An empty `x` leaves the running arrays alone.

    {half}

    References
    ----------
    S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network
    Training by Reducing Internal Covariate Shift", 2015: algorithm 1
    (training), algorithm 2 (inference).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)
    >>> mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> fastbn.batch_norm(x, mean, var, training=True).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean, var
    (array([0.2, 2. ], dtype=float32), array([ 1.1, 20.9], dtype=float32))
    """
    return binding.batch_forward(
        x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
        layout, activation, negative_slope, ONLY_Y, None, None, mask, lengths, length_axis
    )  # fmt: skip


@filled
def batch_norm_forward(
    x: NDArray[Floating],
    weight: Vector | None = None,
    bias: Vector | None = None,
    *,
    running_mean: Kept | None = None,
    running_var: Kept | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    {x}
    {affine: (C,)}
    {running: optional}
    training : bool, default True
        Normalise with the statistics of the batch.
    {momentum}
    {eps}
    {layout}
    {activation}
    {negative_slope}
    {residual}
    {out}
    {counted}

    Returns
    -------
    {y}
    {mean_and_invstd: of shape (C,)}
        With ``training=False`` these two are of the running statistics, as the
        backward of a frozen layer needs them.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`.

    Notes
    -----
    Of an empty batch in training, mean is 0 and invstd NaN. From `running_mean` on,
    arguments are given by keyword: four arrays of shape (C,), two of them written, are
    easily mixed up.

    References
    ----------
    Ioffe & Szegedy 2015, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, mean, invstd = fastbn.batch_norm_forward(x)
    >>> mean
    array([ 2., 20.])
    >>> invstd.round(4)
    array([1. , 0.1])
    """
    return binding.batch_forward(
        x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
        layout, activation, negative_slope, WITH_STATISTICS, None, None, mask, lengths, length_axis
    )  # fmt: skip


@filled
def batch_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None = None,
    *,
    bias: Vector | None = None,
    training: bool = True,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
) -> Gradients[Floating]:
    r"""Return the gradients with respect to `x`, weight and bias.

    With :math:`\hat x = (x - mean) \cdot invstd` and means over a channel,

    .. math:: dx = weight \cdot invstd \cdot
              (dy - \overline{dy} - \hat x \, \overline{dy \hat x})

    and, for statistics that do not depend on `x` (``training=False``),
    :math:`dx = weight \cdot invstd \cdot dy`.

    Parameters
    ----------
    {dy}
    {forward_x}
    {forward_statistics: of shape (C,)}
    {forward_affine: (C,)}
    training : bool, default True
        Whether the forward pass used the statistics of the batch.
    {forward_layout}
    {forward_fusion}
    {dx_out}
    {forward_counted}

    Returns
    -------
    {dx}
    {dparameters: dweight, dbias}
    {dresidual}

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy 2015, section 3; docs/derivation.md has every step.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = fastbn.batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1.])
    """
    return binding.batch_backward(
        dy, x, mean, invstd, weight, bias, residual, out, training, layout, activation,
        negative_slope, INPUT, mask, lengths, length_axis
    )  # fmt: skip


@filled
def batch_stats(
    x: NDArray[Floating],
    *,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
) -> BatchStats:
    """Return count, mean and M2 of each channel, in float64.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        The batch, or a part of one: statistics of parts can be merged.
    layout : str, optional
        As for `batch_norm`.
    {counted}

    Returns
    -------
    BatchStats

    Raises
    ------
    ValueError, TypeError
        For a wrong rank, layout or dtype, as `batch_norm`.

    References
    ----------
    T. Chan, G. Golub, R. LeVeque, "Algorithms for Computing the Sample
    Variance", 1983; docs/numerics.md has the bound of the error.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> stats = fastbn.batch_stats(x)
    >>> stats.mean, stats.var()
    (array([ 2., 20.]), array([  1., 100.]))
    """
    count, mean, m2 = binding.batch_statistics(
        x, layout, mask, lengths, length_axis
    )
    return BatchStats(count, mean, m2)
