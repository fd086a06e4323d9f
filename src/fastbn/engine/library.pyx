# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine once more, for the library without Python that CMakeLists.txt builds.

The initialisation of this module is never called, and left out by the linker: what
needs it is not there. The kernels are linked, not imported.
"""
include "core.pyx"

cdef extern from "levels.h" nogil:
    const void* linked_kernels(int kind)


cdef public const fastbn_api* fastbn_get_api() noexcept nogil:
    # Threads that come here at the same time write the same.
    cdef int kind
    for kind in range(DTYPES):
        kernels_of[kind] = <const KernelTable*>linked_kernels(kind)
        if kernels_of[kind] == NULL:
            return NULL
    set_image_kernels(linked_kernels(DTYPES))
    return filled_api()
