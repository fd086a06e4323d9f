# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The kernels of images once more, for the library without Python: as linked.pyx."""
include "images.pxi"


cdef public const void* fastbn_image_kernels() noexcept nogil:
    return filled_kernels()
