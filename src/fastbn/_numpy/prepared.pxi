# SPDX-License-Identifier: BSD-3-Clause
# What inference with the same statistics and parameters needs again and again. May not
# look at elements, but to compare them. A part of binding.pyx.

cdef bint unchanged(cnp.ndarray a, const char* copy, Py_ssize_t size) noexcept:
    return (cnp.PyArray_NBYTES(a) == size and cnp.PyArray_ISCARRAY_RO(a)
            and memcmp(cnp.PyArray_DATA(a), copy, size) == 0)


@cython.final
cdef class Prepared:
    """The coefficients of an inference, and copies of the arrays that they are of.

    An object does not change, so threads may use one while another is made.
    """
    cdef const KernelTable* kernels
    cdef Py_ssize_t channels
    cdef double eps
    cdef tuple arrays           # copies; None where there is none
    cdef void* coefficients

    def __dealloc__(self):
        free(self.coefficients)

    def __init__(self, x_, channels, running_mean, running_var, weight, bias, eps, /):
        cdef cnp.ndarray x = checked_array(x_, "x")
        cdef Arrays a = Arrays.__new__(Arrays)
        cdef Py_ssize_t shape[2]
        cdef int code
        cdef Frame f
        self.channels, self.eps = channels, check_eps(eps)
        self.kernels = core.kernels_for(dtype_of(x))
        self.arrays = tuple([
            None if array is None else np.array(checked_vector(array, name, self.channels))
            for array, name in ((running_mean, "running_mean"), (running_var, "running_var"),
                                (weight, "weight"), (bias, "bias"))])
        self.coefficients = malloc(core.size_of_coefficients(self.channels))
        if self.coefficients == NULL:
            raise MemoryError("no memory for the coefficients of the channels")
        a.running_mean, a.running_var, a.weight, a.bias = self.arrays
        new_call(&f, x, FASTBN_BATCH_NORM, FASTBN_INFERENCE)
        shape[0], shape[1] = 1, self.channels
        f.call.ndim, f.call.shape, f.call.channel_axis = 2, shape, 1
        f.call.eps = self.eps
        a.take_vectors(&f, None)
        code = core.prepare_coefficients(&f.call, self.coefficients)
        if code != FASTBN_OK:
            raise MemoryError("no memory for the vectors of the channels")

    def fits(self, x_, running_mean, running_var, weight, bias, eps, /):
        """Return whether all this is as it was; of a dtype and a CPU level, too."""
        cdef cnp.ndarray x = checked_array(x_, "x")
        cdef cnp.ndarray copy
        cdef object array
        cdef int i
        if core.kernels_for(dtype_of(x)) != self.kernels or eps != self.eps:
            return False
        for i, array in enumerate((running_mean, running_var, weight, bias)):
            if self.arrays[i] is None or array is None:
                if self.arrays[i] is not array:
                    return False
                continue
            copy = self.arrays[i]
            if not (cnp.PyArray_Check(array)
                    and cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(copy)
                    and unchanged(array, <const char*>cnp.PyArray_DATA(copy),
                                  cnp.PyArray_NBYTES(copy))):
                return False
        return True
