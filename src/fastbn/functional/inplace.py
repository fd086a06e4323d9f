# SPDX-License-Identifier: BSD-3-Clause
"""Backward of a batch norm whose output took the place of its input.

May compute with parameters and statistics. May not do arithmetic on tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastbn._numpy import OUTPUT, binding
from fastbn.functional.rounding import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Floating, Gradients, Kept, Vector


#: Its inverse is a float32, too.
LEAST_SLOPE = float(np.finfo(np.float32).tiny)
#: Its inverse overflows.
LARGEST_WITHOUT_INVERSE = 2.0**-1024


def check_activation(activation: Activation | None, negative_slope: float) -> None:
    """Raise unless the activation can be undone."""
    if binding.check_activation(activation) not in (None, "leaky_relu"):
        raise ValueError(
            f"activation: expected one that can be undone, None or 'leaky_relu', got {activation!r}"
        )
    slope = binding.check_slope(negative_slope)
    if activation is not None and not slope >= LEAST_SLOPE:
        raise ValueError(
            f"negative_slope: expected at least {LEAST_SLOPE:.1e}, so that the activation can be "
            f"undone, got {negative_slope!r}"
        )


def check_weight(weight: Vector | None, channels: int) -> None:
    """Raise unless `weight` can be undone."""
    if weight is None:
        return
    binding.check_vector(weight, "weight", channels)
    with np.errstate(all="ignore"):
        size = np.abs(weight.astype(np.float64))
        fit = (size > LARGEST_WITHOUT_INVERSE) & (size < np.inf)
    if not fit.all():
        unfit = np.argmin(fit)
        raise ValueError(
            "weight: expected finite numbers other than 0, without which y does not tell what x "
            f"was, got {weight[unfit]} for channel {unfit}"
        )


def batch_norm_backward_inplace(
    dy: NDArray[Floating],
    y: NDArray[Floating],
    invstd: Kept,
    weight: Vector | None = None,
    bias: Vector | None = None,
    *,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    r"""Return the gradients of a batch norm in training from its output alone.

    The input may be gone: ``batch_norm_forward(x, ..., out=x)``. With the activation
    undone, :math:`z`, it is :math:`\hat x = (z - bias) / weight`, and `dx` follows from
    that as in `batch_norm_backward`.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of `y`
        The gradient of the loss with respect to `y`.
    y : ndarray of float16, bfloat16, float32 or float64
        What `batch_norm_forward` returned, unchanged.
    invstd : ndarray of shape (C,), float64 or float32
        The same.
    weight, bias, layout, activation, negative_slope
        As in the forward pass: no weight is 0, and the activation can be undone
        (``None``, or ``"leaky_relu"`` with a slope of at least 1.2e-38).
    out : ndarray of the shape and dtype of `y`, optional
        Where to write `dx`: `dy` or `y` itself, or memory apart from all inputs.

    Returns
    -------
    dx : ndarray
        `out`, or a new array of the shape, dtype and memory order of `y`.
    dweight, dbias : ndarray of shape (C,)
        Of the dtype of `weight`; without it float64 for a float64 `y`, else
        float32.

    Raises
    ------
    ValueError
        For a weight of 0, an activation that cannot be undone, and as
        `batch_norm_backward`.
    TypeError
        As `batch_norm_backward`.

    Notes
    -----
    `y` was rounded: what is recovered of :math:`\hat x` has an error of half a unit in
    the last place of `y`, divided by the weight. In half precision, or with weights much
    smaller than the biases, that is a lot.

    References
    ----------
    S. Rota Bulo, L. Porzi, P. Kontschieder, "In-Place Activated BatchNorm for
    Memory-Optimized Training of DNNs", 2018: section 3, the variant that keeps `y`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = fastbn.batch_norm_forward(x, activation="leaky_relu", out=x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = fastbn.batch_norm_backward_inplace(
    ...     dy, y, invstd, activation="leaky_relu")
    >>> dx.round(5).ravel().tolist()
    [0.00176, -0.0022, 0.00044]
    """
    channels = binding.count_channels(y, layout, "y")
    binding.check_like(dy, "dy", y, "y")
    if 0 < y.size == channels:
        raise ValueError(f"y: expected more than one value per channel, got shape {y.shape}")
    binding.check_parameter(invstd, "invstd", (channels,))
    check_activation(activation, negative_slope)
    check_weight(weight, channels)
    # The kernel gets copies of these.
    for name, vector in (("invstd", invstd), ("weight", weight), ("bias", bias)):
        binding.check_apart(out, vector, name)
    dtype = np.dtype(np.float64 if y.dtype == np.float64 else np.float32)
    signed, shift = np.ones(channels), np.zeros(channels)
    if weight is not None:
        dtype = weight.dtype.newbyteorder("=")
        signed = weight.astype(np.float64)
    if bias is not None:
        shift = binding.check_vector(bias, "bias", channels).astype(np.float64)
    # A batch norm of z, whose mean is the bias and whose deviation is the size of the
    # weight, with such a weight that its gain is that of x.
    size = np.abs(signed)
    training = True
    dx, *gradients = binding.batch_backward(
        dy, y, shift, 1.0 / size, signed * size * invstd.astype(np.float64), None, None, out,
        training, layout, activation, negative_slope, OUTPUT
    )  # fmt: skip
    with np.errstate(all="ignore"):
        dweight, dbias = gradients[0] * np.sign(signed), gradients[1]
        return dx, rounded(dweight, dtype), rounded(dbias, dtype)
