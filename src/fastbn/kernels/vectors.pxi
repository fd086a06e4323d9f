# SPDX-License-Identifier: BSD-3-Clause
# Vectors of elements <-> float64, for callers without NumPy: the same numbers as its
# conversions give, and those of ml_dtypes.
#
# May: convert. May not: compute.

cdef inline double shortened(double x) noexcept nogil:
    # To 24 bits, which float32 has; the last one says whether anything but zeros was
    # there or behind it. So rounding to 11 bits or fewer goes the way that it goes for x.
    cdef uint64_t bits
    memcpy(&bits, &x, sizeof(bits))
    bits = (bits >> 29 | <uint64_t>(bits << 35 != 0)) << 29
    memcpy(&x, &bits, sizeof(bits))
    return x


cdef void vector_to_float64(const void* vector, Py_ssize_t n, double* to) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef const elem* elements = <const elem*>vector
    cdef Py_ssize_t i, registers = n // WIDTH
    cdef int half
    for i in range(registers):
        for half in range(HALVES):
            store_wide(to + i * WIDTH + half * WIDE, widen(load(elements + i * WIDTH), half))
    for i in range(registers * WIDTH, n):
        to[i] = as_double(elements[i])
    fp_leave(saved)


cdef void vector_from_float64(const double* vector, Py_ssize_t n, void* to) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Py_ssize_t i
    cdef double x
    for i in range(n):
        x = shortened(vector[i]) if ROUNDED_ONCE else vector[i]
        store_n(<elem*>to + i, set1(as_real(x)), 1)
    fp_leave(saved)
