# SPDX-License-Identifier: BSD-3-Clause
"""Group norm and instance norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from fastbn._docs import filled
from fastbn._numpy import ONLY_Y, WITH_STATISTICS, binding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Vector


@filled
def group_norm(
    x: NDArray[Floating],
    num_groups: SupportsIndex,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> NDArray[Floating]:
    r"""Normalise groups of channels, as ``torch.nn.functional.group_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    Mean and variance are those of one group: of ``C / num_groups`` neighbouring
    channels in one of the N instances, over all other axes.

    Parameters
    ----------
    {x}
    {num_groups}
    {affine: (C,)}
    {eps}
    {instance_layout}
    {counted}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}

    Raises
    ------
    ValueError
        For a wrong shape, rank, layout, `num_groups` or `eps`; for read-only or
        overlapping memory that would be written; for one value per group.
    TypeError
        For anything that is not an array of such a dtype.

    Notes
    -----
    {empty}

    {half}

    References
    ----------
    Y. Wu, K. He, "Group Normalization", 2018: equations 1, 2 and 7.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]], dtype=np.float32)
    >>> fastbn.group_norm(x, 2).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    return binding.group_forward(
        x, weight, bias, residual, out, num_groups, eps, layout, activation, negative_slope,
        ONLY_Y, (mask, lengths, length_axis)
    )  # fmt: skip


@filled
def group_norm_forward(
    x: NDArray[Floating],
    num_groups: SupportsIndex,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    {x}
    {num_groups}
    {affine: (C,)}
    {eps}
    {instance_layout}
    {counted}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}
    {mean_and_invstd: of shape (N, G)}

    Raises
    ------
    ValueError, TypeError
        As `group_norm`.

    References
    ----------
    Wu & He 2018, equations 1, 2 and 7.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, mean, invstd = fastbn.group_norm_forward(x, 2)
    >>> mean
    array([[ 2., 20.]])
    >>> invstd.round(4)
    array([[1. , 0.1]])
    """
    return binding.group_forward(
        x, weight, bias, residual, out, num_groups, eps, layout, activation, negative_slope,
        WITH_STATISTICS, (mask, lengths, length_axis)
    )  # fmt: skip


@filled
def group_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    num_groups: SupportsIndex,
    weight: Vector | None = None,
    *,
    bias: Vector | None = None,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    r"""Return the gradients with respect to `x`, weight and bias.

    With :math:`\hat x = (x - mean) \cdot invstd`, :math:`g = dy \cdot weight` and
    means over a group,

    .. math:: dx = invstd \cdot (g - \overline{g} - \hat x \, \overline{g \hat x})

    The gradients of the parameters are sums over all axes but the channels'.

    Parameters
    ----------
    {dy}
    {forward_x}
    {forward_statistics: of shape (N, G)}
    num_groups : int
        As in the forward pass.
    {forward_affine: (C,)}
    {forward_layout}
    {forward_counted}
    {forward_fusion}
    {dx_out}

    Returns
    -------
    {dx}
    {dparameters: dweight, dbias}
    {dresidual}

    Raises
    ------
    ValueError, TypeError
        As `group_norm`.

    References
    ----------
    Wu & He 2018, equations 1, 2 and 7, differentiated.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> y, mean, invstd = fastbn.group_norm_forward(x, 1)
    >>> dy = np.array([[1.0, 0.0, 0.0]])
    >>> dx, dweight, dbias = fastbn.group_norm_backward(dy, x, mean, invstd, 1)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1., 0., 0.])
    """
    return binding.group_backward(
        dy, x, mean, invstd, weight, bias, residual, out, num_groups, layout, activation,
        negative_slope, (mask, lengths, length_axis)
    )  # fmt: skip


@filled
def instance_norm(
    x: NDArray[Floating],
    running_mean: Kept | None = None,
    running_var: Kept | None = None,
    weight: Vector | None = None,
    bias: Vector | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> NDArray[Floating]:
    r"""Normalise each channel of each instance, as ``torch.nn.functional.instance_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    With `use_input_stats`, mean and variance are those of one channel in one of
    the N instances, and the running arrays are moved towards their averages
    over the instances; otherwise they are the running arrays.

    Parameters
    ----------
    {x}
    {running: optional}
    {affine: (C,)}
    use_input_stats : bool, default True
        Normalise with the statistics of `x`.
    {momentum}
    {eps}
    {instance_layout}
    {counted}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}

    Raises
    ------
    ValueError
        For a wrong shape, rank, layout, `eps` or `momentum`; for read-only or
        overlapping memory that would be written; with `use_input_stats`, for
        one value per channel of an instance.
    TypeError
        For anything that is not an array of such a dtype, and for running
        arrays that are missing when `use_input_stats` is False.

    Notes
    -----
    {empty}
    An empty `x` leaves the running arrays alone.

    {half}

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing
    Ingredient for Fast Stylization", 2016: equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]], dtype=np.float32)
    >>> mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> fastbn.instance_norm(x, mean, var).round(3)
    array([[[-1.,  1.],
            [-1.,  1.]]], dtype=float32)
    >>> mean, var
    (array([0.2, 2. ], dtype=float32), array([ 1.1, 20.9], dtype=float32))
    """
    return binding.instance_forward(
        x, weight, bias, running_mean, running_var, residual, out, use_input_stats, momentum,
        eps, layout, activation, negative_slope, ONLY_Y, (mask, lengths, length_axis)
    )  # fmt: skip


@filled
def instance_norm_forward(
    x: NDArray[Floating],
    weight: Vector | None = None,
    bias: Vector | None = None,
    *,
    running_mean: Kept | None = None,
    running_var: Kept | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    {x}
    {affine: (C,)}
    {running: optional}
    use_input_stats : bool, default True
        Normalise with the statistics of `x`.
    {momentum}
    {eps}
    {instance_layout}
    {counted}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}
    {mean_and_invstd: of shape (N, C)}
        With ``use_input_stats=False`` the rows of both are all alike.

    Raises
    ------
    ValueError, TypeError
        As `instance_norm`.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky 2016, equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> y, mean, invstd = fastbn.instance_norm_forward(x)
    >>> mean
    array([[ 2., 20.]])
    >>> invstd.round(4)
    array([[1. , 0.1]])
    """
    return binding.instance_forward(
        x, weight, bias, running_mean, running_var, residual, out, use_input_stats, momentum,
        eps, layout, activation, negative_slope, WITH_STATISTICS,
        (mask, lengths, length_axis)
    )  # fmt: skip


@filled
def instance_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None = None,
    *,
    bias: Vector | None = None,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    """Return the gradients with respect to `x`, weight and bias.

    They are those of `group_norm_backward` with a group for each channel, for
    statistics that are those of `x`.

    Parameters
    ----------
    {dy}
    {forward_x}
    {forward_statistics: of shape (N, C)}
    {forward_affine: (C,)}
    {forward_layout}
    {forward_counted}
    {forward_fusion}
    {dx_out}

    Returns
    -------
    {dx}
    {dparameters: dweight, dbias}
    {dresidual}

    Raises
    ------
    ValueError, TypeError
        As `instance_norm`.

    Notes
    -----
    After ``use_input_stats=False`` the statistics do not depend on `x`, and
    `batch_norm_backward` with ``training=False`` has the gradients, given one
    row of them.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky 2016, equation 3, differentiated.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[[1.0, 2.0, 6.0]]])
    >>> y, mean, invstd = fastbn.instance_norm_forward(x)
    >>> dy = np.array([[[1.0, 0.0, 0.0]]])
    >>> dx, dweight, dbias = fastbn.instance_norm_backward(dy, x, mean, invstd)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1.])
    """
    return binding.instance_backward(
        dy, x, mean, invstd, weight, bias, residual, out, layout, activation, negative_slope,
        (mask, lengths, length_axis)
    )  # fmt: skip
