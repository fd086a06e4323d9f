# SPDX-License-Identifier: BSD-3-Clause
# Masks and lengths: which elements of x count, of all channels alike. May check; may not look
# at elements, but at lengths. A part of binding.pyx.

cdef cnp.ndarray checked_mask(obj, cnp.ndarray x, int channel_axis):
    # The axes of x but that of the channels, each of its size or 1.
    cdef cnp.ndarray mask
    cdef bint fits
    cdef int i, axis
    if not cnp.PyArray_Check(obj):
        raise TypeError(f"mask: expected a numpy.ndarray of dtype bool, got {described(obj)}")
    mask = obj
    if cnp.PyArray_TYPE(mask) != cnp.NPY_BOOL:
        raise TypeError(f"mask: expected dtype bool, got {mask.dtype}")
    if isinstance(mask, np.ma.MaskedArray):
        raise TypeError("mask: expected a plain numpy.ndarray, got a masked array, whose mask "
                        "would be ignored")
    fits = mask.ndim == x.ndim - 1
    for i in range(mask.ndim if fits else 0):
        axis = i + (i >= channel_axis)
        fits &= mask.shape[i] == 1 or mask.shape[i] == x.shape[axis]
    if not fits:
        shape = (<object>x).shape
        raise ValueError(
            f"mask: expected the shape of x without its channel axis, "
            f"{shape[:channel_axis] + shape[channel_axis + 1:]}, or 1 in place of a size, got "
            f"{(<object>mask).shape}")
    return mask


cdef int checked_length_axis(length_axis, layout, cnp.ndarray x, int channel_axis,
                             int sample_axis) except -1:
    cdef list others = [i for i in range(x.ndim) if i != channel_axis and i != sample_axis]
    if length_axis is None:
        if len(others) == 1:
            return others[0]
        raise ValueError(
            f"length_axis: expected the letter of an axis of layout, since x, of shape "
            f"{(<object>x).shape}, has {len(others)} axes beside those of instances and "
            "channels, got None")
    if not isinstance(length_axis, str):
        raise TypeError(f"length_axis: expected a letter of layout, got {described(length_axis)}")
    if layout is None or layout == "N...C":
        raise ValueError(f"length_axis: expected a layout that has the letter, got "
                         f"{length_axis!r} with layout={layout!r}")
    if len(length_axis) != 1 or length_axis not in layout or length_axis in "NC":
        raise ValueError(f"length_axis: expected a letter of layout {layout!r} beside N and C, "
                         f"got {length_axis!r}")
    return layout.index(length_axis)


cdef cnp.ndarray checked_lengths(obj, cnp.ndarray x, int sample_axis, int length_axis):
    cdef object lengths
    cdef Py_ssize_t n = x.shape[sample_axis], size = x.shape[length_axis]
    if isinstance(obj, np.ma.MaskedArray):
        raise TypeError("lengths: expected plain integers, got a masked array, whose mask would "
                        "be ignored")
    try:
        lengths = np.asarray(obj)
    except ValueError:      # lists that are no array
        lengths = None
    if lengths is None or (lengths.dtype.kind not in "iu" and lengths.size):
        raise TypeError(f"lengths: expected integers, got "
                        f"{described(obj) if lengths is None else lengths.dtype}")
    if lengths.shape != (n,):
        raise ValueError(f"lengths: expected shape ({n},), one for each instance, "
                         f"got {lengths.shape}")
    if n and not (0 <= int(lengths.min()) and int(lengths.max()) <= size):
        raise ValueError(f"lengths: expected integers from 0 to {size}, the size of axis "
                         f"{length_axis} of x, got {lengths.min()} to {lengths.max()}")
    return np.ascontiguousarray(lengths, np.int64)


cdef int check_counted(mask, lengths, length_axis) except -1:
    # Do these go together?
    if mask is not None and lengths is not None:
        raise ValueError("mask, lengths: expected at most one of them, got both")
    if lengths is None and length_axis is not None:
        raise ValueError(f"length_axis: expected lengths with it, got {length_axis!r} alone")
    return 0


cdef inline bint is_masked(const Frame* f) noexcept:
    return f.call.mask.data != NULL or f.call.lengths != NULL


cdef int take_mask(Frame* f, Arrays a, counted, layout) except -1:
    # (mask, lengths, length_axis) or None; once x and its channel axis are known.
    cdef int i, k, sample_axis
    cdef tuple given = <tuple>counted       # Counted is a subclass, which has no way of its own
    if counted is None:
        return 0
    mask, lengths, length_axis = given[0], given[1], given[2]
    if mask is None and lengths is None and length_axis is None:    # as most often
        return 0
    check_counted(mask, lengths, length_axis)
    if lengths is not None:
        f.call.sample_axis = sample_axis = instance_axis(layout)
        f.call.length_axis = checked_length_axis(length_axis, layout, a.x, f.call.channel_axis,
                                                 sample_axis)
        a.lengths = checked_lengths(lengths, a.x, sample_axis, f.call.length_axis)
        f.call.lengths = <const int64_t*>cnp.PyArray_DATA(a.lengths)
    if mask is not None:
        a.mask = checked_mask(mask, a.x, f.call.channel_axis)
        for i in range(a.x.ndim):
            k = i - (i > f.call.channel_axis)
            f.mask_strides[i] = (0 if i == f.call.channel_axis or a.mask.shape[k] == 1
                                 else a.mask.strides[k])
        f.call.mask.data, f.call.mask.strides = cnp.PyArray_DATA(a.mask), f.mask_strides
    return 0


def mask_for(x_, layout, mask, lengths, length_axis, /):
    """Return a checked mask of x, an array of any dtype; one in the place of lengths; or None.
    """
    cdef cnp.ndarray x = x_
    cdef int axis, along, instances, channels = channel_axis(layout, x)
    check_counted(mask, lengths, length_axis)
    if lengths is None:
        return None if mask is None else checked_mask(mask, x, channels)
    instances = instance_axis(layout)
    along = checked_length_axis(length_axis, layout, x, channels, instances)
    lengths = checked_lengths(lengths, x, instances, along)
    shape, positions = [1] * x.ndim, [1] * x.ndim
    shape[instances], positions[along] = -1, -1
    counts = np.arange(x.shape[along]).reshape(positions) < lengths.reshape(shape)
    return counts.squeeze(channels)
