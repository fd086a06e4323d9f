# SPDX-License-Identifier: BSD-3-Clause
# Arrays -> the tensors of a call. What the engine cannot describe is copied once;
# docs/design.md lists what that is. May copy arrays; may not compute with their elements. A
# part of binding.pyx.

cdef enum:
    TENSORS = ARG_DRESIDUAL - ARG_X + 1
    PIECE = 128 << 20       # bytes that are copied before signals are looked at

cdef enum:      # what becomes of running statistics; the numbers of __init__.py
    MOVED, HELD, UNMOVED, CHECKED

cdef struct Frame:
    # A call, and what its pointers point to.
    fastbn_call call
    Extras extras
    Request request
    Memory memory[ARGUMENTS]
    Py_ssize_t strides[TENSORS][MAX_DIMENSIONS]     # in elements
    Py_ssize_t mask_strides[MAX_DIMENSIONS]


cdef inline Axes axes_of(cnp.ndarray a) noexcept:
    return Axes(a.ndim, <const Py_ssize_t*>a.shape, <const Py_ssize_t*>a.strides, a.itemsize)


cdef inline Memory memory_of(cnp.ndarray a) noexcept:
    if a is None or cnp.PyArray_SIZE(a) == 0:
        return Memory(NULL, Axes(0, NULL, NULL, 1), 1)
    # Axes of bytes: their strides need not be whole elements.
    return Memory(<const char*>cnp.PyArray_DATA(a), axes_of(a), a.itemsize)


cdef inline fastbn_tensor* tensor_of(fastbn_call* call, int argument) noexcept:
    if argument == ARG_X:
        return &call.x
    if argument == ARG_DY:
        return &call.dy
    if argument == ARG_RESIDUAL:
        return &call.residual
    return &call.out if argument == ARG_OUT else &call.dresidual


cdef bint overlapping(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef Memory first = memory_of(a), second = memory_of(b)
    return core.overlap(&first, &second)


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


cdef cnp.ndarray new_like(cnp.ndarray x):
    cdef int axes[MAX_DIMENSIONS]
    cdef Axes shape
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        return cnp.PyArray_EMPTY(x.ndim, x.shape, cnp.PyArray_TYPE(x), 0)
    shape = axes_of(x)
    return empty_in_order(x, axes, core.memory_order(&shape, 0, x.ndim, NO_AXIS, axes))


cdef cnp.ndarray copy_in_order(cnp.ndarray array, const Request* r, bint keep_broadcast):
    # Outer axes of stride 0 may stay so: repeated, they fit as well.
    cdef cnp.ndarray copy, a = np.asarray(array)
    cdef int i
    if keep_broadcast:
        outer = [r.order.axes[i] for i in range(r.order.outer)]
        a = a[tuple([slice(None, 1) if stride == 0 and axis in outer else slice(None)
                     for axis, stride in enumerate((<object>a).strides)])]
    copy = empty_in_order(a, r.order.axes, r.order.n)
    copy_into(copy, a)
    return np.broadcast_to(copy, (<object>array).shape)


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


@cython.final
@cython.freelist(8)
cdef class Arrays:
    # The arrays of a call as the engine gets them; they keep their memory alive. `given` are
    # the caller's, where copies stand for them.
    cdef cnp.ndarray x
    cdef cnp.ndarray dy
    cdef cnp.ndarray mean
    cdef cnp.ndarray invstd
    cdef cnp.ndarray weight
    cdef cnp.ndarray bias
    cdef cnp.ndarray running_mean
    cdef cnp.ndarray running_var
    cdef cnp.ndarray residual
    cdef cnp.ndarray out
    cdef cnp.ndarray dresidual
    cdef cnp.ndarray mask
    cdef cnp.ndarray lengths
    cdef cnp.ndarray dweight
    cdef cnp.ndarray dbias
    cdef cnp.ndarray given_out
    cdef cnp.ndarray given_dresidual
    cdef cnp.ndarray given_running_mean
    cdef cnp.ndarray given_running_var
    cdef cnp.ndarray m2         # of the batch, where running statistics are held
    cdef double count           # values of a channel in the batch that x is a part of
    cdef int mode
    cdef int gradient_dtype
    cdef int copied             # bit i: argument ARG_X + i

    # ---- tensors

    cdef int take_inputs(self, cnp.ndarray x, cnp.ndarray dy, residual) except -1:
        # Of backward.
        checked_like_x(dy, "dy", x)
        self.x, self.dy, self.residual = x, dy, checked_residual(residual, x)
        return 0

    cdef int take_out(self, Frame* f, out) except -1:
        # Once all else is taken. What is wrong with x, all of `out` would be wrong with, too:
        # so the engine is asked first.
        if out is None:
            return 0
        try:
            self.out = checked_out(out, self.x)
        except (TypeError, ValueError):
            self.understand(f)
            raise
        f.memory[ARG_OUT] = memory_of(self.out)
        return 0

    cdef int understand(self, Frame* f) except -1:
        # Until the engine can describe every tensor. Returns 1 if it cannot, for the order of
        # the axes of rows; else 0.
        if f.call.operation != FASTBN_STATISTICS:
            self.find_outputs(f)
        self.describe_all(f)
        while core.understand(&f.call, &f.extras, &f.request) != FASTBN_OK:
            if f.request.fault.code == FASTBN_BAD_STRIDES and (
                    f.request.fault.other == ARG_AXIS):
                return 1
            if not can_be_copied(&f.request):
                raise_fault(f, self)
            self.replace(f, f.request.fault.argument)
        return 0

    cdef int find_outputs(self, Frame* f) except -1:
        f.extras.new_outputs = self.out is None
        if self.out is None:
            self.out = new_like(self.x)
        self.given_out = self.out
        if self.dy is not None and self.residual is not None:
            if self.dresidual is None:
                self.dresidual = new_like(self.x)
            self.given_dresidual = self.dresidual
        return 0

    cdef void note_memory(self, Frame* f) noexcept:
        # Of the caller's arrays, since others may stand for them in the call.
        memset(f.memory, 0, sizeof(f.memory))
        f.memory[ARG_X], f.memory[ARG_DY] = memory_of(self.x), memory_of(self.dy)
        f.memory[ARG_RESIDUAL] = memory_of(self.residual)
        f.memory[ARG_MASK], f.memory[ARG_LENGTHS] = memory_of(self.mask), memory_of(self.lengths)
        f.memory[ARG_WEIGHT], f.memory[ARG_BIAS] = memory_of(self.weight), memory_of(self.bias)
        f.memory[ARG_RUNNING_MEAN] = memory_of(self.running_mean)
        f.memory[ARG_RUNNING_VAR] = memory_of(self.running_var)
        if self.dy is not None:
            f.memory[ARG_MEAN], f.memory[ARG_INVSTD] = memory_of(self.mean), memory_of(self.invstd)
        f.extras.memory = &f.memory[0]

    cdef int describe_all(self, Frame* f) except -1:
        cdef int argument
        cdef cnp.ndarray a
        for argument in range(ARG_X, ARG_DRESIDUAL + 1):
            a = self.tensor(argument)
            if a is not None:
                self.describe(f, argument, a)
        return 0

    cdef int describe(self, Frame* f, int argument, cnp.ndarray a) except -1:
        cdef fastbn_tensor* tensor = tensor_of(&f.call, argument)
        cdef Py_ssize_t* strides = f.strides[argument - ARG_X]
        cdef int axis
        cdef bint whole = cnp.PyArray_ISBEHAVED_RO(a)
        tensor.strides = NULL
        if whole and not cnp.PyArray_IS_C_CONTIGUOUS(a):
            for axis in range(a.ndim):
                strides[axis] = a.strides[axis] // a.itemsize
                whole &= strides[axis] * a.itemsize == a.strides[axis]
            tensor.strides = strides
        if not whole:       # of another byte order, misaligned, a member of a structure
            a = np.asarray(a)
            return self.put(f, argument, new_like(a) if argument >= ARG_OUT
                            else (<object>a).astype(a.dtype.newbyteorder("="), order="K"))
        tensor.data = cnp.PyArray_DATA(a)
        return 0

    cdef int replace(self, Frame* f, int argument) except -1:
        # By a gapless copy; an output, by memory that is copied back later.
        cdef int bit = 1 << (argument - ARG_X)
        cdef cnp.ndarray a = self.tensor(argument)
        if argument >= ARG_OUT:
            a = empty_in_order(a, f.request.order.axes, f.request.order.n)
        else:
            a = copy_in_order(a, &f.request, not self.copied & bit)
        self.copied |= bit
        return self.put(f, argument, a)

    cdef cnp.ndarray tensor(self, int argument):
        if argument == ARG_X:
            return self.x
        if argument == ARG_DY:
            return self.dy
        if argument == ARG_RESIDUAL:
            return self.residual
        return self.out if argument == ARG_OUT else self.dresidual

    cdef cnp.ndarray written(self, int argument):
        if argument == ARG_RUNNING_MEAN:
            return self.given_running_mean
        return self.given_running_var if argument == ARG_RUNNING_VAR else self.given_out

    cdef int put(self, Frame* f, int argument, cnp.ndarray a) except -1:
        if argument == ARG_X:
            self.x = a
        elif argument == ARG_DY:
            self.dy = a
        elif argument == ARG_RESIDUAL:
            self.residual = a
        elif argument == ARG_OUT:
            self.out = a
        else:
            self.dresidual = a
        return self.describe(f, argument, a)

    cdef int copy_back(self) except -1:
        # What was written to memory that stands for the caller's.
        if self.out is not self.given_out:
            copy_into(self.given_out, self.out)
        if self.dresidual is not self.given_dresidual:
            copy_into(self.given_dresidual, self.dresidual)
        return 0

    # ---- vectors

    cdef int take_vectors(self, Frame* f, out) except -1:
        if out is not None or (f.call.operation == FASTBN_FORWARD and (
                self.running_mean is not None or self.running_var is not None)):
            self.note_memory(f)
        self.convert_vectors(f, joined_dtype(joined_dtype(joined_dtype(joined_dtype(
            OTHER, self.weight), self.bias), self.running_mean), self.running_var))
        return 0

    cdef int convert_vectors(self, Frame* f, int dtype) except -1:
        # To one dtype.
        f.call.vector_dtype = dtype
        self.given_running_mean, self.given_running_var = self.running_mean, self.running_var
        if self.weight is not None:
            self.weight = as_vector(self.weight, dtype)
            f.call.weight = cnp.PyArray_DATA(self.weight)
        if self.bias is not None:
            self.bias = as_vector(self.bias, dtype)
            f.call.bias = cnp.PyArray_DATA(self.bias)
        if self.running_mean is not None:
            self.running_mean = as_vector(self.running_mean, dtype)
            f.call.running_mean = cnp.PyArray_DATA(self.running_mean)
        if self.running_var is not None:
            self.running_var = as_vector(self.running_var, dtype)
            f.call.running_var = cnp.PyArray_DATA(self.running_var)
        return 0

    cdef int take_batch(self, const Request* r) except -1:
        # Before `release`: the memory is the request's.
        if r.call.running_var != NULL and not r.empty:
            self.m2 = new_vector(r.owners, cnp.NPY_DOUBLE)
            memcpy(cnp.PyArray_DATA(self.m2), r.job.buffers.m2, r.owners * sizeof(double))
        return 0

    cdef int return_running(self) except -1:
        # Updated copies of running statistics.
        return_vector(self.running_mean, self.given_running_mean)
        return_vector(self.running_var, self.given_running_var)
        return 0

    cdef int prepare_gradients(self, Frame* f, int ndim, cnp.npy_intp* shape, out) except -1:
        # Of parameters of this shape: of the dtype of the weight, or without one that of
        # statistics of x.
        cdef int dtype
        if out is not None:
            self.note_memory(f)
        if self.weight is not None:
            self.gradient_dtype = dtype_of(self.weight)
        else:
            self.gradient_dtype = (FASTBN_FLOAT64 if f.call.dtype == FASTBN_FLOAT64
                                   else FASTBN_FLOAT32)
        dtype = joined_dtype(self.gradient_dtype, self.bias)
        self.convert_vectors(f, dtype)
        self.dweight = new_shaped(ndim, shape, type_number(dtype))
        self.dbias = new_shaped(ndim, shape, type_number(dtype))
        f.call.dweight, f.call.dbias = cnp.PyArray_DATA(self.dweight), cnp.PyArray_DATA(self.dbias)
        self.invstd = as_vector(self.invstd, FASTBN_FLOAT64)
        f.call.invstd = numbers_of(self.invstd)
        if self.mean is not None:
            self.mean = as_vector(self.mean, FASTBN_FLOAT64)
            f.call.mean = numbers_of(self.mean)
        return self.take_out(f, out)

    cdef tuple gradients(self, Frame* f, bint has_bias, exchange=None):
        # (dx, those of the parameters), and that of the residual, if there is one.
        if f.extras.part:
            compute_part(f, self, exchange)
        else:
            compute(f, self)
        dweight = in_dtype(self.dweight, self.gradient_dtype)
        gradients = (self.given_out, dweight)
        if has_bias:
            gradients += (in_dtype(self.dbias, self.gradient_dtype),)
        return gradients if self.dresidual is None else gradients + (self.given_dresidual,)


# ---- rows whose axes lie in memory in another order ----------------------------------

cdef list axes_in_memory(const Request* r, cnp.ndarray x, int kept):
    # Those that are kept before the others; of each, those of length 1 last.
    cdef int i, outer = r.order.outer
    cdef list before = [r.order.axes[i] for i in range(outer)]
    cdef list after = [r.order.axes[i] for i in range(outer, r.order.n)]
    return (before + [i for i in range(kept) if i not in before]
            + after + [i for i in range(kept, x.ndim) if i not in after])


cdef object turned(a, list axes, int first, int end):
    # `a`, which has the axes [first, end) of x, with them in that order.
    if a is None:
        return None
    return np.asarray(a).transpose([axis - first for axis in axes[first:end]])
