# SPDX-License-Identifier: BSD-3-Clause
# Whole numbers: what kernels and the engine count with. May not know what is counted.

cdef inline Py_ssize_t minimum(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t maximum(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a > b else b


cdef inline Py_ssize_t ceil_div(Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    # n / size, rounded up. Neither is negative: so a shift may divide.
    return <size_t>(n + size - 1) // <size_t>size
