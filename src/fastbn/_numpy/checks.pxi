# SPDX-License-Identifier: BSD-3-Clause
# What only arrays and Python's numbers can be wrong in. Each check returns what was checked,
# or raises an error that names the argument, what was expected and what came. May not write,
# may not allocate an array. A part of binding.pyx.

cdef object described(obj):
    # What came, in a few words.
    if cnp.PyArray_Check(obj):
        return f"an array of shape {obj.shape} and dtype {obj.dtype}"
    if obj is None:
        return "None"
    return f"{type(obj).__module__}.{type(obj).__qualname__}".removeprefix("builtins.")


cdef str to_install():
    return "" if find_spec("ml_dtypes") else "; pip install ml_dtypes, which has the type"


cdef str torch_hint(obj, str name):
    if str(obj.dtype) == "torch.bfloat16":
        return (f"; pass {name}.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16), "
                f"which shares its memory{to_install()}")
    return f"; pass {name}.detach().numpy(), which shares its memory"


cdef str dtype_hint(dtype, str name):
    if dtype == np.uint16:
        return (f"; if these are the bits of bfloat16, pass {name}.view(ml_dtypes.bfloat16)"
                f"{to_install()}; if they are integers, {name}.astype(np.float32)")
    if dtype.kind in "iubf":
        return f"; convert it first: {name}.astype(np.float32)"
    return ""


cdef cnp.ndarray checked_array(obj, str name, bint half=True):
    if not cnp.PyArray_Check(obj):
        if type(obj).__module__.partition(".")[0] == "torch" and hasattr(obj, "dtype"):
            hint = torch_hint(obj, name)
        elif obj is None:
            hint = ""
        else:
            hint = f"; np.asarray({name}) makes one"
        raise TypeError(f"{name}: expected a numpy.ndarray, got {described(obj)}{hint}")
    if not cnp.PyArray_CheckExact(obj) and isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain numpy.ndarray, got a masked array, "
                        "whose mask would be ignored")
    cdef cnp.ndarray array = obj
    cdef int dtype = dtype_of(array)
    if dtype == OTHER or (not half and dtype not in (FASTBN_FLOAT32, FASTBN_FLOAT64)):
        kinds = "float32, float64, float16 or bfloat16" if half else "float32 or float64"
        raise TypeError(f"{name}: expected dtype {kinds}, got {array.dtype}"
                        f"{dtype_hint(array.dtype, name)}")
    return array


cdef cnp.ndarray checked_vector(obj, str name, Py_ssize_t channels, bint half=True):
    # One number per channel, or None.
    if obj is None:
        return None
    cdef cnp.ndarray array = checked_array(obj, name, half)
    if array.ndim != 1 or array.shape[0] != channels:
        raise ValueError(f"{name}: expected shape ({channels},), one value for each channel of x, "
                         f"got {(<object>array).shape}")
    return array


cdef cnp.ndarray checked_shaped(obj, str name, cnp.ndarray x, int first, int end, bint half=True):
    # An array with the dimensions [first, end) of x, or None.
    if obj is None:
        return None
    cdef cnp.ndarray array = checked_array(obj, name, half)
    if array.ndim != end - first or not cnp.PyArray_CompareLists(
            array.shape, x.shape + first, end - first):
        raise ValueError(f"{name}: expected shape {(<object>x).shape[first:end]}, "
                         f"got {(<object>array).shape}")
    return array


cdef cnp.ndarray checked_table(obj, str name, Py_ssize_t rows, Py_ssize_t columns):
    # Statistics of groups.
    cdef cnp.ndarray array = checked_array(obj, name, False)
    if array.ndim != 2 or array.shape[0] != rows or array.shape[1] != columns:
        raise ValueError(f"{name}: expected shape ({rows}, {columns}), "
                         f"got {(<object>array).shape}")
    return array


cdef object checked_writable(cnp.ndarray array, str name):
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: expected a writable array, got a read-only one")


cdef cnp.ndarray checked_running(obj, str name, Py_ssize_t channels, bint updated):
    cdef cnp.ndarray array = checked_vector(obj, name, channels, False)
    if array is not None and updated:
        checked_writable(array, name)
    return array


cdef object checked_like_x(cnp.ndarray array, str name, cnp.ndarray x, str x_name="x"):
    # By the dimensions in C: a subclass may say anything of its shape.
    if array.ndim != x.ndim or not cnp.PyArray_CompareLists(array.shape, x.shape, x.ndim):
        raise ValueError(f"{name}: expected the shape of {x_name}, {(<object>x).shape}, "
                         f"got {(<object>array).shape}")
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        raise TypeError(f"{name}: expected the dtype of {x_name}, {x.dtype.name}, "
                        f"got {array.dtype.name}")


cdef cnp.ndarray checked_residual(obj, cnp.ndarray x):
    if obj is None:
        return None
    cdef cnp.ndarray array = checked_array(obj, "residual")
    checked_like_x(array, "residual", x)
    return array


cdef int checked_activation(activation) except -1:
    if activation is None:
        return FASTBN_IDENTITY
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    got = repr(activation) if isinstance(activation, str) else described(activation)
    none, *names, last = map(repr, ACTIVATIONS)
    raise (ValueError if isinstance(activation, str) else TypeError)(
        f"activation: expected {none}, {', '.join(names)} or {last}, got {got}")


cdef cnp.ndarray checked_out(obj, cnp.ndarray x):
    if obj is None:
        return None
    cdef cnp.ndarray out = checked_array(obj, "out")
    checked_like_x(out, "out", x)
    checked_writable(out, "out")
    return out


cdef double checked_number(value, str name) except? -1.0:
    if isinstance(value, float):
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a real number, got {described(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within the range of float64, "
                         f"got a larger {described(value)}") from None


cdef bint checked_flag(value, str name) except -1:
    if value is True or value is False:
        return value
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_layout(layout):
    """Raise unless `layout` is None, "N...C", or distinct letters with one C."""
    if layout is None:
        return
    if not isinstance(layout, str):
        raise TypeError(f"layout: expected a string such as 'NHWC', or None, "
                        f"got {described(layout)}")
    if layout == "N...C":
        return
    if not has_letters(layout, "C"):
        raise ValueError("layout: expected distinct letters with exactly one 'C' (such as "
                         f"'NHWC'), or 'N...C', got {layout!r}")


cdef bint has_letters(str layout, str needed):
    # Distinct ones, and among them the one that is needed?
    return (layout.isascii() and layout.isalpha() and needed in layout
            and len(set(layout)) == len(layout))


cdef int channel_axis(layout, cnp.ndarray x, str name="x") except -1:
    cdef int ndim = x.ndim
    if layout is not None:
        check_layout(layout)
    if layout is None or layout == "N...C":
        if ndim < 2:
            wanted = "(N, C, ...)" if layout is None else "(N, ..., C)"
            raise ValueError(f"{name}: expected at least 2 dimensions, {wanted}, got {ndim}, "
                             f"shape {(<object>x).shape}; name its axes with layout=")
        return 1 if layout is None else ndim - 1
    if len(layout) != ndim:
        raise ValueError(f"layout: expected {ndim} letters for {name} of shape "
                         f"{(<object>x).shape}, got {layout!r}")
    return layout.index("C")


cdef int instance_axis(layout) except -1:
    # For operations whose statistics belong to one instance; of a layout that was checked.
    if layout is None or layout == "N...C":
        return 0
    if "N" not in layout:
        raise ValueError(f"layout: expected an 'N' for the axis of the instances, got {layout!r}")
    return layout.index("N")


def axis_of_instances(layout):
    """Return the axis of the instances in a layout that was checked, or raise."""
    return instance_axis(layout)


def check_eps(eps):
    """Return `eps` as a float, or raise. 0 is left for the call to refuse."""
    cdef double number = checked_number(eps, "eps")
    if not core.is_eps(number, False):
        raise eps_error(eps, False)
    return number


cdef double checked_finite(value, str name) except? -1.0:
    cdef double number = checked_number(value, name)
    if not core.is_finite(number):
        raise finite_error(name, value)
    return number


def check_momentum(momentum):
    """Return `momentum` as a float, or raise."""
    return checked_finite(momentum, "momentum")


def check_number(value, name):
    """Return `value`, a real number, as a float, or raise."""
    return checked_number(value, name)


def check_activation(activation):
    """Return `activation`, None or the name of one, or raise."""
    checked_activation(activation)
    return activation


def check_slope(negative_slope):
    """Return `negative_slope` as a float, or raise."""
    return checked_finite(negative_slope, "negative_slope")


def check_apart(out, other, other_name):
    """Raise if `out`, an array that will be written, overlaps another; not for what is none."""
    if (isinstance(out, cnp.ndarray) and isinstance(other, cnp.ndarray)
            and overlapping(out, other)):
        raise ValueError(f"out: expected memory of its own, got an array that overlaps "
                         f"{other_name}")


def check_flag(value, name):
    """Return `value` as a bool, or raise."""
    return bool(checked_flag(value, name))


def check_integer(value, name):
    """Return `value` as an int, or raise."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {described(value)}") from None


def check_array(array, name):
    """Return `array`, of any floating dtype that operations take, or raise."""
    return checked_array(array, name)


def check_vector(array, name, channels):
    """Return `array`, of shape (channels,), or raise."""
    return checked_vector(checked_array(array, name), name, channels)


def check_parameter(array, name, shape):
    """Return `array`, of exactly that shape, or raise."""
    checked_array(array, name, False)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return array


def check_shape(normalized_shape):
    """Return `normalized_shape`, an integer or a sequence of them, as a tuple, or raise."""
    if isinstance(normalized_shape, str) or not isinstance(normalized_shape, Sequence):
        return (positive(normalized_shape, "normalized_shape"),)
    if not normalized_shape:
        raise ValueError("normalized_shape: expected at least one dimension, got none")
    return tuple([positive(size, "normalized_shape") for size in normalized_shape])


cdef object positive(value, str name):
    # 0 is a size, too, of an empty x.
    size = check_integer(value, name)
    if not 0 <= size < 2**63:
        raise ValueError(f"{name}: expected no negative size, got {value}")
    return size


cdef int kept_axes(normalized_shape, cnp.ndarray x) except -1:
    # How many axes go before those that are normalised over.
    cdef tuple shape
    cdef int i, kept
    shape = (normalized_shape,) if type(normalized_shape) is int else check_shape(normalized_shape)
    kept = x.ndim - <int>len(shape)
    if kept >= 0:
        for i in range(kept, x.ndim):
            if x.shape[i] != shape[i - kept]:
                kept = -1
                break
    if kept < 0:
        raise ValueError(f"normalized_shape: expected the last dimensions of x, which has shape "
                         f"{(<object>x).shape}, got {shape}")
    return kept


cdef Py_ssize_t checked_groups(num_groups, Py_ssize_t channels) except -1:
    # Before statistics are: so many of them there must be.
    groups = check_integer(num_groups, "num_groups")
    if not (0 <= groups < 2**63 and core.can_be_grouped(channels, groups)):
        raise ValueError(f"num_groups: expected a divisor of the {channels} channels of x, "
                         f"got {groups}")
    return groups


def axis_of_channels(layout, x):
    """Return the axis of the channels of an array, or raise."""
    return channel_axis(layout, x)


def count_channels(x, layout, name):
    """Return how many channels `x` has, or raise."""
    cdef cnp.ndarray array = checked_array(x, name)
    return array.shape[channel_axis(layout, array, name)]


def check_like(array, name, x, x_name):
    """Raise unless `array` has the shape and the dtype of `x`."""
    checked_like_x(checked_array(array, name), name, x, x_name)


cdef Py_ssize_t checked_channels(cnp.ndarray x, int axis, expected) except -1:
    if expected is not None and x.shape[axis] != <Py_ssize_t>expected:
        raise ValueError(
            f"x: expected {expected} channels on axis {axis}, got shape {(<object>x).shape}")
    return x.shape[axis]


def check_channels(x_, layout, num_features, /):
    """Raise unless `x` has so many channels."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    checked_channels(x, channel_axis(layout, x), num_features)


def overwritten(out, x, residual, /):
    """Return whether what was written to `out` was written over one of the others."""
    return out is not None and (overlapping(x, out) or (residual is not None
                                                        and overlapping(residual, out)))
