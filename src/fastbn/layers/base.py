# SPDX-License-Identifier: BSD-3-Clause
"""What all layers share: calls, backward, modes, parameters, state.

A layer adds its arguments, `_forward` and `_gradients`, which call what does the work, and
what `__repr__` shows. May keep state. May not do arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional.counted import Counted, counted_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from fastbn._types import Activation, Floating, Gradients, Kept


def checked_size(value: SupportsIndex, name: str) -> int:
    """Return a number of channels or groups as an int, or raise."""
    size = binding.check_integer(value, name)
    if not 1 <= size < 2**48:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return size


def _checked_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in (np.float32, np.float64):
        raise TypeError(
            f"dtype: expected float32 or float64, got {dtype!r}; parameters are kept in one of "
            "these, also where x is float16 or bfloat16"
        )
    return found


def _checked_batches(value: object) -> int:
    array = np.asarray(value)
    if array.shape not in ((), (1,)) or array.dtype.kind not in "iu":
        raise TypeError(f"num_batches_tracked: expected an integer, got {value!r}")
    batches = int(array.item())
    if not 0 <= batches < 2**63:
        raise ValueError(f"num_batches_tracked: expected at least 0, got {value!r}")
    return batches


class Layer:
    """Parameters of one shape, training and evaluation, and what backward needs.

    Parameters
    ----------
    shape : tuple of int
        Of `weight` and `bias`, and of the other arrays of the state.
    dtype : dtype
        Of the same: float32 or float64.
    weight, bias : bool
        Whether there is one; otherwise it is ``None``.
    activation, negative_slope
        As for the functions.
    """

    #: Arguments that `__repr__` shows where they differ from these.
    _defaults: tuple[tuple[str, object], ...]

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        activation: Activation | None,
        negative_slope: float,
        *,
        weight: bool,
        bias: bool,
    ) -> None:
        self.dtype = _checked_dtype(dtype)
        self.activation = binding.check_activation(activation)
        self.negative_slope = binding.check_slope(negative_slope)
        self.training = True
        self.weight: Kept | None = np.ones(shape, self.dtype) if weight else None
        self.bias: Kept | None = np.zeros(shape, self.dtype) if bias else None
        self.weight_grad: Kept | None = None
        self.bias_grad: Kept | None = None
        self._shape = shape
        self._parameters = [n for n in ("weight", "bias") if getattr(self, n) is not None]
        # What backward needs: (x, residual, statistics).
        self._saved: tuple[NDArray, NDArray | None, tuple] | None = None
        self._overwritten = False  # a tensor of the last call is gone, so backward is too

    def _forward(self, x: Any, residual: Any, out: Any, training: bool) -> Any:
        # In training a tuple: y, then the statistics that `_gradients` gets back. Else y.
        # What it refuses has changed nothing.
        raise NotImplementedError

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        # Of x, weight and bias, in this order, then of the residual, if there was one.
        raise NotImplementedError

    @filled
    def __call__(
        self,
        x: NDArray[Floating],
        out: NDArray[Floating] | None = None,
        *,
        residual: NDArray[Floating] | None = None,
    ) -> NDArray[Floating]:
        """Normalise `x`; in training, keep what `backward` needs.

        Parameters
        ----------
        x : ndarray of float16, bfloat16, float32 or float64
            With the channels of the layer, or the last axes of its `normalized_shape`.
            In training a reference to it is kept for `backward`, until the next call or
            `eval`.
        {layer_out}
        {layer_residual}

        Returns
        -------
        {y}

        Raises
        ------
        ValueError, TypeError
            As the function of the same operation, such as `batch_norm`; and for another
            number of channels. A call that is refused changes nothing.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(2).eval()
        >>> bn(np.array([[1.0, 2.0]])).round(3)
        array([[1., 2.]])
        """
        training = self.training
        result: Any = self._forward(x, residual, out, training)
        if not training:
            self._saved, self._overwritten = None, False
            return result
        self._keep(x, residual, out, result[1:])
        return result[0]

    def _keep(self, x: Any, residual: Any, out: Any, statistics: tuple) -> None:
        # For backward, unless `out` has taken the place of an input.
        self._overwritten = out is not None and binding.overwritten(out, x, residual)
        self._saved = None if self._overwritten else (x, residual, statistics)

    def backward(self, dy: NDArray[Floating], out: NDArray[Floating] | None = None) -> Any:
        """Return `dx` of the last call in training; set the gradients of the parameters.

        `weight_grad` and `bias_grad` are set, not added to. After a call with a
        residual, the gradient of that is returned, too.

        Parameters
        ----------
        dy : ndarray of the shape and dtype of the last `x`
            The gradient of the loss with respect to `y`.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write `dx`; ``out=x`` rules out a second `backward`.

        Returns
        -------
        dx : ndarray
        dresidual : ndarray
            Only with a residual: then the two are a tuple.

        Raises
        ------
        RuntimeError
            Before a call in training, after `eval`, or if `x` or the residual was
            overwritten through `out`.
        ValueError, TypeError
            As the function of the same operation, such as `batch_norm_backward`.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1)
        >>> y = bn(np.array([[1.0], [2.0], [6.0]]))
        >>> bn.backward(np.array([[1.0], [0.0], [0.0]])).round(3).ravel().tolist()
        [0.176, -0.22, 0.044]
        """
        if self._overwritten:
            raise RuntimeError(
                "backward: the x or the residual of the last call was overwritten through out="
            )
        if self._saved is None:
            raise RuntimeError("backward: expected a call in training mode before it, got none")
        x, residual, statistics = self._saved
        dx, *gradients = self._gradients(dy, x, statistics, residual, out)
        if binding.overwritten(out, x, residual):
            self._saved, self._overwritten = None, True
        self._set_gradients(gradients)
        return dx if residual is None else (dx, gradients[-1])

    def _set_gradients(self, gradients: list) -> None:
        # The functions return one also for a parameter that the layer does not have; that of
        # a residual is the last.
        for name, gradient in zip(("weight", "bias"), gradients, strict=False):
            if name in self._parameters:
                setattr(self, f"{name}_grad", gradient)

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode (or, with ``mode=False``, to evaluation); return self.

        Parameters
        ----------
        mode : bool, default True
            Training or evaluation.

        Returns
        -------
        the layer itself

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(2).train().training
        True
        """
        self.training = binding.check_flag(mode, "mode")
        if not self.training:
            self._saved, self._overwritten = None, False
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode and forget the last input; return self.

        Returns
        -------
        the layer itself

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(2).eval().training
        False
        """
        return self.train(False)

    def _state_names(self) -> list[str]:
        return list(self._parameters)

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

    def load_state_dict(
        self, state_dict: Mapping[str, NDArray], strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """Copy parameters and statistics from a dictionary with PyTorch's names.

        All of it is checked before anything is changed.

        Parameters
        ----------
        state_dict : mapping of str to ndarray
            The names of `state_dict`, with arrays of float16, bfloat16, float32 or
            float64; ``num_batches_tracked`` is an integer, an array of shape () or (1,).
            Of a PyTorch module: ``{k: v.numpy() for k, v in module.state_dict().items()}``.
        strict : bool, default True
            Raise if a name is missing or unexpected; otherwise such names are left out.

        Returns
        -------
        missing_keys : list of str
            Names of the layer that `state_dict` does not have. ``num_batches_tracked``,
            which older checkpoints do not have, is not among them: it stays as it is.
        unexpected_keys : list of str
            Names of `state_dict` that the layer does not have.

        Raises
        ------
        KeyError
            If `strict`, and a name is missing or unexpected.
        ValueError, TypeError
            If a shape or a dtype does not fit.

        Examples
        --------
        >>> import fastbn
        >>> a, b = fastbn.BatchNorm(2), fastbn.BatchNorm(2)
        >>> a.weight[:] = 3.0
        >>> b.load_state_dict(a.state_dict())
        ([], [])
        >>> b.weight
        array([3., 3.], dtype=float32)
        >>> b.load_state_dict({"weight": a.weight, "scale": a.weight}, strict=False)
        (['bias', 'running_mean', 'running_var'], ['scale'])
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        strict = binding.check_flag(strict, "strict")
        names = self._state_names()
        missing = [n for n in names if n not in state_dict and n != "num_batches_tracked"]
        unexpected = [name for name in state_dict if name not in names]
        if strict and (missing or unexpected):
            raise KeyError(
                f"state_dict: expected the names {names}, got {list(state_dict)}, "
                f"where {missing} are missing and {unexpected} unexpected"
            )
        loaded = {n: self._checked(n, state_dict[n]) for n in names if n in state_dict}
        for name, value in loaded.items():
            if isinstance(value, int):
                setattr(self, name, value)
            else:
                getattr(self, name)[...] = value
        self._begin_anew()
        return missing, unexpected

    def _begin_anew(self) -> None:
        # Forget what came before the running statistics that are there now.
        pass

    def _checked(self, name: str, value: object) -> Kept | int:
        if name == "num_batches_tracked":
            return _checked_batches(value)
        array = binding.check_array(value, name)
        if array.shape != self._shape:
            raise ValueError(f"{name}: expected shape {self._shape}, got {array.shape}")
        kept = binding.check_parameter(getattr(self, name), f"the layer's {name}", self._shape)
        if not kept.flags.writeable:
            raise ValueError(f"the layer's {name}: expected a writable array, got a read-only one")
        with np.errstate(all="ignore"):
            return array.astype(self.dtype)

    @contextmanager
    def _as_before_on_error(self) -> Iterator[None]:
        before = dict(self.__dict__)
        arrays = [
            (array, array.copy())
            for array in before.values()
            if isinstance(array, np.ndarray) and array.flags.writeable
        ]
        try:
            yield
        except BaseException:
            for array, old in arrays:
                array[...] = old
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def __getstate__(self) -> dict[str, object]:
        # Copies and pickles leave the last batch behind.
        return self.__dict__ | {"_saved": None, "_overwritten": False}

    def _arguments(self) -> str:
        # Those that `__repr__` shows always.
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = [self._arguments()]
        for name, default in (*self._defaults, ("activation", None), ("negative_slope", 0.01)):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.dtype != np.float32:
            shown.append(f"dtype={self.dtype}")
        if not self.training:
            shown.append("training=False")
        if getattr(self, "frozen", False):
            shown.append("frozen=True")
        return f"{type(self).__name__}({', '.join(shown)})"


class ChannelLayer(Layer):
    """A layer of channels, of whose input a mask may leave a part.

    `_gradients` finds what counted behind the statistics.
    """

    def _forward_counted(
        self, x: Any, residual: Any, out: Any, training: bool, counted: Counted
    ) -> Any:
        # As `_forward`.
        raise NotImplementedError

    @filled
    def __call__(
        self,
        x: NDArray[Floating],
        out: NDArray[Floating] | None = None,
        *,
        residual: NDArray[Floating] | None = None,
        mask: NDArray[np.bool_] | None = None,
        lengths: ArrayLike | None = None,
        length_axis: str | None = None,
    ) -> NDArray[Floating]:
        """Normalise `x`; in training, keep what `backward` needs.

        Parameters
        ----------
        {layer_channels}
        {layer_out}
        {layer_residual}
        {counted}
            `backward` uses what the call had.

        Returns
        -------
        {y}

        Raises
        ------
        ValueError, TypeError
            As the function of the same operation, such as `batch_norm`; and for another
            number of channels. A call that is refused changes nothing.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1, layout="NTC")
        >>> x = np.array([[[1.0], [3.0], [np.nan]], [[5.0], [np.nan], [np.nan]]])
        >>> bn(x, lengths=[2, 1]).round(3)[..., 0]
        array([[-1.225,  0.   ,  0.   ],
               [ 1.225,  0.   ,  0.   ]])
        """
        training = self.training
        counted = counted_of(mask, lengths, length_axis)
        result: Any = self._forward_counted(x, residual, out, training, counted)
        if not training:
            self._saved, self._overwritten = None, False
            return result
        self._keep(x, residual, out, (*result[1:], counted))
        return result[0]


class TrackingLayer(ChannelLayer):
    """A layer of channels that may keep running statistics; its arguments are `BatchNorm`'s."""

    _defaults: tuple[tuple[str, object], ...] = (
        ("affine", True), ("track_running_stats", True), ("layout", None)
    )  # fmt: skip

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str | None = None,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = checked_size(num_features, "num_features")
        self.eps = binding.check_eps(eps)
        self.momentum = None if momentum is None else binding.check_momentum(momentum)
        binding.check_layout(layout)
        self.layout = layout
        self.affine = binding.check_flag(affine, "affine")
        self.track_running_stats = binding.check_flag(track_running_stats, "track_running_stats")
        shape, tracks = (self.num_features,), self.track_running_stats
        super().__init__(
            shape, dtype, activation, negative_slope, weight=self.affine, bias=self.affine
        )
        self.running_mean: Kept | None = np.zeros(shape, self.dtype) if tracks else None
        self.running_var: Kept | None = np.ones(shape, self.dtype) if tracks else None
        self.num_batches_tracked: int | None = 0 if tracks else None

    def reset_running_stats(self) -> None:
        """Make running statistics what they were in the beginning: mean 0, variance 1.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1)
        >>> y = bn(np.array([[1.0], [3.0]]))
        >>> bn.reset_running_stats()
        >>> bn.running_mean, bn.num_batches_tracked
        (array([0.], dtype=float32), 0)
        """
        if self.running_mean is not None:
            self.running_mean[...] = 0.0
        if self.running_var is not None:
            self.running_var[...] = 1.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked = 0
        self._begin_anew()

    def _average_momentum(self) -> float:
        # The momentum that makes running statistics the plain average over batches.
        return 1.0 / ((self.num_batches_tracked or 0) + 1)

    def _count(self, x: NDArray, counted: Counted) -> None:
        # A batch of which nothing counts leaves the running statistics alone, and so this number.
        if self.num_batches_tracked is not None and x.size and counted.anything():
            self.num_batches_tracked += 1

    def _leave_out(self, *, weight: bool, bias: bool, running: bool) -> None:
        # What another framework has not, so that it is not trained or kept.
        if weight:
            self.weight = None
        if bias:
            self.bias = None
        self._parameters = [n for n in ("weight", "bias") if getattr(self, n) is not None]
        self.affine = bool(self._parameters)
        if running:
            self.running_mean = self.running_var = self.num_batches_tracked = None
            self.track_running_stats = False

    def _state_names(self) -> list[str]:
        names = super()._state_names()
        if self.track_running_stats:
            names += ["running_mean", "running_var", "num_batches_tracked"]
        return names

    def _arguments(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}"
