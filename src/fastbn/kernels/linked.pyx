# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The kernels once more, for the library without Python that CMakeLists.txt builds.

It gives the function another name for each CPU level and element type; levels.h has them.
"""
include "kernels.pxi"


cdef public const void* fastbn_kernels() noexcept nogil:
    return filled_table()
