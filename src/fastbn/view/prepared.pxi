# SPDX-License-Identifier: BSD-3-Clause
# What inference with the same statistics and parameters needs again and again. May not
# look at elements, but to compare them. A part of _view.pyx.

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
    cdef double* coefficients

    def __dealloc__(self):
        free(self.coefficients)

    def __init__(self, x_, channels, running_mean, running_var, weight, bias, eps, /):
        cdef cnp.ndarray x = checked_array(x_, "x")
        cdef Arrangement vectors = Arrangement.__new__(Arrangement)
        cdef Job job
        self.channels = channels
        self.kernels = kernels_of[kind_of(x)]
        self.eps = checked_eps(eps, False)
        self.arrays = tuple([
            None if array is None else np.array(checked_vector(array, name, self.channels))
            for array, name in ((running_mean, "running_mean"), (running_var, "running_var"),
                                (weight, "weight"), (bias, "bias"))])
        self.coefficients = <double*>malloc(
            COEFFICIENT_KINDS * (self.channels + WRAP) * sizeof(double))
        vectors.numbers = <double*>malloc((5 * self.channels + 1) * sizeof(double))
        if self.coefficients == NULL or vectors.numbers == NULL:
            raise MemoryError("no memory for the coefficients of the channels")
        new_job(&job)
        job.group = 1
        job.view.channels = self.channels
        job.eps = self.eps
        job.prepared = self.coefficients
        job.mean, job.var = vectors.widened(self.arrays[0]), vectors.widened(self.arrays[1])
        job.weight, job.bias = vectors.widened(self.arrays[2]), vectors.widened(self.arrays[3])
        job.invstd = vectors.vector(self.channels)
        drivers.preparation(self.kernels, &job)

    def fits(self, x_, running_mean, running_var, weight, bias, eps, /):
        """Return whether all this is as it was; of a dtype and a CPU level, too."""
        cdef cnp.ndarray x = checked_array(x_, "x")
        cdef cnp.ndarray copy
        cdef object array
        cdef int i
        if kernels_of[kind_of(x)] != self.kernels or eps != self.eps:
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
