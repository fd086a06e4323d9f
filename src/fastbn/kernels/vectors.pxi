# SPDX-License-Identifier: BSD-3-Clause
# Vectors of elements <-> float64, for callers without NumPy: the same numbers as its
# conversions give, and those of ml_dtypes. Vectors are short, so one element at a time.
#
# May: convert. May not: compute.

cdef extern from *:
    """
    #ifdef FASTBN_FLOAT16
    enum { ROUNDED_ONCE = 1 };
    #else
    enum { ROUNDED_ONCE = 0 };
    #endif
    """
    enum:
        ROUNDED_ONCE    # NumPy's float16; bfloat16 is made of float32 by ml_dtypes


cdef inline double shortened(double x) noexcept nogil:
    # To 24 bits, which float32 has; the last one says whether anything but zeros was
    # there or behind it. So rounding to 11 bits or fewer goes the way that it goes for x.
    cdef uint64_t bits
    memcpy(&bits, &x, sizeof(bits))
    bits = (bits >> 29 | <uint64_t>(bits << 35 != 0)) << 29
    memcpy(&x, &bits, sizeof(bits))
    return x


cdef void widen_vector(const void* vector, Py_ssize_t n, double* to) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = as_double((<const elem*>vector)[i])
    fp_leave(saved)


cdef void narrow_vector(const double* vector, Py_ssize_t n, void* to) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Py_ssize_t i
    cdef double x
    for i in range(n):
        x = shortened(vector[i]) if ROUNDED_ONCE else vector[i]
        store_part(<elem*>to + i, splat(as_real(x)), 1)
    fp_leave(saved)
