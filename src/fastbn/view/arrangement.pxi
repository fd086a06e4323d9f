# SPDX-License-Identifier: BSD-3-Clause
# Arrays -> the view and the operands of a job; what no view describes is copied once.
# docs/design.md lists what is. May copy arrays; may not compute with their elements.
# A part of _view.pyx.

cdef void order_by_channel(cnp.ndarray x, int axis, int sample_axis, Order* order) noexcept:
    cdef Axes axes = axes_of(x)
    sort_by_channel(&axes, axis, sample_axis, order)


cdef void order_by_features(cnp.ndarray x, int kept, Order* order) noexcept:
    cdef Axes axes = axes_of(x)
    sort_by_features(&axes, kept, order)


cdef bint fits(cnp.ndarray a, const Order* order) noexcept:
    # Native and aligned, and without gaps from the channel axis inwards.
    cdef Axes axes = axes_of(a)
    return cnp.PyArray_ISBEHAVED_RO(a) and gapless_inwards(&axes, order)


cdef uint64_t breaks(cnp.ndarray a, const Order* order) noexcept:
    cdef Axes axes = axes_of(a)
    return find_breaks(&axes, order)


cdef bint groups_in_a_row(cnp.ndarray x, const Order* order) noexcept:
    cdef Axes axes = axes_of(x)
    return channels_in_a_row(&axes, order)


cdef enum:
    # The tensors of a job; the last two are written.
    X, DY, RESIDUAL, OUT, DRESIDUAL, TENSORS


@cython.final
@cython.freelist(8)
cdef class Arrangement:
    # The tensors of a job as the drivers may use them, and as the caller has them, or
    # None; they keep their memory alive. Beside them the float64 vectors of the job.
    cdef list arrays
    cdef cnp.ndarray out
    cdef cnp.ndarray dresidual
    cdef Order order
    cdef double* numbers
    cdef Py_ssize_t used

    def __dealloc__(self):
        free(self.numbers)

    cdef double* vector(self, Py_ssize_t n) noexcept:
        # A new vector, with anything in it.
        self.used += n
        return self.numbers + self.used - n

    cdef double* widened(self, cnp.ndarray a) except? NULL:
        # A copy in float64; NULL for None.
        if a is None:
            return NULL
        cdef double* to = self.vector(cnp.PyArray_SIZE(a))
        widen(a, to)
        return to

    cdef const double* readable(self, cnp.ndarray a) except? NULL:
        # `a` itself, where that will do: to be read only.
        if a is not None and cnp.PyArray_TYPE(a) == cnp.NPY_DOUBLE and cnp.PyArray_ISCARRAY_RO(a):
            return <const double*>cnp.PyArray_DATA(a)
        return self.widened(a)

    cdef const double* features(self, cnp.ndarray a, int kept) except? NULL:
        # A parameter, in the order of the features in memory.
        cdef cnp.ndarray x = self.arrays[X]
        cdef int outer = self.order.outer
        if a is None:
            return NULL
        return self.in_order(
            flattened(a, x, kept, x.ndim, self.order.axes + outer, self.order.n - outer), a)

    cdef const void* real_features(self, cnp.ndarray a, int kept) noexcept:
        # The parameter itself, where kernels can read it; NULL: they cannot. Of bfloat16
        # they want NaN as `as_real` gives it.
        cdef cnp.ndarray x = self.arrays[X]
        cdef int kind = kind_of(x), outer = self.order.outer
        if (a is None or kind == BFLOAT16 or cnp.PyArray_SIZE(a) % WRAP
                or kind_of(a) != (FLOAT64 if kind == FLOAT64 else FLOAT32)
                or not cnp.PyArray_ISCARRAY_RO(a)
                or not ascending(self.order.axes + outer, self.order.n - outer)):
            return NULL
        return cnp.PyArray_DATA(a)

    cdef const double* kept(self, cnp.ndarray a, int kept) except? NULL:
        # Statistics, in the order of the channels in memory.
        return self.in_order(
            flattened(a, self.arrays[X], 0, kept, self.order.axes, self.order.outer), a)

    cdef const double* in_order(self, cnp.ndarray flat, cnp.ndarray a) except? NULL:
        return self.readable(a) if flat is a else self.widened(flat)

    cdef int settle(self, Job* job, Py_ssize_t channels, Py_ssize_t group) except -1:
        # Copies what does not fit, and fills in the view and the operands.
        cdef cnp.ndarray x = self.arrays[X]
        cdef int split = self.make_fit(group if self.arrays[DY] is None else 1)
        cdef Axes axes = axes_of(x)
        cdef Operand dresidual
        job.stopped = signalled
        settle_view(&axes, &self.order, split, channels, group, job)
        if cnp.PyArray_SIZE(x) == 0:
            job.view.outer = 0
        self.describe(X, job, split, &job.x)
        self.describe(DY, job, split, &job.dy)
        self.describe(DRESIDUAL, job, split, &dresidual)
        self.describe(RESIDUAL, job, split, &job.residual)
        self.describe(OUT, job, split, &job.out)
        settle_activation(kernels_of[kind_of(x)],
                          NULL if self.dresidual is None else &dresidual, job)
        return 0

    cdef int settle_features(self, Job* job) except -1:
        # The same for features.
        self.settle(job, 1, 1)
        turn_to_features(job)
        return 0

    cdef int make_fit(self, Py_ssize_t group) except -1:
        # Copies what does not fit. Returns where the outer axes are split.
        cdef Order* order = &self.order
        cdef uint64_t found = 0
        cdef int i
        for i in range(TENSORS):
            if self.arrays[i] is None:
                continue
            if not fits(self.arrays[i], order) or (
                    i == X and group > 1 and not groups_in_a_row(self.arrays[i], order)):
                self.replace(i, True)
            found |= breaks(self.arrays[i], order)
        if not at_most_one_bit(found):
            found = 0
            for i in range(TENSORS):
                if self.arrays[i] is not None and breaks(self.arrays[i], order):
                    self.replace(i, False)
        return split_at(found)

    cdef void describe(self, int i, const Job* job, int split, Operand* operand) noexcept:
        if self.arrays[i] is None:
            return
        cdef cnp.ndarray a = self.arrays[i]
        cdef Axes axes = axes_of(a)
        settle_operand(&axes, &self.order, split, job, cnp.PyArray_DATA(a), operand)

    cdef object replace(self, int i, bint keep_broadcast):
        # By a gapless copy; for an output, by memory that is copied back later.
        # Outer axes of stride 0 may stay so: repeated, they fit as well.
        cdef cnp.ndarray copy, a = np.asarray(self.arrays[i])
        shape = (<object>a).shape
        if i < OUT and keep_broadcast:
            a = a[tuple([slice(None, 1) if stride == 0 and axis in self.outer_axes()
                         else slice(None) for axis, stride in enumerate((<object>a).strides)])]
        copy = empty_in_order(a, self.order.axes, self.order.n)
        if i < OUT:
            copy_into(copy, a)
            self.arrays[i] = np.broadcast_to(copy, shape)
        else:
            self.arrays[i] = copy

    cdef list outer_axes(self):
        cdef int i
        return [self.order.axes[i] for i in range(self.order.outer)]

    cdef cnp.ndarray result(self):
        # `out`, once the driver has written to what stood for it.
        if self.arrays[OUT] is not self.out:
            copy_into(self.out, self.arrays[OUT])
        if self.arrays[DRESIDUAL] is not self.dresidual:
            copy_into(self.dresidual, self.arrays[DRESIDUAL])
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


cdef cnp.ndarray new_like(cnp.ndarray x):
    cdef int axes[MAX_DIMENSIONS]
    cdef Axes shape = axes_of(x)
    return empty_in_order(x, axes, memory_order(&shape, 0, x.ndim, NO_AXIS, axes))


cdef Arrangement arranged(cnp.ndarray x, cnp.ndarray dy, cnp.ndarray residual, cnp.ndarray out,
                          bint writes, const Order* order, Py_ssize_t numbers):
    # With memory for so many float64 numbers.
    cdef Arrangement a = Arrangement.__new__(Arrangement)
    a.order = order[0]
    a.out = new_like(x) if writes and out is None else out
    if dy is not None and residual is not None:
        a.dresidual = new_like(x)
    a.arrays = [x, dy, residual, a.out, a.dresidual]
    a.numbers = <double*>malloc(numbers * sizeof(double) + 1)
    if a.numbers == NULL:
        raise MemoryError("no memory for the vectors of the channels")
    return a
