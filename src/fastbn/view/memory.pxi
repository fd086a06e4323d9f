# SPDX-License-Identifier: BSD-3-Clause
# Where the elements of arrays are: the order of axes, overlaps, new arrays in a given
# order. May not touch the elements. A part of _view.pyx.

cdef inline Axes axes_of(cnp.ndarray a) noexcept:
    return Axes(a.ndim, <const Py_ssize_t*>a.shape, <const Py_ssize_t*>a.strides, a.itemsize)


cdef bint overlaps_itself(cnp.ndarray a) noexcept:
    cdef Axes axes = axes_of(a)
    return cnp.PyArray_SIZE(a) > 0 and steps_over_itself(&axes)


cdef void extent(cnp.ndarray a, uintptr_t* low, uintptr_t* high) noexcept:
    cdef int axis
    cdef Py_ssize_t span
    low[0] = <uintptr_t>cnp.PyArray_DATA(a)
    high[0] = low[0] + a.itemsize
    for axis in range(a.ndim):
        span = (a.shape[axis] - 1) * a.strides[axis]
        if span < 0:
            low[0] += span
        else:
            high[0] += span


cdef bint overlap(cnp.ndarray a, cnp.ndarray b):
    cdef uintptr_t a_low, a_high, b_low, b_high
    if cnp.PyArray_SIZE(a) == 0 or cnp.PyArray_SIZE(b) == 0:
        return False
    extent(a, &a_low, &a_high)
    extent(b, &b_low, &b_high)
    if a_high <= b_low or b_high <= a_low:
        return False
    try:
        return np.shares_memory(a, b, max_work=10_000)
    except np.exceptions.TooHardError:
        return True


cdef bint same_memory(cnp.ndarray a, cnp.ndarray b) noexcept:
    # The same elements at the same places.
    cdef int axis
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b):
        return False
    for axis in range(a.ndim):
        if a.shape[axis] > 1 and a.strides[axis] != b.strides[axis]:
            return False
    return True


cdef cnp.ndarray empty_in_order(cnp.ndarray like, const int* order, int n):
    # A new, gapless array of the native dtype: shape of `like`, axes in `order`.
    cdef cnp.npy_intp strides[MAX_DIMENSIONS]
    cdef cnp.npy_intp stride = like.itemsize
    cdef int i, axis
    for axis in range(like.ndim):
        strides[axis] = stride
    for i in range(n - 1, -1, -1):
        strides[order[i]] = stride
        stride *= like.shape[order[i]]
    for axis in range(like.ndim):
        if like.shape[axis] <= 1:
            strides[axis] = stride
    return cnp.PyArray_New(cnp.ndarray, like.ndim, like.shape, cnp.PyArray_TYPE(like), strides,
                           NULL, 0, 0, None)


# ---- some of x's axes as one, in the order of memory ------------------------------

cdef list places(cnp.ndarray x, int first, int end, const int* axes, int n):
    # Of the axes [first, end) of x: as `axes` has them, then those of length 1.
    cdef int i
    cdef list found = [axes[i] - first for i in range(n)]
    return found + [i - first for i in range(first, end) if x.shape[i] <= 1]


cdef cnp.ndarray flattened(cnp.ndarray a, cnp.ndarray x, int first, int end, const int* axes,
                           int n):
    # `a`, which has the dimensions [first, end) of x, with its elements in that order.
    if ascending(axes, n):
        return a
    return np.ascontiguousarray(np.asarray(a).transpose(places(x, first, end, axes, n)))


cdef cnp.ndarray unflattened(cnp.ndarray a, cnp.ndarray x, int first, int end, const int* axes,
                             int n):
    # The reverse, of a vector.
    cdef tuple shape = (<object>x).shape[first:end]
    if ascending(axes, n):
        return (<object>a).reshape(shape)
    order = places(x, first, end, axes, n)
    return (<object>a).reshape([shape[i] for i in order]).transpose(np.argsort(order))
