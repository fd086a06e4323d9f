# SPDX-License-Identifier: BSD-3-Clause
# Statistics of integers, normalize, denormalize. The engine takes any strides of these, so an
# array is copied only if its bytes are in another order or misaligned. May check arrays, may
# allocate; may not compute with their elements. A part of binding.pyx.

cdef extern from "numpy/ndarraytypes.h":
    enum:
        NPY_UBYTE
        NPY_BYTE
        NPY_USHORT
        NPY_SHORT

cdef str FLOATS = "float32, float64, float16, bfloat16"
cdef str ALL_TYPES = FLOATS + ", uint8, int8, uint16 or int16"


cdef int any_dtype_of(cnp.ndarray a) except -1:
    # That of fastbn.h, integers included.
    cdef int number = cnp.PyArray_TYPE(a)
    if number == NPY_UBYTE:
        return FASTBN_UINT8
    if number == NPY_BYTE:
        return FASTBN_INT8
    if number == NPY_USHORT:
        return FASTBN_UINT16
    return FASTBN_INT16 if number == NPY_SHORT else dtype_of(a)


cdef int checked_dtype(dtype, bint integers) except -1:
    # The number of a dtype to write.
    cdef int number
    if dtype is None:
        raise TypeError(f"dtype: expected {ALL_TYPES if integers else FLOATS}, got None")
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected {ALL_TYPES if integers else FLOATS}, "
                        f"got {dtype!r}") from None
    number = any_dtype_of(np.empty(0, wanted))
    if number == OTHER or not wanted.isnative or (number >= FASTBN_UINT8 and not integers):
        raise TypeError(f"dtype: expected {ALL_TYPES if integers else FLOATS}, got {wanted}")
    return number


cdef bint holds_integers(x) except -1:
    return (cnp.PyArray_Check(x) and not isinstance(x, np.ma.MaskedArray)
            and any_dtype_of(x) >= FASTBN_UINT8)


cdef cnp.ndarray checked_image(obj, str name):
    if holds_integers(obj):
        return obj
    if cnp.PyArray_Check(obj) and any_dtype_of(obj) == OTHER:
        raise TypeError(f"{name}: expected dtype {ALL_TYPES}, got {obj.dtype}")
    return checked_array(obj, name)


def check_image(x, layout, /):
    """Return the channels' axis of x, of a dtype that statistics have; and if of integers."""
    cdef cnp.ndarray array = checked_image(x, "x")
    return channel_axis(layout, array), holds_integers(array)


cdef cnp.ndarray readable(cnp.ndarray a):
    # The array itself, if it is aligned and of this machine's byte order.
    cdef int axis
    cdef bint whole = cnp.PyArray_ISBEHAVED_RO(a)
    for axis in range(a.ndim):
        whole &= a.strides[axis] % a.itemsize == 0
    return a if whole else np.asarray(a).astype(a.dtype.newbyteorder("="), order="K")


cdef void describe_image(Frame* f, int argument, cnp.ndarray a) noexcept:
    cdef fastbn_tensor* tensor = tensor_of(&f.call, argument)
    cdef Py_ssize_t* strides = f.strides[argument - ARG_X]
    cdef int axis
    for axis in range(a.ndim):
        strides[axis] = a.strides[axis] // a.itemsize
    tensor.data, tensor.strides = cnp.PyArray_DATA(a), strides


cdef int begin_image(Frame* f, cnp.ndarray x, int axis, int operation) except -1:
    new_call(f, x, FASTBN_BATCH_NORM, operation)
    f.call.dtype, f.call.channel_axis = any_dtype_of(x), axis
    describe_image(f, ARG_X, x)
    return 0


cdef int run_image(Frame* f, cnp.ndarray out) except -1:
    cdef int code = core.understand(&f.call, &f.extras, &f.request)
    if code == FASTBN_BAD_STRIDES:
        raise apart_error("out", out)
    if code != FASTBN_OK:
        raise RuntimeError(f"the engine refused a call with code {code} for argument "
                           f"{f.request.fault.argument}")
    try:
        run_request(f)
    finally:
        core.release(&f.request)
    return 0


# ---- statistics ----------------------------------------------------------------------

def integer_statistics(x_, int axis, mask_, nodata_, /):
    """Return (counts, mean, M2, min, max, sums) of x, a checked array of integers.

    `mask` has the shape of x but for the channels, or is None; `nodata` has a number for each
    channel, or is None. The sums are of shape (C, 4): the lower and the upper 64 bits of the
    sum, and of the sum of squares.
    """
    cdef cnp.ndarray x = readable(x_), mask = mask_, nodata = nodata_
    cdef Py_ssize_t channels = x.shape[axis]
    cdef cnp.ndarray mean = new_vector(channels, cnp.NPY_DOUBLE)
    cdef cnp.ndarray m2 = new_vector(channels, cnp.NPY_DOUBLE)
    cdef cnp.ndarray low = new_vector(channels, cnp.PyArray_TYPE(x))
    cdef cnp.ndarray high = new_vector(channels, cnp.PyArray_TYPE(x))
    cdef cnp.ndarray counts = new_vector(channels, cnp.NPY_INT64)
    cdef cnp.ndarray sums = np.empty((channels, 4), np.int64)
    cdef Frame f
    cdef int i
    begin_image(&f, x, axis, FASTBN_STATISTICS)
    f.call.mean, f.call.m2 = numbers_of(mean), numbers_of(m2)
    f.call.minimum, f.call.maximum = cnp.PyArray_DATA(low), cnp.PyArray_DATA(high)
    f.extras.sums = <int64_t*>cnp.PyArray_DATA(sums)
    f.extras.counts = <int64_t*>cnp.PyArray_DATA(counts)
    if nodata is not None:
        f.extras.nodata = <const int32_t*>cnp.PyArray_DATA(nodata)
    if mask is not None:
        for i in range(x.ndim):
            f.mask_strides[i] = 0 if i == axis else mask.strides[i - (i > axis)]
        f.call.mask.data, f.call.mask.strides = cnp.PyArray_DATA(mask), f.mask_strides
    run_image(&f, None)
    return counts, mean, m2, low, high, sums


# ---- normalize, denormalize ----------------------------------------------------------

cdef list out_axes(layout, out_layout, cnp.ndarray x):
    # Where each axis of `out` is in x; None: where it is in `out`.
    if out_layout is None:
        return None
    if not isinstance(out_layout, str):
        raise TypeError(f"out_layout: expected a string such as 'NCHW', or None, "
                        f"got {described(out_layout)}")
    if layout is None or layout == "N...C":
        raise ValueError("out_layout: expected layout to name the axes of x with letters, "
                         f"got layout={layout!r}")
    if len(out_layout) != len(layout) or set(out_layout) != set(layout):
        raise ValueError(f"out_layout: expected the letters of layout, {layout!r}, in another "
                         f"order, got {out_layout!r}")
    return [layout.index(letter) for letter in out_layout]


cdef cnp.ndarray numbers_of_channels(value, str name, Py_ssize_t channels, bint positive):
    # One for each channel, in float64.
    cdef cnp.ndarray vector
    cdef Py_ssize_t c
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected real numbers, got a masked array")
    try:
        given = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected a number or shape ({channels},), "
                         f"got {value!r}") from None
    if given.dtype.kind not in "iuf" and given.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected real numbers, got {described(value)}")
    if given.ndim > 1 or (given.ndim == 1 and given.shape[0] != channels):
        raise ValueError(f"{name}: expected a number or shape ({channels},), got {given.shape}")
    vector = np.empty(channels)
    vector[:] = given
    for c in range(channels):
        number = numbers_of(vector)[c]
        if not core.is_finite(number) or (positive and not number > 0.0):
            wanted = "finite numbers > 0" if positive else "finite numbers"
            raise ValueError(f"{name}: expected {wanted}, got {number!r} for channel {c}")
    return vector


cdef object descr_of(int dtype):
    if dtype == FASTBN_UINT8:
        return cnp.PyArray_DescrFromType(NPY_UBYTE)
    if dtype == FASTBN_INT8:
        return cnp.PyArray_DescrFromType(NPY_BYTE)
    if dtype == FASTBN_UINT16:
        return cnp.PyArray_DescrFromType(NPY_USHORT)
    return cnp.PyArray_DescrFromType(NPY_SHORT if dtype == FASTBN_INT16 else type_number(dtype))


cdef cnp.ndarray new_converted(cnp.ndarray x, list axes, int dtype):
    # In C order where axes are named, else in the memory order of x.
    if axes is None:
        return np.empty_like(x, descr_of(dtype), order="K", subok=False)
    return np.empty([x.shape[<int>i] for i in axes], descr_of(dtype))


cdef cnp.ndarray checked_converted(obj, cnp.ndarray x, str name, list axes, int dtype):
    # An `out` that was given.
    cdef cnp.ndarray out
    wanted = descr_of(dtype)
    if not cnp.PyArray_Check(obj) or isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"out: expected a numpy.ndarray, got {described(obj)}")
    out = obj
    if out.dtype != wanted:
        raise TypeError(f"out: expected dtype {wanted}, got {out.dtype}")
    shape = (<object>x).shape
    if axes is not None:
        shape = tuple([shape[i] for i in axes])
    if (<object>out).shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {(<object>out).shape}")
    checked_writable(out, "out")
    if overlapping(x, out):
        raise ValueError("out: expected memory of its own, got an array that overlaps "
                         f"{name}")
    return out


def convert_image(x_, mean_, std_, layout, out_layout, max_value, dtype, out_, bint inverse, /):
    """normalize, or with `inverse` denormalize; `functional` has the documentation."""
    cdef str name = "y" if inverse else "x"
    cdef cnp.ndarray given = checked_array(x_, name) if inverse else checked_image(x_, name)
    cdef int axis = channel_axis(layout, given, name)
    cdef list axes = out_axes(layout, out_layout, given)
    cdef int out_dtype = checked_dtype(dtype, inverse)
    cdef Py_ssize_t channels = given.shape[axis]
    cdef cnp.ndarray mean = numbers_of_channels(mean_, "mean", channels, False)
    cdef cnp.ndarray std = numbers_of_channels(std_, "std", channels, True)
    cdef double largest = checked_finite(max_value, "max_value")
    cdef cnp.ndarray x, out, in_place, written
    cdef Frame f
    if not largest > 0.0:
        raise ValueError(f"max_value: expected a number > 0, got {max_value!r}")
    if out_ is None:
        out = new_converted(given, axes, out_dtype)
    else:
        out = checked_converted(out_, given, name, axes, out_dtype)
    if cnp.PyArray_SIZE(given) == 0:
        return out
    x = readable(given)
    written = in_place = out if axes is None else np.asarray(out).transpose(
        [axes.index(i) for i in range(x.ndim)])
    if readable(in_place) is not in_place:
        written = new_converted(x, None, out_dtype)
    begin_image(&f, x, axis, FASTBN_DENORMALIZE if inverse else FASTBN_NORMALIZE)
    f.call.out_dtype, f.call.max_value = out_dtype, largest
    f.call.norm_mean, f.call.norm_std = numbers_of(mean), numbers_of(std)
    describe_image(&f, ARG_OUT, written)
    run_image(&f, out)
    if written is not in_place:
        copy_into(in_place, written)
    return out
