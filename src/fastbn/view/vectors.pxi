# SPDX-License-Identifier: BSD-3-Clause
# Vectors: float64 inside, the caller's dtype outside. The only rooms above the kernels
# that look at numbers, and only to convert them. A part of _view.pyx.

cdef cnp.ndarray plain(cnp.ndarray a):
    # Contiguous, native, one of the two wide types; a copy where it must be.
    if kind_of(a) > FLOAT64:
        return np.asarray(a).astype(np.float64, order="C")
    if cnp.PyArray_ISCARRAY_RO(a):
        return a
    return np.ascontiguousarray(a, a.dtype.newbyteorder("="))


cdef int widen(cnp.ndarray a, double* to) except -1:
    # In the standard floating-point environment, which keeps subnormals.
    cdef Py_ssize_t i, n = cnp.PyArray_SIZE(a)
    cdef const float* f
    cdef const double* d
    cdef fp_state saved
    a = plain(a)
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
    cdef bint wide = type_number in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE)
    cdef cnp.ndarray result = cnp.PyArray_EMPTY(
        1, &length, type_number if wide else cnp.NPY_DOUBLE, 0)
    narrow(vector, n, cnp.PyArray_TYPE(result), cnp.PyArray_DATA(result))
    if not wide:
        with np.errstate(all="ignore"):
            return np.asarray(result).astype(cnp.PyArray_DescrFromType(type_number))
    return result


cdef int gradient_type(cnp.ndarray x, cnp.ndarray parameter) noexcept:
    # Of a parameter's gradient: its own, or without one that of statistics of x.
    if parameter is not None:
        return cnp.PyArray_TYPE(parameter)
    return cnp.NPY_DOUBLE if kind_of(x) == FLOAT64 else cnp.NPY_FLOAT


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


cdef cnp.ndarray new_table(Py_ssize_t rows, Py_ssize_t columns):
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = rows, columns
    return cnp.PyArray_ZEROS(2, shape, cnp.NPY_DOUBLE, 0)


cdef inline double* numbers_of(cnp.ndarray a) noexcept:
    return <double*>cnp.PyArray_DATA(a)


cdef inline void fill(double* vector, Py_ssize_t n, double value) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        vector[i] = value
