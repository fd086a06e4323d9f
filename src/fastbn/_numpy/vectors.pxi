# SPDX-License-Identifier: BSD-3-Clause
# Arrays <-> vectors of a call: contiguous, native, all of one dtype. The engine's kernels
# convert, in the standard floating-point environment. A part of binding.pyx.

cdef cnp.ndarray new_vector(Py_ssize_t n, int number):
    cdef cnp.npy_intp shape = n
    return cnp.PyArray_EMPTY(1, &shape, number, 0)


cdef cnp.ndarray new_table(Py_ssize_t rows, Py_ssize_t columns):
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = rows, columns
    return cnp.PyArray_EMPTY(2, shape, cnp.NPY_DOUBLE, 0)


cdef cnp.ndarray new_shaped(int ndim, cnp.npy_intp* shape, int number):
    return cnp.PyArray_EMPTY(ndim, shape, number, 0)


cdef inline double* numbers_of(cnp.ndarray a) noexcept:
    return <double*>cnp.PyArray_DATA(a)


cdef int joined_dtype(int dtype, cnp.ndarray a) except -1:
    # One that has all numbers of both; OTHER: none yet.
    if a is None or dtype_of(a) == dtype:
        return dtype
    return dtype_of(a) if dtype == OTHER else FASTBN_FLOAT64


cdef cnp.ndarray as_vector(cnp.ndarray a, int dtype):
    # `a` itself, where that will do; dtype is its own, or float64.
    cdef cnp.ndarray wide
    if not cnp.PyArray_ISCARRAY_RO(a):
        a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
    if dtype_of(a) == dtype:
        return a
    wide = cnp.PyArray_EMPTY(a.ndim, a.shape, cnp.NPY_DOUBLE, 0)
    core.kernels_for(dtype_of(a)).to_float64(cnp.PyArray_DATA(a), cnp.PyArray_SIZE(a),
                                             numbers_of(wide))
    return wide


cdef cnp.ndarray in_dtype(cnp.ndarray a, int dtype):
    # `a` itself, or if it is float64, rounded.
    cdef cnp.ndarray rounded
    if dtype_of(a) == dtype:
        return a
    rounded = cnp.PyArray_EMPTY(a.ndim, a.shape, type_number(dtype), 0)
    core.kernels_for(dtype).from_float64(numbers_of(a), cnp.PyArray_SIZE(a),
                                         cnp.PyArray_DATA(rounded))
    return rounded


cdef int return_vector(cnp.ndarray vector, cnp.ndarray given) except -1:
    # What was updated in a copy.
    if vector is not given:
        cnp.PyArray_CopyInto(given, in_dtype(vector, dtype_of(given)))
    return 0
