# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, cdivision=True
"""Arrays -> a view and a job: the one place that validates, and that allocates.

Everything a caller can get wrong is found here, before anything is written;
the drivers behind it cannot fail but for memory.

A view is (outer, middle, channels, inner), decided by the *memory order* of x:
axes slower than the channel axis are outer, faster ones are inner, whatever
the layout calls them. Every operand is described by its strides; one that the
view cannot describe is copied once (docs/design.md lists which).

May: check, allocate, copy. May not: compute with elements.
"""
cimport cython
cimport numpy as cnp
from libc.math cimport NAN
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

import numbers
import operator

import numpy as np

from fastbn._threads cimport team_was, threads_for
from fastbn.kernels cimport drivers
from fastbn.kernels.job cimport NO_MEMORY, STOPPED, Job, Leaves, Operand

cnp.import_array()

cdef extern from "Python.h":
    void* PyCapsule_GetPointer(object capsule, const char* name) except NULL
    int PyErr_CheckSignals() except -1
    int leave_signal_error "PyErr_CheckSignals"() noexcept

cdef extern from "kernels/environment.h":
    ctypedef int fp_state
    fp_state fp_enter()
    void fp_leave(fp_state saved)

cdef enum:
    MAX_DIMENSIONS = 64     # NumPy's own limit
    PIECE = 128 << 20       # bytes that are copied before signals are looked at

cdef const Leaves* float32_leaves = NULL
cdef const Leaves* float64_leaves = NULL


def use(float32_capsule, float64_capsule):
    """Make the leaves of one CPU level the ones that later calls run."""
    global float32_leaves, float64_leaves
    cdef const Leaves* f32 = <const Leaves*>PyCapsule_GetPointer(float32_capsule, "fastbn.leaves")
    cdef const Leaves* f64 = <const Leaves*>PyCapsule_GetPointer(float64_capsule, "fastbn.leaves")
    float32_leaves, float64_leaves = f32, f64


# ---- what a caller can get wrong ------------------------------------------------

cdef object described(obj):
    # What came, in a few words.
    if cnp.PyArray_Check(obj):
        return f"an array of shape {obj.shape} and dtype {obj.dtype}"
    if obj is None:
        return "None"
    return f"{type(obj).__module__}.{type(obj).__qualname__}".removeprefix("builtins.")


cdef cnp.ndarray checked_array(obj, str name):
    if not cnp.PyArray_Check(obj):
        if type(obj).__module__.partition(".")[0] == "torch":
            hint = f"; pass {name}.detach().numpy(), which shares its memory"
        elif obj is None:
            hint = ""
        else:
            hint = f"; np.asarray({name}) makes one"
        raise TypeError(f"{name}: expected a numpy.ndarray, got {described(obj)}{hint}")
    if not cnp.PyArray_CheckExact(obj) and isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain numpy.ndarray, got a masked array, "
                        "whose mask would be ignored")
    cdef cnp.ndarray array = obj
    if cnp.PyArray_TYPE(array) not in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE):
        kind = array.dtype.kind
        hint = f"; convert it first: {name}.astype(np.float32)" if kind in "iubf" else ""
        raise TypeError(f"{name}: expected dtype float32 or float64, got {array.dtype}{hint}")
    return array


cdef cnp.ndarray checked_vector(obj, str name, Py_ssize_t channels):
    # One number per channel, or None.
    if obj is None:
        return None
    cdef cnp.ndarray array = checked_array(obj, name)
    if array.ndim != 1 or array.shape[0] != channels:
        raise ValueError(f"{name}: expected shape ({channels},), one value for each channel of x, "
                         f"got {(<object>array).shape}")
    return array


cdef object checked_written(cnp.ndarray array, str name):
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if overlaps_itself(array):
        raise ValueError(f"{name}: expected an array whose elements are apart in memory, as "
                         f"slicing and transposing make them, got shape {(<object>array).shape} "
                         f"with strides {(<object>array).strides}")


cdef object checked_apart(cnp.ndarray written, str name, cnp.ndarray other, str other_name):
    if written is not None and other is not None and overlap(written, other):
        raise ValueError(f"{name}: expected memory of its own, got an array that overlaps "
                         f"{other_name}")


cdef object checked_running(cnp.ndarray running, str name, cnp.ndarray x, cnp.ndarray weight,
                            cnp.ndarray bias):
    # A running statistic that is about to be updated.
    if running is not None:
        checked_written(running, name)
        checked_apart(running, name, x, "x")
        checked_apart(running, name, weight, "weight")
        checked_apart(running, name, bias, "bias")


cdef object checked_same_or_apart(cnp.ndarray out, cnp.ndarray other, str other_name):
    if not same_memory(out, other) and overlap(out, other):
        raise ValueError(f"out: expected {other_name} itself or memory apart from it, got an "
                         f"array that overlaps {other_name} in part")


cdef object checked_like_x(cnp.ndarray array, str name, cnp.ndarray x):
    # By the dimensions in C: a subclass may say anything of its shape.
    if array.ndim != x.ndim or not cnp.PyArray_CompareLists(array.shape, x.shape, x.ndim):
        raise ValueError(f"{name}: expected the shape of x, {(<object>x).shape}, "
                         f"got {(<object>array).shape}")
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype.name}, got {array.dtype.name}")


cdef object checked_count(cnp.ndarray x, Py_ssize_t count):
    if count == 1:
        raise ValueError("x: expected more than one value per channel in training, "
                         f"got shape {(<object>x).shape}")


cdef cnp.ndarray checked_out(obj, cnp.ndarray x):
    if obj is None:
        return None
    cdef cnp.ndarray out = checked_array(obj, "out")
    checked_like_x(out, "out", x)
    checked_written(out, "out")
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


cdef double checked_eps(value, bint training) except? -1.0:
    cdef double eps = checked_number(value, "eps")
    if not (eps > 0.0 or (eps == 0.0 and not training)):
        raise ValueError(f"eps: expected a number {'> 0 in training' if training else '>= 0'}, "
                         f"got {value!r}")
    return eps


cdef double checked_momentum(value) except? -1.0:
    cdef double momentum = checked_number(value, "momentum")
    if momentum - momentum != 0.0:
        raise ValueError(f"momentum: expected a finite number, got {value!r}")
    return momentum


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
    if not (layout.isascii() and layout.isalpha() and layout.count("C") == 1
            and len(set(layout)) == len(layout)):
        raise ValueError("layout: expected distinct letters with exactly one 'C' (such as "
                         f"'NHWC'), or 'N...C', got {layout!r}")


cdef int channel_axis(layout, cnp.ndarray x) except -1:
    cdef int ndim = x.ndim
    if layout is not None:
        check_layout(layout)
    if layout is None or layout == "N...C":
        if ndim < 2:
            wanted = "(N, C, ...)" if layout is None else "(N, ..., C)"
            raise ValueError(f"x: expected at least 2 dimensions, {wanted}, got {ndim}, "
                             f"shape {(<object>x).shape}; name its axes with layout=")
        return 1 if layout is None else ndim - 1
    if len(layout) != ndim:
        raise ValueError(f"layout: expected {ndim} letters for x of shape {(<object>x).shape}, "
                         f"got {layout!r}")
    return layout.index("C")


def check_eps(eps):
    """Return `eps` as a float, or raise. 0 is left for training to refuse."""
    return checked_eps(eps, False)


def check_momentum(momentum):
    """Return `momentum` as a float, or raise."""
    return checked_momentum(momentum)


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


def check_vector(array, name, channels):
    """Return `array`, float32 or float64 of shape (channels,), or raise."""
    return checked_vector(checked_array(array, name), name, channels)


def check_channels(x, layout, channels):
    """Raise unless `x` has so many channels."""
    cdef cnp.ndarray array = checked_array(x, "x")
    cdef int axis = channel_axis(layout, array)
    if array.shape[axis] != channels:
        raise ValueError(f"x: expected {channels} channels on axis {axis}, got shape {x.shape}")


def overlapping(cnp.ndarray a not None, cnp.ndarray b not None):
    """Return whether the two arrays share memory."""
    return overlap(a, b)


# ---- memory: order, overlap -----------------------------------------------------

cdef inline Py_ssize_t magnitude(Py_ssize_t value) noexcept:
    return -value if value < 0 else value


cdef int memory_order(cnp.ndarray x, int* order) noexcept:
    # The axes longer than 1, slowest first. Equal strides keep the logical
    # order; so does a stride of 0, which has no place of its own.
    cdef int axis, i, place, n = 0
    cdef Py_ssize_t stride, other
    for axis in range(x.ndim):
        if x.shape[axis] <= 1:
            continue
        stride = magnitude(x.strides[axis])
        place = n
        for i in range(n - 1, -1, -1):
            other = magnitude(x.strides[order[i]])
            if stride == 0 or other == 0:
                continue
            if other >= stride:
                break
            place = i
        for i in range(n, place, -1):
            order[i] = order[i - 1]
        order[place] = axis
        n += 1
    return n


cdef bint overlaps_itself(cnp.ndarray a) noexcept:
    # True unless each axis steps over all that the faster ones cover.
    cdef int order[MAX_DIMENSIONS]
    cdef int i, n = memory_order(a, order)
    cdef Py_ssize_t covered = a.itemsize
    if cnp.PyArray_SIZE(a) == 0:
        return False
    for i in range(n - 1, -1, -1):
        if magnitude(a.strides[order[i]]) < covered:
            return True
        covered += (a.shape[order[i]] - 1) * magnitude(a.strides[order[i]])
    return False


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


# ---- arrays -> view -------------------------------------------------------------

cdef struct Order:
    # The memory order of x, split at its channel axis.
    int axes[MAX_DIMENSIONS]
    int n
    int outer           # axes[:outer] are outer, axes[outer + has_channel:] inner
    bint has_channel    # False: there is one channel, and its axis has no place


cdef void find_order(cnp.ndarray x, int axis, Order* order) noexcept:
    cdef int i
    order.n = memory_order(x, order.axes)
    order.outer = 0
    order.has_channel = False
    for i in range(order.n):
        if order.axes[i] == axis:
            order.outer = i
            order.has_channel = True


cdef bint follows(cnp.ndarray a, int slow, int fast) noexcept:
    # Do the two axes step through memory as one axis would?
    return a.strides[slow] == a.shape[fast] * a.strides[fast]


cdef bint fits(cnp.ndarray a, const Order* order) noexcept:
    # Native and aligned, and without gaps from the channel axis inwards.
    cdef int i
    if not cnp.PyArray_ISBEHAVED_RO(a):
        return False
    if order.n == 0:
        return True
    if order.n > order.outer and a.strides[order.axes[order.n - 1]] != a.itemsize:
        return False
    for i in range(order.outer + order.has_channel, order.n - 1):
        if not follows(a, order.axes[i], order.axes[i + 1]):
            return False
    return True


cdef uint64_t breaks(cnp.ndarray a, const Order* order) noexcept:
    # Where the outer axes do not step as one: bit i, before axes[i].
    cdef uint64_t found = 0
    cdef int i
    for i in range(1, order.outer):
        if not follows(a, order.axes[i - 1], order.axes[i]):
            found |= <uint64_t>1 << i
    return found


cdef inline bint at_most_one_bit(uint64_t bits) noexcept:
    return bits & (bits - 1) == 0


cdef void describe(cnp.ndarray a, const Job* job, const Order* order, int split,
                   Operand* operand) noexcept:
    cdef Py_ssize_t itemsize = a.itemsize
    operand.data = cnp.PyArray_DATA(a)
    operand.channel = job.view.inner
    if order.has_channel:
        operand.channel = a.strides[order.axes[order.outer]] // itemsize
    operand.middle = job.view.channels * job.view.inner
    if order.outer:
        operand.middle = a.strides[order.axes[order.outer - 1]] // itemsize
    operand.outer = job.view.middle * operand.middle
    if split:
        operand.outer = a.strides[order.axes[split - 1]] // itemsize


@cython.final
@cython.freelist(8)
cdef class Arrangement:
    # The operands of a job as the drivers may use them, x first; they keep
    # their memory alive. With an output, that is the last one. Beside them the
    # float64 vectors of the job.
    cdef list arrays
    cdef int inputs
    cdef cnp.ndarray out
    cdef Order order
    cdef double* vectors
    cdef Py_ssize_t channels
    cdef int used

    def __dealloc__(self):
        free(self.vectors)

    cdef double* vector(self) noexcept:
        # A new vector, with anything in it.
        self.used += 1
        return self.vectors + (self.used - 1) * self.channels

    cdef double* widened(self, cnp.ndarray a) except? NULL:
        # A copy in float64; NULL for None.
        if a is None:
            return NULL
        cdef double* to = self.vector()
        widen(a, to)
        return to

    cdef const double* readable(self, cnp.ndarray a) except? NULL:
        # `a` itself, where that will do: to be read only.
        if a is not None and cnp.PyArray_TYPE(a) == cnp.NPY_DOUBLE and cnp.PyArray_ISCARRAY_RO(a):
            return <const double*>cnp.PyArray_DATA(a)
        return self.widened(a)

    cdef int settle(self, Job* job, int axis) except -1:
        # Copies what does not fit, and fills in the view. Returns where the
        # outer axes are split: axes[:split] are view.outer, the rest view.middle.
        cdef cnp.ndarray x = self.arrays[0]
        cdef Order* order = &self.order
        cdef uint64_t found = 0
        cdef int i, split = 0
        for i in range(len(self.arrays)):
            if not fits(self.arrays[i], order):
                self.replace(i, True)
            found |= breaks(self.arrays[i], order)
        if not at_most_one_bit(found):
            found = 0
            for i in range(len(self.arrays)):
                if breaks(self.arrays[i], order):
                    self.replace(i, False)
        while found >> split > 1:
            split += 1
        job.stopped = signalled
        job.view.channels = x.shape[axis]
        job.view.outer = job.view.middle = job.view.inner = 1
        if cnp.PyArray_SIZE(x) == 0:
            job.view.outer = 0
        for i in range(order.n):
            if i < split:
                job.view.outer *= x.shape[order.axes[i]]
            elif i < order.outer:
                job.view.middle *= x.shape[order.axes[i]]
            elif i >= order.outer + order.has_channel:
                job.view.inner *= x.shape[order.axes[i]]
        return split

    cdef object replace(self, int i, bint keep_broadcast):
        # By a gapless copy; for the output, by memory that is copied back later.
        # Outer axes of stride 0 may stay so: repeated, they fit as well.
        cdef cnp.ndarray copy, a = np.asarray(self.arrays[i])
        shape = (<object>a).shape
        if i < self.inputs and keep_broadcast:
            a = a[tuple([slice(None, 1) if stride == 0 and axis in self.outer_axes()
                         else slice(None) for axis, stride in enumerate((<object>a).strides)])]
        copy = empty_in_order(a, self.order.axes, self.order.n)
        if i < self.inputs:
            copy_into(copy, a)
            self.arrays[i] = np.broadcast_to(copy, shape)
        else:
            self.arrays[i] = copy

    cdef list outer_axes(self):
        cdef int i
        return [self.order.axes[i] for i in range(self.order.outer)]

    cdef cnp.ndarray result(self):
        # `out`, once the driver has written to what stood for it.
        cdef cnp.ndarray written = self.arrays[self.inputs]
        if written is not self.out:
            copy_into(self.out, written)
        return self.out


cdef object copy_into(cnp.ndarray to, cnp.ndarray source):
    # In pieces, so that Ctrl-C need not wait for gigabytes.
    cdef Py_ssize_t pieces = cnp.PyArray_NBYTES(to) // PIECE + 1
    if pieces == 1:
        cnp.PyArray_CopyInto(to, source)
        return
    to, source = np.asarray(to), np.asarray(source)
    axis = int(np.argmax((<object>to).shape))
    for part, whole in zip(np.array_split(to, pieces, axis), np.array_split(source, pieces, axis)):
        cnp.PyArray_CopyInto(part, whole)
        PyErr_CheckSignals()


cdef Arrangement arranged(list arrays, int axis, bint writes, Py_ssize_t vectors):
    # With memory for so many vectors.
    cdef cnp.ndarray x = arrays[0]
    cdef Arrangement a = Arrangement.__new__(Arrangement)
    find_order(x, axis, &a.order)
    a.arrays = arrays
    a.inputs = len(arrays) - writes
    if writes:
        a.out = arrays[a.inputs]
        if a.out is None:
            a.out = empty_in_order(x, a.order.axes, a.order.n)
            arrays[a.inputs] = a.out
    a.channels = x.shape[axis]
    a.vectors = <double*>malloc(vectors * a.channels * sizeof(double) + 1)
    if a.vectors == NULL:
        raise MemoryError("no memory for the vectors of the channels")
    return a


# ---- vectors: float64 inside, the caller's dtype outside --------------------------

cdef int widen(cnp.ndarray a, double* to) except -1:
    # In the standard floating-point environment, which keeps subnormals.
    cdef Py_ssize_t i, n = a.shape[0]
    cdef const float* f
    cdef const double* d
    cdef fp_state saved
    if not cnp.PyArray_ISCARRAY_RO(a):
        a = cnp.PyArray_FROMANY(a, cnp.PyArray_TYPE(a), 1, 1, cnp.NPY_ARRAY_CARRAY_RO
                                | cnp.NPY_ARRAY_ENSUREARRAY | cnp.NPY_ARRAY_NOTSWAPPED)
    saved = fp_enter()
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT:
        f = <const float*>cnp.PyArray_DATA(a)
        for i in range(n):
            to[i] = f[i]
    else:
        d = <const double*>cnp.PyArray_DATA(a)
        for i in range(n):
            to[i] = d[i]
    fp_leave(saved)
    return 0


cdef void narrow(const double* vector, Py_ssize_t n, int type_number, void* to) noexcept:
    # Overflow gives Inf without a warning.
    cdef Py_ssize_t i
    cdef float* f = <float*>to
    cdef fp_state saved
    if type_number == cnp.NPY_DOUBLE:
        memcpy(to, vector, n * sizeof(double))
        return
    saved = fp_enter()
    for i in range(n):
        f[i] = <float>vector[i]
    fp_leave(saved)


cdef cnp.ndarray rounded(const double* vector, Py_ssize_t n, int type_number):
    # A new array.
    cdef cnp.npy_intp length = n
    cdef cnp.ndarray result = cnp.PyArray_EMPTY(1, &length, type_number, 0)
    narrow(vector, n, type_number, cnp.PyArray_DATA(result))
    return result


cdef int copy_back(cnp.ndarray to, const double* vector) except -1:
    if to is None:
        return 0
    if cnp.PyArray_ISCARRAY(to):
        narrow(vector, to.shape[0], cnp.PyArray_TYPE(to), cnp.PyArray_DATA(to))
    else:
        cnp.PyArray_CopyInto(to, rounded(vector, to.shape[0], cnp.PyArray_TYPE(to)))
    return 0


cdef cnp.ndarray new_vector(Py_ssize_t n):
    cdef cnp.npy_intp shape = n
    return cnp.PyArray_ZEROS(1, &shape, cnp.NPY_DOUBLE, 0)


cdef inline double* numbers_of(cnp.ndarray a) noexcept:
    return <double*>cnp.PyArray_DATA(a)


cdef inline void fill(double* vector, Py_ssize_t n, double value) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        vector[i] = value


cdef inline const Leaves* leaves_for(cnp.ndarray x) noexcept:
    return float32_leaves if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT else float64_leaves


cdef inline Py_ssize_t values_per_channel(cnp.ndarray x, int axis) noexcept:
    return cnp.PyArray_SIZE(x) // x.shape[axis] if x.shape[axis] else 0


# ---- the operations -----------------------------------------------------------

cdef int signalled() noexcept with gil:
    # Runs Python's handlers of signals, on the main thread only. What one raises
    # waits in the thread's state for `ended`.
    return leave_signal_error()


cdef int choose_threads(Job* job, cnp.ndarray x, int axis) except -1:
    # The vectors of the channels are prepared on one thread, which takes as long as
    # 768 bytes of data for each channel: work that more threads do not share.
    job.size = cnp.PyArray_NBYTES(x) - 768 * x.shape[axis]
    job.threads = threads_for(job.size)
    return 0


cdef int ended(int status, const Job* job) except -1:
    if job.threads > 1:
        team_was(job.team_loss > 0.0, job.size)
    if status == NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    return -1 if status == STOPPED else 0


def statistics(x_, layout, /):
    """Return (values per channel, mean, M2) of each channel, the last two float64."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef cnp.ndarray mean = new_vector(x.shape[axis])
    cdef cnp.ndarray m2 = new_vector(x.shape[axis])
    cdef Py_ssize_t count = values_per_channel(x, axis)
    cdef Job job
    cdef Arrangement arrangement
    cdef const Leaves* leaves = leaves_for(x)
    cdef int split, status
    if count == 0:
        return count, mean, m2
    arrangement = arranged([x], axis, False, 0)
    split = arrangement.settle(&job, axis)
    describe(arrangement.arrays[0], &job, &arrangement.order, split, &job.x)
    job.mean, job.m2, job.var = numbers_of(mean), numbers_of(m2), NULL
    choose_threads(&job, x, axis)
    with nogil:
        status = drivers.statistics(leaves, &job)
    ended(status, &job)
    return count, mean, m2


def forward(x_, weight_, bias_, running_mean_, running_var_, training_, momentum_, eps_, layout,
            out_, bint only_y, /):
    """Return (y, mean, invstd), or y; `functional` has the documentation."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    cdef Py_ssize_t count = values_per_channel(x, axis)
    cdef bint training = checked_flag(training_, "training")
    cdef cnp.ndarray weight = checked_vector(weight_, "weight", channels)
    cdef cnp.ndarray bias = checked_vector(bias_, "bias", channels)
    cdef cnp.ndarray running_mean = checked_vector(running_mean_, "running_mean", channels)
    cdef cnp.ndarray running_var = checked_vector(running_var_, "running_var", channels)
    cdef cnp.ndarray out
    cdef Arrangement arrangement
    cdef Job job
    cdef const Leaves* leaves = leaves_for(x)
    cdef int split, status
    job.momentum = checked_momentum(momentum_)
    job.eps = checked_eps(eps_, training)
    job.training = training
    if training:
        checked_count(x, count)
    elif running_mean is None or running_var is None:
        raise TypeError(
            f"{'running_mean' if running_mean is None else 'running_var'}: expected an array "
            f"of shape ({channels},), since training is False, got None")
    out = checked_out(out_, x)
    if out is not None:
        checked_same_or_apart(out, x, "x")
        checked_apart(out, "out", weight, "weight")
        checked_apart(out, "out", bias, "bias")
        checked_apart(out, "out", running_mean, "running_mean")
        checked_apart(out, "out", running_var, "running_var")
    if training:
        checked_running(running_mean, "running_mean", x, weight, bias)
        checked_running(running_var, "running_var", x, weight, bias)
        checked_apart(running_mean, "running_mean", running_var, "running_var")

    arrangement = arranged([x, out], axis, True, 8)
    job.weight, job.bias = arrangement.readable(weight), arrangement.readable(bias)
    job.running_mean = job.running_var = NULL
    job.invstd = arrangement.vector()
    if training:
        job.mean, job.var, job.m2 = (
            arrangement.vector(), arrangement.vector(), arrangement.vector())
        job.running_mean = arrangement.widened(running_mean)
        job.running_var = arrangement.widened(running_var)
    else:
        job.mean, job.var = arrangement.widened(running_mean), arrangement.widened(running_var)
    if count == 0 and training:
        fill(job.mean, channels, 0.0)
        fill(job.invstd, channels, NAN)
    else:
        split = arrangement.settle(&job, axis)
        describe(arrangement.arrays[0], &job, &arrangement.order, split, &job.x)
        describe(arrangement.arrays[1], &job, &arrangement.order, split, &job.out)
        choose_threads(&job, x, axis)
        with nogil:
            if training:
                status = drivers.training(leaves, &job)
            else:
                status = drivers.inference(leaves, &job)
        ended(status, &job)
        arrangement.result()
        if training:
            PyErr_CheckSignals()        # the last moment at which nothing is lost
            copy_back(running_mean, job.running_mean)
            copy_back(running_var, job.running_var)
    if only_y:
        return arrangement.out
    return (arrangement.out, rounded(job.mean, channels, cnp.NPY_DOUBLE),
            rounded(job.invstd, channels, cnp.NPY_DOUBLE))


def backward(dy_, x_, mean_, invstd_, weight_, training_, layout, out_, /):
    """Return (dx, dweight, dbias); `functional` has the documentation."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef cnp.ndarray dy = checked_array(dy_, "dy")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    cdef Py_ssize_t count = values_per_channel(x, axis)
    cdef bint training = checked_flag(training_, "training")
    cdef cnp.ndarray mean = checked_vector(checked_array(mean_, "mean"), "mean", channels)
    cdef cnp.ndarray invstd = checked_vector(checked_array(invstd_, "invstd"), "invstd", channels)
    cdef cnp.ndarray weight = checked_vector(weight_, "weight", channels)
    cdef cnp.ndarray out
    cdef int gradient_type = cnp.PyArray_TYPE(x if weight is None else weight)
    cdef Arrangement arrangement
    cdef Job job
    cdef const Leaves* leaves = leaves_for(x)
    cdef int split, status
    checked_like_x(dy, "dy", x)
    if training:
        checked_count(x, count)
    out = checked_out(out_, x)
    if out is not None:
        checked_same_or_apart(out, dy, "dy")
        checked_same_or_apart(out, x, "x")
        checked_apart(out, "out", mean, "mean")
        checked_apart(out, "out", invstd, "invstd")
        checked_apart(out, "out", weight, "weight")

    arrangement = arranged([x, dy, out], axis, True, 5)
    job.training = training
    # Only read here, since `var` is NULL.
    job.mean = <double*>arrangement.readable(mean)
    job.invstd = <double*>arrangement.readable(invstd)
    job.weight, job.bias, job.var = arrangement.readable(weight), NULL, NULL
    job.dweight, job.dbias = arrangement.vector(), arrangement.vector()
    if count == 0:
        fill(job.dweight, channels, 0.0)
        fill(job.dbias, channels, 0.0)
    else:
        split = arrangement.settle(&job, axis)
        describe(arrangement.arrays[0], &job, &arrangement.order, split, &job.x)
        describe(arrangement.arrays[1], &job, &arrangement.order, split, &job.dy)
        describe(arrangement.arrays[2], &job, &arrangement.order, split, &job.out)
        choose_threads(&job, x, axis)
        with nogil:
            status = drivers.gradients(leaves, &job)
        ended(status, &job)
        arrangement.result()
    return (arrangement.out, rounded(job.dweight, channels, gradient_type),
            rounded(job.dbias, channels, gradient_type))
