# SPDX-License-Identifier: BSD-3-Clause
"""The layer: parameters, running statistics, training and evaluation mode.

May keep state. May not do arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from fastbn import _view
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_forward

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from fastbn._types import Floating, Vector


class BatchNorm:
    """Batch normalisation with parameters and running statistics.

    As ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one, for NumPy arrays.

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    momentum : float or None, default 0.1
        The share of the new value in a running statistic. ``None``: running
        statistics are the plain average over all batches so far.
    affine : bool, default True
        Keep `weight` and `bias`; otherwise both are ``None``.
    track_running_stats : bool, default True
        Keep running statistics; otherwise evaluation, too, normalises with the
        statistics of the batch.
    layout : str, optional
        As for `batch_norm`.
    dtype : dtype, default float32
        Of parameters and running statistics: float32 or float64. The input may
        be either; `y` has the dtype of `x`.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,), or None
    running_mean, running_var : ndarray of shape (C,), or None
    num_batches_tracked : int or None
        How many batches the running statistics have seen.
    weight_grad, bias_grad : ndarray of shape (C,), or None
        Set by `backward`.
    training : bool
        Set by `train` and `eval`.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of a wrong type.

    References
    ----------
    Ioffe & Szegedy 2015, algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3, layout="NHWC")
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 4, 4, 3)).astype(np.float32)
    >>> y = bn(x)
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-5)
    (True, True)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.bias_grad
    array([128., 128., 128.], dtype=float32)
    >>> bn.eval()
    BatchNorm(3, eps=1e-05, momentum=0.1, layout='NHWC', training=False)
    """

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = _view.check_integer(num_features, "num_features")
        if not 1 <= self.num_features < 2**48:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        self.eps = _view.check_eps(eps)
        self.momentum = None if momentum is None else _view.check_momentum(momentum)
        _view.check_layout(layout)
        self.layout = layout
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
        if dtype is None or self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}")
        self.affine = _view.check_flag(affine, "affine")
        self.track_running_stats = _view.check_flag(track_running_stats, "track_running_stats")
        self.training = True
        shape = self.num_features
        self.weight: Vector | None = np.ones(shape, self.dtype) if affine else None
        self.bias: Vector | None = np.zeros(shape, self.dtype) if affine else None
        self.weight_grad: Vector | None = None
        self.bias_grad: Vector | None = None
        tracks = self.track_running_stats
        self.running_mean: Vector | None = np.zeros(shape, self.dtype) if tracks else None
        self.running_var: Vector | None = np.ones(shape, self.dtype) if tracks else None
        self.num_batches_tracked: int | None = 0 if tracks else None
        self._saved: tuple | None = None  # (x, mean, invstd): what backward needs
        self._overwritten = False  # x of the last call is gone, so backward is too

    def __call__(
        self, x: NDArray[Floating], out: NDArray[Floating] | None = None
    ) -> NDArray[Floating]:
        """Normalise `x`.

        Parameters
        ----------
        x : ndarray of float32 or float64
            With `num_features` channels. In training a reference to it is kept
            for `backward`, until the next call or `eval`.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write `y`; `x` itself is allowed, but rules out `backward`.

        Returns
        -------
        y : ndarray
            `out`, or a new array of the shape, dtype and memory order of `x`.

        Raises
        ------
        ValueError, TypeError
            As `batch_norm`; and for another number of channels.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(2).eval()
        >>> bn(np.array([[1.0, 2.0]])).round(3)
        array([[1., 2.]])
        """
        _view.check_channels(x, self.layout, self.num_features)
        if not self.training:
            self._saved, self._overwritten = None, False
            return batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.running_mean is None,
                eps=self.eps,
                layout=self.layout,
                out=out,
            )
        y, mean, invstd = batch_norm_forward(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            momentum=self._next_momentum(),
            eps=self.eps,
            layout=self.layout,
            out=out,
        )
        if self.num_batches_tracked is not None and x.size:
            self.num_batches_tracked += 1
        self._overwritten = out is not None and _view.overlapping(x, out)
        self._saved = None if self._overwritten else (x, mean, invstd)
        return y

    def _next_momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        return 1.0 / ((self.num_batches_tracked or 0) + 1)

    def backward(
        self, dy: NDArray[Floating], out: NDArray[Floating] | None = None
    ) -> NDArray[Floating]:
        """Return `dx` of the last call in training; set the gradients of the parameters.

        `weight_grad` and `bias_grad` are set, not added to.

        Parameters
        ----------
        dy : ndarray of the shape and dtype of the last `x`
            The gradient of the loss with respect to `y`.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write `dx`; ``out=x`` rules out a second `backward`.

        Returns
        -------
        dx : ndarray

        Raises
        ------
        RuntimeError
            Before a call in training, after `eval`, or if `x` was overwritten
            by ``out=x``.
        ValueError, TypeError
            As `batch_norm_backward`.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1)
        >>> y = bn(np.array([[1.0], [2.0], [6.0]]))
        >>> bn.backward(np.ones((3, 1))).ravel().tolist()
        [0.0, 0.0, 0.0]
        """
        if self._overwritten:
            raise RuntimeError("backward: the x of the last call was overwritten through out=")
        if self._saved is None:
            raise RuntimeError("backward: expected a call in training mode before it, got none")
        x, mean, invstd = self._saved
        dx, dweight, dbias = batch_norm_backward(
            dy, x, mean, invstd, self.weight, layout=self.layout, out=out
        )
        if out is not None and _view.overlapping(x, out):
            self._saved, self._overwritten = None, True
        if self.affine:
            self.weight_grad, self.bias_grad = dweight, dbias
        return dx

    def train(self, mode: bool = True) -> BatchNorm:
        """Switch to training mode (or, with ``mode=False``, to evaluation); return self.

        Parameters
        ----------
        mode : bool, default True
            Training or evaluation.

        Returns
        -------
        BatchNorm

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(2).train().training
        True
        """
        self.training = _view.check_flag(mode, "mode")
        if not self.training:
            self._saved, self._overwritten = None, False
        return self

    def eval(self) -> BatchNorm:
        """Switch to evaluation mode and forget the last input; return self.

        Returns
        -------
        BatchNorm

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(2).eval().training
        False
        """
        return self.train(False)

    def _state_names(self) -> list[str]:
        names = ["weight", "bias"] if self.affine else []
        if self.track_running_stats:
            names += ["running_mean", "running_var", "num_batches_tracked"]
        return names

    def state_dict(self) -> dict[str, NDArray]:
        """Return copies of parameters and statistics under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            ``num_batches_tracked`` is an array of shape () and dtype int64, as
            in PyTorch.

        Examples
        --------
        >>> import fastbn
        >>> sorted(fastbn.BatchNorm(2).state_dict())
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
        """
        return {
            name: np.array(getattr(self, name), np.int64 if name == "num_batches_tracked" else None)
            for name in self._state_names()
        }

    def load_state_dict(self, state_dict: Mapping[str, NDArray]) -> None:
        """Copy parameters and statistics from a dictionary with PyTorch's names.

        All of it is checked before anything is changed.

        Parameters
        ----------
        state_dict : mapping of str to ndarray
            Exactly the names of `state_dict`. Of a PyTorch module:
            ``{k: v.numpy() for k, v in module.state_dict().items()}``.

        Raises
        ------
        KeyError
            If a name is missing or unknown.
        ValueError, TypeError
            If a shape or a dtype does not fit.

        Examples
        --------
        >>> import fastbn
        >>> a, b = fastbn.BatchNorm(2), fastbn.BatchNorm(2)
        >>> a.weight[:] = 3.0
        >>> b.load_state_dict(a.state_dict())
        >>> b.weight
        array([3., 3.], dtype=float32)
        """
        names = self._state_names()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        if set(state_dict) != set(names):
            raise KeyError(
                f"state_dict: expected exactly {sorted(names)}, got {sorted(state_dict, key=repr)}"
            )
        batches = self.num_batches_tracked
        loaded = {}
        for name in names:
            if name == "num_batches_tracked":
                batches = self._checked_batches(state_dict[name])
                continue
            vector = _view.check_vector(state_dict[name], name, self.num_features)
            if not getattr(self, name).flags.writeable:
                raise ValueError(f"{name}: expected a writable array in the layer")
            with np.errstate(all="ignore"):
                loaded[name] = vector.astype(self.dtype)
        for name, values in loaded.items():
            getattr(self, name)[...] = values
        self.num_batches_tracked = batches

    @staticmethod
    def _checked_batches(value: object) -> int:
        array = np.asarray(value)
        if array.shape != () or array.dtype.kind not in "iu":
            raise TypeError(f"num_batches_tracked: expected an integer, got {value!r}")
        if not 0 <= int(array) < 2**63:
            raise ValueError(f"num_batches_tracked: expected at least 0, got {value!r}")
        return int(array)

    def __getstate__(self) -> dict[str, object]:
        # Copies and pickles leave the last batch behind.
        return self.__dict__ | {"_saved": None, "_overwritten": False}

    def __repr__(self) -> str:
        parts = [str(self.num_features), f"eps={self.eps:g}", f"momentum={self.momentum}"]
        if not self.affine:
            parts.append("affine=False")
        if not self.track_running_stats:
            parts.append("track_running_stats=False")
        if self.layout is not None:
            parts.append(f"layout={self.layout!r}")
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        if not self.training:
            parts.append("training=False")
        return f"BatchNorm({', '.join(parts)})"
